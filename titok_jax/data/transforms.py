"""Crops, augmentations and uint8 conversions, in numpy and Pillow.

Images are uint8 [H, W, 3] RGB throughout: a quarter of the bytes of float32 on the way to the device, which divides by
255 itself. The published code has two evaluation crops and two roundings; each is a function of its own here that says
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
from PIL import Image

from titok_jax.runtime.paths import files_below

Example = dict[str, Any]  # "image": uint8 [H, W, 3] or "tokens": int32 [N]; "label": int32 []

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")  # what is an image in a folder
_BICUBIC = Image.Resampling.BICUBIC


def image_files(folder: str | os.PathLike) -> list[tuple[str, ...]]:
    """The images in a folder and below, sorted: the names on the way to each, its own last. Links are followed: folders of
    classes are often links to a copy elsewhere."""
    return sorted(
        names
        for names in files_below(folder)
        if names[-1].lower().endswith(IMAGE_SUFFIXES) and not names[-1].startswith(".")  # macOS adds ._NAME.jpg
    )


def decode_image(data: bytes, name: str = "image") -> np.ndarray:
    """Decodes JPEG, PNG, WebP, ... to uint8 [H, W, 3] RGB; grey (also of 16 bits) and CMYK are converted,
    transparency is dropped.

    Raises:
      ValueError: the bytes are no image Pillow can read, are cut short, or have grey levels of 32 bits (some TIFF files), of
        which no one knows what is white; `name` says where they came from.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            sixteen_bits = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG")
            if image.mode in ("I", "F") and not sixteen_bits:
                kind = "whole numbers" if image.mode == "I" else "floats"
                raise ValueError(
                    f"its pixels are {kind} of 32 bits, of which none is known to be white; save it with 8 or 16"
                )
            if sixteen_bits:  # grey, whose values Pillow would cut off at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # each of Pillow's readers has exceptions of its own for damaged files
        raise ValueError(f"{name}: cannot read these {len(data)} bytes as an image (JPEG, PNG, WebP): {error}") from error


def center_crop_torchvision(image: np.ndarray, size: int) -> np.ndarray:
    """Shorter side to `size` (bicubic), then the centre: the crop of the published rFID.

    As torchvision's Resize and CenterCrop on a PIL image: the longer side is truncated to a whole number, the offset is
    rounded half to even.

    Args:
      image: uint8 [H, W, 3].

    Returns:
      uint8 [size, size, 3].
    """
    image = _resize_shorter_side(image, size)
    top, left = (round((side - size) / 2) for side in image.shape[:2])
    return image[top : top + size, left : left + size]


