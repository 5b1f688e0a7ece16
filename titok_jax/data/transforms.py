"""Crops, augmentations and uint8 conversions, in numpy and Pillow.

All images are uint8 [H, W, 3] RGB. This is a quarter of the size of float32 in the transfer to the device, which divides by
255. The published code has two evaluation crops and two roundings. Each has its own function here, whose docstring says
which published number it belongs to.
"""

import functools
import inspect
import io
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from titok_jax.runtime.paths import files_below

Pair = tuple[int, int]
Example = dict[str, Any]  # "image": uint8 [H, W, 3] or "tokens": int32 [N]; "label": int32 []
REPLACED = "replaced"  # also in an example that stands in for another one: the index of that one; -1 in all others

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")  # files with these suffixes are images
# What is decoded, whatever a file is called. Pillow reads more, some of it by other programs (EPS by Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 2**28 // 3  # 256 MB of RGB; Pillow warns above it
_BICUBIC = Image.Resampling.BICUBIC
# An image is resized as a whole up to this many pixels (100 MB), as published. Only pictures more than 500 times as long as
# wide have more at 256 pixels.
_WHOLE_RESIZE = 2**25


class Undecodable(ValueError):
    """The bytes of an example are damaged, or no image that is read here."""


def image_files(folder: str | os.PathLike) -> list[tuple[str, ...]]:
    """The images in a folder and its sub-folders, sorted, each as a tuple of path components.

    Links to folders are followed, because class folders are often links to a copy elsewhere.

    Raises:
      ValueError: an image is no regular file, or a link to a file out of the folder.
    """
    return sorted(files_below(folder, _is_image))


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")  # macOS adds ._NAME.jpg


def decode_image(data: bytes, name: str = "image") -> np.ndarray:
    """Decodes JPEG, PNG, WebP, BMP, GIF (the first picture) and TIFF (the first page) to uint8 [H, W, 3] RGB.

    Grey images (also with 16 bits) and CMYK are converted. Transparency is dropped.

    Raises:
      Undecodable: Pillow cannot read the bytes as one of FORMATS, they are truncated, the image has more than MAX_PIXELS, or
        its grey levels have 32 bits (some TIFF files), for which the value of white is unknown. The message begins with
        `name`, the origin of the image.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:  # nothing is decoded until the pixels are asked for
                raise ValueError(f"{image.width} x {image.height} pixels, at most {MAX_PIXELS:,} in all are read")
            sixteen_bits = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG")
            if image.mode in ("I", "F") and not sixteen_bits:
                kind = "whole numbers" if image.mode == "I" else "floats"
                raise ValueError(
                    f"its pixels are {kind} of 32 bits, of which none is known to be white; save it with 8 or 16"
                )
            if sixteen_bits:  # Pillow would clip these grey values at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))  # convert would copy RGB
    except Exception as error:  # each of Pillow's readers raises its own exceptions for damaged files
        reason = "it is none of these" if isinstance(error, UnidentifiedImageError) else error
        formats = "JPEG, PNG, WebP, BMP, GIF, TIFF"
        raise Undecodable(f"{name}: cannot read these {len(data)} bytes as an image ({formats}): {reason}") from error


def decode_example(data: bytes, label: int, name: str) -> Example:
    """The example of an encoded image and its label; `name` is the origin of the image, for error messages.

    Raises:
      Undecodable: as `decode_image`.
      ValueError: the label does not fit int32.
    """
    if not -(2**31) <= label < 2**31:
        raise ValueError(f"{name}: label {label}, expected a class index below 2^31, or -1 for none")
    return {"image": decode_image(data, name), "label": np.int32(label)}


def center_crop_torchvision(image: np.ndarray, size: int, resize_shorter_edge: int | None = None) -> np.ndarray:
    """The crop of the published rFID: resizes the shorter side to `size` (bicubic), then crops the centre.

    This equals torchvision's Resize and CenterCrop on a PIL image: the longer side is truncated to a whole number, and the
    offset is rounded half to even.

    Args:
      image: uint8 [H, W, 3].
      size: height and width of the crop.
      resize_shorter_edge: length of the shorter side before cropping, at least `size`; `size` if not given.

    Returns:
      uint8 [size, size, 3].

    Raises:
      ValueError: `size` exceeds `resize_shorter_edge`.
    """
    shape = _shorter_side(image, _edge(size, resize_shorter_edge))
    return _resized(image, shape, _center(shape, size), size)


def center_crop_adm(image: np.ndarray, size: int, resize_shorter_edge: int | None = None) -> np.ndarray:
    """The crop of the published pretokenization, from ADM: resizes the shorter side to `size`, then crops the centre.

    Large images are first halved with a box filter, once or more. The longer side is rounded, and the offset is rounded
    down, so the result differs from `center_crop_torchvision` even if nothing is halved (for example with 300x410 pixels).

    Arguments, result and errors are those of `center_crop_torchvision`.
    """
    edge = _edge(size, resize_shorter_edge)
    while min(image.shape[:2]) >= 2 * edge:
        height, width = image.shape[:2]
        image = np.asarray(Image.fromarray(image).resize((width // 2, height // 2), Image.Resampling.BOX))
    scale = edge / min(image.shape[:2])
    shape = tuple(round(side * scale) for side in image.shape[:2])
    return _resized(image, shape, tuple((side - size) // 2 for side in shape), size)


def ten_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The four corners and the centre of a 10 % larger ADM crop, then the same five of its mirror image.

    In the published generator training, one pretokenization pass with these crops replaces ten epochs with augmentation.

    Args:
      image: uint8 [H, W, 3].

    Returns:
      uint8 [10, size, size, 3]: top-left, top-right, bottom-left, bottom-right, centre; the mirrored five.
    """
    base = center_crop_adm(image, int(size * 1.1))
    end = base.shape[0] - size
    middle = round(end / 2)
    corners = [(0, 0), (0, end), (end, 0), (end, end), (middle, middle)]
    return np.stack([view[top : top + size, left : left + size] for view in (base, base[:, ::-1]) for top, left in corners])


