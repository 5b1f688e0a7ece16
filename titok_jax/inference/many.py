"""Runs trained models over any number of images or labels, batch by batch."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from titok_jax.data.transforms import to_uint8_truncate


def filled(batch: np.ndarray, size: int) -> np.ndarray:
    """Repeats the last row of a batch until it has `size` rows, so that one compiled program serves all batches."""
    return np.pad(batch, [(0, size - len(batch))] + [(0, 0)] * (batch.ndim - 1), mode="edge")


def batches(items: Any, batch_size: int, model: Any) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yields (index of the first item, number of items, batch filled up to a size that the model's devices can share).

    Args:
      items: an array, an object whose slices are arrays, or an iterable of single items.

    Raises:
      ValueError: `batch_size` is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    whole = hasattr(items, "__len__") and hasattr(items, "__getitem__")
    size = _filled_size(batch_size, len(items) if whole else batch_size, model)
    if whole:
        parts = (items[start : start + batch_size] for start in range(0, len(items), batch_size))
    else:
        items = iter(items)
        parts = iter(lambda: list(itertools.islice(items, batch_size)), [])
    start = 0
    for part in parts:
        part = np.asarray(part)
        yield start, len(part), filled(part, size)
        start += len(part)


def _filled_size(batch_size: int, num: int, model: Any) -> int:
    """The size of the batches of `num` items, which the model's devices can share."""
    from titok_jax.runtime import sharding  # imports JAX, which the commands do after they have parsed their arguments

    return sharding.round_up_batch_size(batch_size, num, sharding.batch_devices(model.mesh))


def joined(parts: Iterable[np.ndarray], none: np.ndarray) -> np.ndarray:
    """The parts as one array; `none`, an array of length 0, if there are no parts."""
    parts = list(parts)
    return np.concatenate(parts) if parts else none


def encode(tokenizer: Any, images: Any, *, batch_size: int = 64, key: Any = None) -> Iterator[np.ndarray]:
    """Yields the tokens of each batch of images; see `Tokenizer.encode_all`."""
    for start, count, batch in batches(images, batch_size, tokenizer):
        yield np.asarray(tokenizer.encode(batch, key, first_index=start))[:count]


def decode(tokenizer: Any, tokens: Any, *, batch_size: int = 64, **options: Any) -> Iterator[np.ndarray]:
    """Yields the images of each batch of tokens; see `Tokenizer.decode_all`."""
    for _, count, batch in batches(tokens, batch_size, tokenizer):
        yield np.asarray(tokenizer.decode(batch, **options))[:count]


def reconstruct(
    tokenizer: Any, images: Any, *, batch_size: int = 64, key: Any = None, first_index: int = 0
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Encodes and decodes images, batch by batch.

    Args:
      tokenizer: from `titok_jax.load_tokenizer` or `load_vqgan`.
      images: [n, H, W, 3] uint8, or float in [0, 1]; an object whose slices are such arrays; or an iterable of images.
      batch_size: images per batch. The last batch is filled up to it, so that one compiled program serves all batches.
      key: for VAEs only: decode draws from the posterior, each of the key and the image's index, instead of its mean.
      first_index: the index of the first image in a longer list, for these draws.

    Yields:
      The slice of the images, tokens int32 [b, N] (VAE: float32 [b, N, C], VQGAN: int32 [b, h, w]), reconstructions float32
      [b, H, W, 3] in [0, 1].

    Raises:
      ValueError: if the images do not have the tokenizer's size, or if it has no pixels (stage 1).
    """
    for start, count, batch in batches(images, batch_size, tokenizer):
        tokens = tokenizer.encode(batch, key, first_index=first_index + start)
        decoded = tokenizer.decode(tokens)
        yield slice(start, start + count), np.asarray(tokens)[:count], np.asarray(decoded)[:count]


def sample(
    tokenizer: Any,
    generator: Any,
    labels: np.ndarray,
    seed: int,
    *,
    batch_size: int = 64,
    numbers: Iterable[int] | None = None,
    **settings: Any,
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Generates images for labels, batch by batch. Image i depends on its label, the seed and i. The batch size changes it
    only by the rounding of sums.

    Args:
      tokenizer, generator: from `titok_jax.load_pair`.
      labels: int [n], 0 .. num_classes - 1.
      seed: seed of all randomness.
      batch_size: images per batch. The last batch is filled up to this size.
      numbers: which batches to generate, counted from 0; all if not given.
      settings: `sampling` and keyword arguments of `Generator.generate`.

    Yields:
      The slice of the labels, token ids int32 [b, N], images uint8 [b, H, W, 3] truncated like the
      published sampling script's.

    Raises:
      ValueError: for a label or setting out of range.
    """
    size = _filled_size(batch_size, len(labels), generator)
    for number in range(-(-len(labels) // batch_size)) if numbers is None else numbers:
        first = number * batch_size
        part = labels[first : first + batch_size]
        ids = generator.generate(filled(part, size), seed, first_index=first, **settings)
        images = to_uint8_truncate(tokenizer.decode(ids))
        yield slice(first, first + len(part)), np.asarray(ids)[: len(part)], images[: len(part)]


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
