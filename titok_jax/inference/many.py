"""Many images, batch by batch: made of labels, or reconstructed."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from titok_jax.data.image_files import ImageFiles
from titok_jax.data.transforms import to_uint8_truncate

# Of the computation dtypes. On TPU and GPU a float32 product is otherwise one of bfloat16 or TF32.
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
    """Images for labels, batch by batch. Image i depends on its label, the seed and i, and on the batch size by no
    more than the rounding of sums.

    Args:
      tokenizer, generator: as `titok_jax.load_pair` gives them.
      labels: int [n], 0 .. num_classes - 1.
      seed: of all randomness.
      batch_size: images at a time; batches are filled up to it, so that one program serves all.
      batches: the numbers of the batches to make, counted from 0; all if not given.
      settings: of `titok_jax.generate`.

    Yields:
      Where in the labels, token ids int32 [b, N], images uint8 [b, H, W, 3] as the published sampling script rounds them.

    Raises:
      ValueError: a label or setting out of range.
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
    """`num` labels, the classes in turn, 0 1 2 ... 0 1 2 ..., as the published sampling script gives them: int32 [num].

    Each is there as often as the others (differing by one at most). With fewer images than classes these are spread evenly
    over the classes. (The published script, run on R processes, deals the list out in R parts and numbers their images in
    turn, so that its file has these labels in another order.)
    """
    places = np.arange(num) % len(classes) if num >= len(classes) else np.arange(num) * len(classes) // num
    return np.asarray(classes, np.int32)[places]


def by_class(labels: np.ndarray) -> np.ndarray:
    """The places of labels [n] with equal ones together, classes in the order in which they first appear: int64 [n]."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(first[inverse], kind="stable")


def reconstruct(
    tokenizer, images: np.ndarray | ImageFiles, *, batch_size: int = 64
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Encodes and decodes, batch by batch; of a VAE, the mean of the posterior.

    Args:
      tokenizer: as `titok_jax.load_tokenizer` or `load_vqgan` gives it.
      images: [n, H, W, 3] uint8, or float in [0, 1]; or what gives such arrays for its slices.
      batch_size: images at a time; the last batch is filled up, so that one program serves all. Of a tokenizer on a mesh, a
        multiple of the devices that share a batch.

    Yields:
      Where in the images, tokens int32 [b, N] (a VAE: float32 [b, N, C], a VQGAN: int32 [b, h, w]), reconstructions float32
      [b, H, W, 3] in [0, 1].

    Raises:
      ValueError: images of another size than the tokenizer's, or one without pixels (stage 1).
    """
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        filled = np.pad(part, ((0, batch_size - len(part)), (0, 0), (0, 0), (0, 0)), mode="edge")
        tokens = tokenizer.encode(filled)
        decoded = tokenizer.decode(tokens)
        count = len(part)
        yield slice(start, start + count), np.asarray(tokens)[:count], np.asarray(decoded)[:count]