def random_resize_crop_flip(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    resize_shorter_edge: int,
    crop_size: int,
    random_crop: bool = True,
    random_flip: bool = True,
    flip_probability: float = 0.5,
) -> np.ndarray:
    """The published training augmentation: resizes the shorter side (bicubic), then crops and mirrors at random.

    The published code trains tokenizers with `random_crop` and `random_flip`, and generators on images with `random_flip`.

    Args:
      image: uint8 [H, W, 3].
      rng: draws the crop, then the flip; nothing for a part that is off.
      resize_shorter_edge: length of the shorter side before cropping, at least `crop_size`.
      crop_size: height and width of the crop.
      random_crop: crop anywhere; otherwise the centre, as `center_crop_torchvision` does.
      random_flip: mirror at random; otherwise never.
      flip_probability: probability of mirroring left and right, if `random_flip`.

    Returns:
      uint8 [crop_size, crop_size, 3].

    Raises:
      ValueError: `crop_size` exceeds `resize_shorter_edge`.
    """
    shape = _shorter_side(image, _edge(crop_size, resize_shorter_edge))
    if random_crop:
        corner = tuple(int(rng.integers(0, side - crop_size + 1)) for side in shape)
    else:
        corner = _center(shape, crop_size)
    image = _resized(image, shape, corner, crop_size)
    if random_flip and rng.random() < flip_probability:
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def center_crop_flip(image: np.ndarray, rng: np.random.Generator, *, size: int, flip_probability: float = 0.5) -> np.ndarray:
    """`random_resize_crop_flip` of the centre, with one size: the name that recipes had for it before.

    Returns:
      uint8 [size, size, 3].
    """
    options = {"resize_shorter_edge": size, "crop_size": size, "flip_probability": flip_probability}
    return random_resize_crop_flip(image, rng, random_crop=False, **options)


def jitter(
    image: np.ndarray, rng: np.random.Generator, *, rotation: float = 8.0, shift: float = 2.0, scale: float = 0.05
) -> np.ndarray:
    """Rotates, shifts and scales an image slightly and at random about its centre. Pixels from outside are black.

    This is the augmentation for digits, which must not be mirrored.

    Args:
      image: uint8 [H, W, 3].
      rng: draws four uniform numbers.
      rotation: largest rotation, in degrees, in either direction.
      shift: largest shift, in pixels, along each axis and in either direction.
      scale: largest change of size, as a fraction, smaller or larger.

    Returns:
      uint8 [H, W, 3].
    """
    angle = math.radians(rng.uniform(-rotation, rotation))
    shift_x, shift_y = rng.uniform(-shift, shift, 2)
    zoom = 1 + rng.uniform(-scale, scale)
    height, width = image.shape[:2]
    # Pillow expects the inverse map, from output to input coordinates. Its coordinates count pixel edges.
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    x, y = width / 2 + shift_x, height / 2 + shift_y
    inverse = (cos, sin, width / 2 - cos * x - sin * y, -sin, cos, height / 2 + sin * x - cos * y)
    return np.asarray(Image.fromarray(image).transform((width, height), Image.Transform.AFFINE, inverse, _BICUBIC))


def to_uint8_round(images: np.ndarray) -> np.ndarray:
    """Clips float images to [0, 1] and rounds them to uint8, as for the published rFID. Use this for files too."""
    return np.round(np.clip(np.asarray(images, np.float32), 0, 1) * 255).astype(np.uint8)


