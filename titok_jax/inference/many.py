"""Generates images from labels, or reconstructs images, batch by batch."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from titok_jax.data.image_files import ImageFiles
from titok_jax.data.transforms import to_uint8_truncate

# For each computation dtype. By default TPUs and GPUs compute float32 products in bfloat16 or TF32.
MATMUL_PRECISION = {"float32": "highest", "bfloat16": "default"}


def sample(
    tokenizer,
    generator,
    labels: np.ndarray,
    seed: int,
    *,
    batch_size: int = 64,
    batches: Iterable[int] | None = None,
    **settings: Any,
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Generates images for labels, batch by batch. Image i depends on its label, the seed and i. The batch size changes it
    only by the rounding of sums.

    Args:
      tokenizer, generator: from `titok_jax.load_pair`.
      labels: int [n], 0 .. num_classes - 1.
      seed: seed of all randomness.
      batch_size: images per batch. The last batch is padded to this size, so that one compiled program serves all batches.
      batches: indices of the batches to generate, counted from 0; all if not given.
      settings: keyword arguments of `titok_jax.generate`.

    Yields:
      The slice of the labels, token ids int32 [b, N], images uint8 [b, H, W, 3] rounded like the published sampling script.

    Raises:
      ValueError: for a label or setting out of range.
    """
    import jax

    from titok_jax.inference.generator import generate

    key = jax.random.key(seed, impl="threefry2x32")
    for batch in range(-(-len(labels) // batch_size)) if batches is None else batches:
        start = batch * batch_size
        part = labels[start : start + batch_size]
        padded = np.pad(part, (0, batch_size - len(part)), mode="edge")
        ids = generate(generator, padded, key, first_index=start, **settings)
        images = to_uint8_truncate(tokenizer.decode(ids))
        yield slice(start, start + len(part)), np.asarray(ids)[: len(part)], images[: len(part)]


def balanced_labels(classes: Sequence[int], num: int) -> np.ndarray:
    """`num` labels that cycle through the classes, 0 1 2 ... 0 1 2 ..., as in the published sampling script: int32 [num].

    The counts of two classes differ by one at most. With fewer labels than classes, the labels are spread evenly over the
    classes. (On R processes the published script splits the list into R parts and interleaves their images, so its file has
    these labels in another order.)
    """
    places = np.arange(num) % len(classes) if num >= len(classes) else np.arange(num) * len(classes) // num
    return np.asarray(classes, np.int32)[places]


def by_class(labels: np.ndarray) -> np.ndarray:
    """Indices that group equal labels [n], with classes in the order in which they first appear: int64 [n]."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(first[inverse], kind="stable")


def reconstruct(
    tokenizer, images: np.ndarray | ImageFiles, *, batch_size: int = 64
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Encodes and decodes images, batch by batch. A VAE uses the mean of the posterior.

    Args:
      tokenizer: from `titok_jax.load_tokenizer` or `load_vqgan`.
      images: [n, H, W, 3] uint8, or float in [0, 1]; or an object whose slices are such arrays.
      batch_size: images per batch. The last batch is padded to this size, so that one compiled program serves all batches.
        If the tokenizer is on a mesh, it must be a multiple of the devices that share a batch.

    Yields:
      The slice of the images, tokens int32 [b, N] (VAE: float32 [b, N, C], VQGAN: int32 [b, h, w]), reconstructions float32
      [b, H, W, 3] in [0, 1].

    Raises:
      ValueError: if the images do not have the tokenizer's size, or if it has no pixels (stage 1).
    """
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        filled = np.pad(part, ((0, batch_size - len(part)), (0, 0), (0, 0), (0, 0)), mode="edge")
        tokens = tokenizer.encode(filled)
        decoded = tokenizer.decode(tokens)
        count = len(part)
        yield slice(start, start + count), np.asarray(tokens)[:count], np.asarray(decoded)[:count]
