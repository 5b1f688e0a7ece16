"""Plots of numbers over other numbers."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Told apart by eyes of every kind (Okabe and Ito, "Color Universal Design", 2008).
_MARGIN = 12
_INK, _FAINT, _PAPER, _RULE = (34, 34, 34), (110, 110, 110), (255, 255, 255), (221, 221, 221)
_COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0))


_FINER = 3  # curves are drawn so many times larger and then reduced, for smooth lines


def curve(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_label: str,
    y_label: str,
    title: str | None = None,
    names: Mapping[str, Sequence[str]] | None = None,
    size: tuple[int, int] = (720, 540),
) -> Image.Image:
    """Lines through points, with axes and a legend.

    Args:
      lines: name -> (x, y) of its points, finite, in the order in which they are joined.
      names: name of a line -> a word beside each of its points, which then are marked.
      size: of the picture in pixels, (width, height).

    Returns:
      An RGB picture.

    Raises:
      ValueError: no points, or values that are not finite.
    """
    points = np.array([point for line in lines.values() for point in line], np.float64).reshape(-1, 2)
    if not len(points) or not np.isfinite(points).all():
        raise ValueError(f"{len(points)} points, expected at least one, and all finite")
    width, height = (side * _FINER for side in size)
    font, title_font = (ImageFont.load_default(size=px * _FINER) for px in (13, 16))
    line_height = sum(font.getmetrics())
    picture = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(picture)
    x_ticks, y_ticks = _ticks(points[:, 0]), _ticks(points[:, 1])
    margin, gap = _MARGIN * _FINER, 6 * _FINER
    tick_width = max(font.getlength(text) for _, text in y_ticks)
    left, right = math.ceil(margin + tick_width + gap), width - 2 * margin
    top = margin + (sum(title_font.getmetrics()) + gap if title else 0) + line_height + gap
    bottom = height - margin - 2 * line_height - 2 * gap
    (x_low, x_high), (y_low, y_high) = _limits(points[:, 0]), _limits(points[:, 1])

    def place(x, y):
        return (
            left + (x - x_low) / (x_high - x_low) * (right - left),
            bottom - (y - y_low) / (y_high - y_low) * (bottom - top),
        )

    if title:
        draw.text((margin, margin), title, _INK, title_font)
    for value, text in x_ticks:
        x, _ = place(value, y_low)
        draw.line([(x, top), (x, bottom)], _RULE, _FINER)
        draw.text((x, bottom + gap), text, _FAINT, font, anchor="ma")
    for value, text in y_ticks:
        _, y = place(x_low, value)
        draw.line([(left, y), (right, y)], _RULE, _FINER)
        draw.text((left - gap, y), text, _FAINT, font, anchor="rm")
    draw.text(((left + right) / 2, height - margin), x_label, _INK, font, anchor="md")
    draw.text((left, top - gap), y_label, _INK, font, anchor="ld")
    legend = right
    for number, name in reversed(list(enumerate(lines))):
        if len(lines) > 1:
            legend -= font.getlength(name)
            draw.text((legend, top - gap), name, _COLOURS[number % len(_COLOURS)], font, anchor="ld")
            legend -= 2 * gap
    for number, (name, line) in enumerate(lines.items()):
        colour, places = _COLOURS[number % len(_COLOURS)], [place(x, y) for x, y in line]
        draw.line(places, colour, 2 * _FINER, joint="curve")
        if names is not None or len(line) == 1:
            for x, y in places:
                draw.circle((x, y), 4 * _FINER, colour)
        for (x, y), text in zip(places, (names or {}).get(name, ()), strict=False):
            draw.text((x + gap, y - gap), text, colour, font, anchor="ld", stroke_width=2 * _FINER, stroke_fill=_PAPER)
    return picture.resize(size, Image.Resampling.LANCZOS)


def _limits(values: np.ndarray) -> tuple[float, float]:
    """The ends of an axis: those of the values, and a little room."""
    low, high = float(values.min()), float(values.max())
    room = 0.06 * (high - low) or 0.15 * abs(high) or 1.0
    return low - room, high + room


def _ticks(values: np.ndarray) -> list[tuple[float, str]]:
    """Round numbers along an axis, four to nine of them, and how they are written."""
    low, high = _limits(values)
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(step for step in (5 * power, 2 * power, power) if (high - low) / step >= 4)
    decimals = max(0, -math.floor(math.log10(step)))
    numbers = range(math.ceil(low / step), math.floor(high / step) + 1)
    return [(number * step, f"{number * step:,.{decimals}f}") for number in numbers]