def to_uint8_truncate(images: np.ndarray) -> np.ndarray:
    """Clips float images to [0, 1] and truncates them to uint8, as for the published gFID: half a level darker."""
    return (np.clip(np.asarray(images, np.float32), 0, 1) * 255).astype(np.uint8)


def make_train_transform(spec: Mapping[str, Any]) -> Callable[[Example, np.random.Generator], Example]:
    """Makes the augmentation that `spec` names: a picklable function of an example and a random generator.

    Args:
      spec: "name" (`random_resize_crop_flip`, `center_crop_flip` or `jitter`) and that function's keyword arguments,
        e.g. {"name": "random_resize_crop_flip", "resize_shorter_edge": 256, "crop_size": 256}.

    Raises:
      ValueError: unknown name or option.
    """
    known = {
        "random_resize_crop_flip": random_resize_crop_flip,
        "center_crop_flip": center_crop_flip,
        "jitter": jitter,
    }
    options = _options(spec, known, "training")
    return functools.partial(_apply_random, *options)


def make_eval_transform(spec: Mapping[str, Any]) -> Callable[[Example], Example]:
    """Makes the crop that `spec` names: a picklable function of an example.

    Args:
      spec: "name" (`center_crop_torchvision` or `center_crop_adm`), "size" and, if it differs, "resize_shorter_edge".

    Raises:
      ValueError: unknown name or option.
    """
    crops = {"center_crop_torchvision": center_crop_torchvision, "center_crop_adm": center_crop_adm}
    return functools.partial(_apply, *_options(spec, crops, "evaluation"))


def _options(spec: Mapping[str, Any], known: dict[str, Callable], purpose: str) -> tuple[Callable, dict[str, Any]]:
    options = dict(spec)
    name = options.pop("name", None)
    if name not in known:
        raise ValueError(f"unknown {purpose} transform {name!r}; known: {', '.join(known)}")
    try:
        inspect.signature(known[name]).bind(*[None] * (2 if purpose == "training" else 1), **options)
    except TypeError as error:
        raise ValueError(f"{purpose} transform {name}: {error}; it takes {inspect.signature(known[name])}") from None
    return known[name], options


def _apply_random(function: Callable, options: dict[str, Any], example: Example, rng: np.random.Generator) -> Example:
    return example | {"image": function(example["image"], rng, **options)}


def _apply(function: Callable, options: dict[str, Any], example: Example) -> Example:
    return example | {"image": function(example["image"], **options)}


def _edge(size: int, resize_shorter_edge: int | None) -> int:
    """The length of the shorter side before a crop of `size`."""
    if resize_shorter_edge is not None and size > resize_shorter_edge:
        raise ValueError(f"crop_size {size} must not exceed resize_shorter_edge {resize_shorter_edge}")
    return size if resize_shorter_edge is None else resize_shorter_edge


def _center(shape: Pair, size: int) -> Pair:
    """The corner (top, left) of the centre of an image of `shape`, as torchvision crops it: rounded half to even."""
    return tuple(round((side - size) / 2) for side in shape)


def _shorter_side(image: np.ndarray, size: int) -> Pair:
    """The (height, width) of an image [H, W, 3] whose shorter side is resized to `size`; the longer one is truncated."""
    height, width = image.shape[:2]
    long = int(size * max(height, width) / min(height, width))
    return (long, size) if width <= height else (size, long)


def _resized(image: np.ndarray, shape: Pair, corner: Pair, size: int) -> np.ndarray:
    """Resizes uint8 [H, W, 3] to `shape` (bicubic) and cuts out [size, size, 3] at `corner` (top, left).

    Of a very long picture only what the window shows is resized: the whole may take thousands of times its memory. The
    pixels then differ by what Pillow rounds between rows and columns.
    """
    top, left = corner
    if shape == image.shape[:2] or shape[0] * shape[1] <= _WHOLE_RESIZE:
        whole = image if shape == image.shape[:2] else np.asarray(Image.fromarray(image).resize(shape[::-1], _BICUBIC))
        return whole[top : top + size, left : left + size]
    pieces, box = [], []
    for side, resized, start in zip(image.shape[:2], shape, corner, strict=True):
        scale = side / resized
        margin = 2 * max(scale, 1) + 2  # the filter reaches over two pixels of the result, or of the image
        first, last = max(0, int(start * scale - margin)), min(side, int((start + size) * scale + margin))
        pieces.append(slice(first, last))
        box.append((start * scale - first, min((start + size) * scale, side) - first))
    window = Image.fromarray(image[tuple(pieces)])
    return np.asarray(window.resize((size, size), _BICUBIC, box=(box[1][0], box[0][0], box[1][1], box[0][1])))
