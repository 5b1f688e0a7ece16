"""The embedded handwritten digits: 1,797 images, enough to train a small TiTok on a laptop. Origin: DIGITS.md."""

from pathlib import Path

import numpy as np
from PIL import Image

# The split is a permutation with this seed. numpy has frozen the stream of RandomState, so the split never changes.
SPLIT_SEED = 1797
TRAIN_FRACTION = 0.8

# The scans are cropped to the ink. A margin of one empty pixel leaves room for shifts of a few pixels and lets the
# resampling filter fade out the strokes. Without it the digits would end abruptly at the top and bottom.
_MARGIN = 1


def load_digits(split: str = "train", image_size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Returns grey images uint8 [n, image_size, image_size], white ink on black, and labels int32 [n] in 0..9.

    Args:
      split: "train" (1,437 images), "held_out" or "test" (two names of the other 360), or "all" (1,797, in file order).
      image_size: height and width after bicubic upscaling.

    Raises:
      ValueError: unknown split.
    """
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        images, labels = file["images"], file["labels"].astype(np.int32)
    order = np.random.RandomState(SPLIT_SEED).permutation(len(images))
    num_train = int(TRAIN_FRACTION * len(images))
    held_out = order[num_train:]
    chosen = {"train": order[:num_train], "held_out": held_out, "test": held_out, "all": np.arange(len(images))}
    if split not in chosen:
        raise ValueError(f"digits has no split {split!r}; it has train, held_out (also called test), all")
    return np.stack([_upscale(image, image_size) for image in images[chosen[split]]]), labels[chosen[split]]


def _upscale(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [8, 8] in 0..16 -> uint8 [size, size] in 0..255."""
    grey = np.round(np.pad(image, _MARGIN) * (255 / 16)).astype(np.uint8)
    return np.asarray(Image.fromarray(grey).resize((size, size), Image.Resampling.BICUBIC))
