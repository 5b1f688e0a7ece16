"""Draws labelled grids of images with Pillow, for files, reports and training logs."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from titok_jax.data.transforms import to_uint8_round

_SMALLEST_CELL = 64  # smaller images are enlarged to about this many pixels
_MARGIN = 12
_INK, _FAINT, _PAPER = (34, 34, 34), (110, 110, 110), (255, 255, 255)
_RULE = (221, 221, 221)


def grid(
    images: np.ndarray,
    columns: int | None = None,
    labels: Sequence[str] | None = None,
    scale: int | None = None,
    *,
    row_labels: Sequence[str] | None = None,
    title: str | None = None,
) -> Image.Image:
    """Draws images in rows on a white background.

    Args:
      images: [B, H, W, 3], uint8 or float in [0, 1] (rounded to uint8).
      columns: images per row. By default, the grid is about square.
      labels: [B] captions, one below each image. Captions that do not fit are shortened.
      scale: every pixel becomes scale x scale pixels. By default, small images are enlarged to about 64 pixels.
      row_labels: one label to the left of each row.
      title: a line above the grid.

    Returns:
      An RGB picture.

    Raises:
      ValueError: if the images have another shape or there are none, if the number of labels does not fit, or if columns or
        scale is below 1.
    """
    pixels = _to_uint8(images)
    count, height, width = pixels.shape[:3]
    columns = math.ceil(math.sqrt(count)) if columns is None else columns
    scale = max(1, round(_SMALLEST_CELL / max(height, width))) if scale is None else scale
    if columns < 1 or scale < 1:
        raise ValueError(f"columns {columns} and scale {scale}, expected at least 1")
    columns, rows = min(columns, count), math.ceil(count / columns)
    for what, given, expected in (("labels", labels, count), ("row_labels", row_labels, rows)):
        if given is not None and len(given) != expected:
            raise ValueError(f"{len(given)} {what}, expected {expected}")
    height, width = height * scale, width * scale
    gap = 4 if labels is None else max(4, width // 16)
    font = ImageFont.load_default(size=_font_size(width))
    line = sum(font.getmetrics())
    # Only rows with captions get space for them. Rows to be compared can then be directly below each other.
    lines = [line if labels is not None and any(labels[r * columns : (r + 1) * columns]) else 0 for r in range(rows)]
    row_font = ImageFont.load_default(size=_font_size(width) + 3)
    left = _MARGIN + (
        max(math.ceil(row_font.getlength(label)) for label in row_labels) + 10 if row_labels is not None else 0
    )
    title_font = ImageFont.load_default(size=16)
    top = _MARGIN + (sum(title_font.getmetrics()) + 8 if title else 0)
    total_width = left + columns * (width + gap) - gap + _MARGIN
    if title:
        total_width = max(total_width, math.ceil(title_font.getlength(title)) + 2 * _MARGIN)
    tops = [top + r * (height + gap) + sum(lines[:r]) for r in range(rows + 1)]
    picture = Image.new("RGB", (total_width, tops[rows] - gap + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(picture)
    if title:
        draw.text((_MARGIN, _MARGIN - 2), title, _INK, title_font)
    for index, image in enumerate(pixels):
        row, column = divmod(index, columns)
        x, y = left + column * (width + gap), tops[row]
        if row_labels is not None and column == 0:
            draw.text((left - 10, y + height / 2), row_labels[row], _INK, row_font, anchor="rm")
        cell = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
        picture.paste(cell, (x, y))
        if labels is not None:
            text = _fit(labels[index], font, width + gap - 2)
            draw.text((x + width / 2, y + height + line / 2), text, _FAINT, font, anchor="mm")
    return picture


def side_by_side(
    original: np.ndarray, reconstruction: np.ndarray, caption: str | None = None, scale: int | None = None
) -> Image.Image:
    """Draws an image and its reconstruction side by side.

    Args:
      original, reconstruction: [H, W, 3], uint8 or float in [0, 1].
      caption: a line above the images, e.g. the name and the PSNR.
      scale: as in `grid`, but small images are enlarged to about 128 pixels by default.

    Returns:
      An RGB picture.

    Raises:
      ValueError: as `grid`.
    """
    pair = np.concatenate([_to_uint8(np.asarray(image)[None]) for image in (original, reconstruction)])
    scale = max(1, round(2 * _SMALLEST_CELL / max(pair.shape[1:3]))) if scale is None else scale
    return grid(pair, 2, ["original", "reconstruction"], scale, title=caption)


def comparison(
    originals: np.ndarray,
    reconstructions: np.ndarray,
    columns: int = 8,
    captions: Sequence[str] | None = None,
    scale: int | None = None,
    *,
    title: str | None = None,
) -> Image.Image:
    """Draws rows of images, with the reconstructions of each row below it.

    Args:
      originals, reconstructions: [B, H, W, 3], uint8 or float in [0, 1].
      columns: pairs per row.
      captions: [B], one below each pair.
      scale, title: as in `grid`.

    Returns:
      An RGB picture.

    Raises:
      ValueError: as `grid`.
    """
    above, below = _to_uint8(originals), _to_uint8(reconstructions)
    if above.shape != below.shape:
        raise ValueError(f"images of shapes {list(above.shape)} and {list(below.shape)}, expected the same twice")
    columns = min(columns, len(above))
    pictures, labels, row_labels = [], [], []
    missing = -len(above) % columns
    blank = np.full((missing, *above.shape[1:]), 255, np.uint8)  # the background colour
    texts = list(captions if captions is not None else [""] * len(above)) + [""] * missing
    above, below = np.concatenate([above, blank]), np.concatenate([below, blank])
    for start in range(0, len(above), columns):
        part = slice(start, start + columns)
        pictures += [above[part], below[part]]
        labels += [""] * columns + texts[part]
        row_labels += ["original", "rebuilt"]
    return grid(
        np.concatenate(pictures),
        columns,
        labels if captions is not None else None,
        scale,
        row_labels=row_labels,
        title=title,
    )


def _to_uint8(images: np.ndarray) -> np.ndarray:
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or not images.size:
        raise ValueError(f"images have shape {list(images.shape)}, expected [B, H, W, 3] and at least one")
    return images if images.dtype == np.uint8 else to_uint8_round(images)


def _font_size(width: int) -> int:
    """The font size for cells of this width, both in pixels."""
    return min(16, max(11, width // 8))


def _fit(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