def center_crop_adm(image: np.ndarray, size: int) -> np.ndarray:
    """Halvings, shorter side to `size`, then the centre: the crop of published pretokenization, after ADM.

    Large images are halved with a box filter first. The longer side is rounded, the offset rounded down, so the result
    differs from `center_crop_torchvision` even where nothing is halved (300x410 pixels, for one).

    Args:
      image: uint8 [H, W, 3].

    Returns:
      uint8 [size, size, 3].
    """
    pil = Image.fromarray(image)
    while min(pil.size) >= 2 * size:
        pil = pil.resize((pil.width // 2, pil.height // 2), Image.Resampling.BOX)
    scale = size / min(pil.size)
    resized = np.asarray(pil.resize((round(pil.width * scale), round(pil.height * scale)), _BICUBIC))
    top, left = ((side - size) // 2 for side in resized.shape[:2])
    return resized[top : top + size, left : left + size]


def ten_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The four corners and the centre of a 10 % larger ADM crop, then the same five of its mirror image.

    One pretokenization pass with these stands for ten epochs with augmentation in the published generator training.

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
    image: np.ndarray, rng: np.random.Generator, *, resize_shorter_edge: int, crop_size: int, flip_probability: float = 0.5
) -> np.ndarray:
    """The published training augmentation: shorter side to a fixed length (bicubic), random crop, random mirror image.

    Args:
      image: uint8 [H, W, 3].
      rng: draws the crop and the flip.
      resize_shorter_edge: length of the shorter side before cropping, at least `crop_size`.
      crop_size: height and width of the crop.
      flip_probability: of mirroring left and right.

    Returns:
      uint8 [crop_size, crop_size, 3].

    Raises:
      ValueError: `crop_size` exceeds `resize_shorter_edge`.
    """
    if crop_size > resize_shorter_edge:
        raise ValueError(f"crop_size {crop_size} must not exceed resize_shorter_edge {resize_shorter_edge}")
    image = _resize_shorter_side(image, resize_shorter_edge)
    top, left = (int(rng.integers(0, side - crop_size + 1)) for side in image.shape[:2])
    image = image[top : top + crop_size, left : left + crop_size]
    if rng.random() < flip_probability:
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def center_crop_flip(image: np.ndarray, rng: np.random.Generator, *, size: int, flip_probability: float = 0.5) -> np.ndarray:
    """`center_crop_torchvision`, mirrored half of the time: the published augmentation of the generator when it is trained
    on images (`random_crop: False`, `random_flip: True`).

    Args:
      image: uint8 [H, W, 3].
      rng: draws the flip.

    Returns:
      uint8 [size, size, 3].
    """
    image = center_crop_torchvision(image, size)
    return np.ascontiguousarray(image[:, ::-1]) if rng.random() < flip_probability else image


def jitter(
    image: np.ndarray, rng: np.random.Generator, *, rotation: float = 8.0, shift: float = 2.0, scale: float = 0.05
) -> np.ndarray:
    """A small random rotation, shift and change of size about the centre; what enters from outside is black.

    For digits, which must not be mirrored.

    Args:
      image: uint8 [H, W, 3].
      rng: draws four uniform numbers.
      rotation: up to so many degrees either way.
      shift: up to so many pixels either way, in both directions.
      scale: up to so much smaller or larger, as a fraction.

    Returns:
      uint8 [H, W, 3].
    """
    angle = math.radians(rng.uniform(-rotation, rotation))
    shift_x, shift_y = rng.uniform(-shift, shift, 2)
    zoom = 1 + rng.uniform(-scale, scale)
    height, width = image.shape[:2]
    # Pillow asks for the inverse: where in the input each output pixel comes from. Its coordinates count pixel edges.
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    x, y = width / 2 + shift_x, height / 2 + shift_y
    inverse = (cos, sin, width / 2 - cos * x - sin * y, -sin, cos, height / 2 + sin * x - cos * y)
    return np.asarray(Image.fromarray(image).transform((width, height), Image.Transform.AFFINE, inverse, _BICUBIC))


def to_uint8_round(images: np.ndarray) -> np.ndarray:
    """Float images clipped to [0, 1] -> uint8 by rounding: the published rFID, and what to write to a file."""
    return np.round(np.clip(np.asarray(images, np.float32), 0, 1) * 255).astype(np.uint8)


def to_uint8_truncate(images: np.ndarray) -> np.ndarray:
    """Float images clipped to [0, 1] -> uint8 by truncation: the published gFID samples, half a level darker."""
    return (np.clip(np.asarray(images, np.float32), 0, 1) * 255).astype(np.uint8)


def make_train_transform(spec: Mapping[str, Any]) -> Callable[[Example, np.random.Generator], Example]:
    """The augmentation named by `spec`, as a picklable function of an example and a random generator.

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
    """The crop named by `spec`, as a picklable function of an example.

    Args:
      spec: "name" (`center_crop_torchvision` or `center_crop_adm`) and "size".

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


def _resize_shorter_side(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] -> the same with min(H, W) == size, bicubic; the longer side is truncated to a whole number."""
    height, width = image.shape[:2]
    short, long = min(height, width), int(size * max(height, width) / min(height, width))
    if short == size:
        return image
    return np.asarray(Image.fromarray(image).resize((size, long) if width <= height else (long, size), _BICUBIC))
