"""Features of images in resumable pieces."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from titok_jax.data.transforms import to_uint8_round
from titok_jax.evaluation import metrics
from titok_jax.inference.many import reconstruct, sample
from titok_jax.runtime.shards import Shards

Piece = dict[str, np.ndarray]


Pieces = Callable[[list[int]], Iterable[Piece]]


def _ahead(read: Callable[[int], np.ndarray], numbers: Iterable[int]) -> Iterator[np.ndarray]:
    """read(number) for each, in order; the next one is read while this one is used."""
    with ThreadPoolExecutor(1) as thread:
        waiting: collections.deque = collections.deque()
        for number in numbers:
            waiting.append(thread.submit(read, number))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _filled(images: np.ndarray, size: int) -> np.ndarray:
    """A batch filled up to one size, so that one program serves all."""
    return np.pad(images, ((0, size - len(images)), (0, 0), (0, 0), (0, 0)), mode="edge")


def _features(network, images: np.ndarray, prefix: str = "") -> Piece:
    """The features of uint8 images [b, H, W, 3] as arrays of a piece."""
    import jax

    with jax.default_matmul_precision("highest"):  # whatever the model is computed in
        features = network(images)
    arrays = {"pool": features.pool, "spatial": features.spatial, "logits": features.logits}
    return {prefix + name: array for name, array in arrays.items() if array is not None}


def image_pieces(shards: Shards, images, network) -> Pieces:
    """Of images as they are: pool, spatial, logits."""

    def pieces(numbers):
        for batch in _ahead(lambda number: images.read(shards.items(number)), numbers):
            yield _features(network, batch)

    return pieces


def reconstruction_pieces(
    shards: Shards, images, tokenizer, network, *, lpips: Callable | None = None, keep: bool = False
) -> Pieces:
    """Of images and their reconstructions, rounded to uint8 as published: psnr, ssim, lpips, of a vq model tokens; the
    features of both, real_pool, fake_pool, fake_logits and so on; with `keep` the reconstructions as images.

    Args:
      lpips: two float [b, H, W, 3] in [0, 1] -> [b].
    """

    def pieces(numbers):
        for real in _ahead(lambda number: images.read(shards.items(number)), numbers):
            ((_, tokens, decoded),) = reconstruct(tokenizer, _filled(real, shards.size), batch_size=shards.size)
            tokens, fake = tokens[: len(real)], to_uint8_round(decoded)[: len(real)]
            a, b = real / 255.0, fake / 255.0
            piece = {"psnr": metrics.psnr(a, b), "ssim": metrics.ssim(a, b)}
            if lpips is not None:
                pair = [_filled(x, shards.size).astype(np.float32) for x in (a, b)]
                piece["lpips"] = lpips(*pair)[: len(real)]
            if np.issubdtype(tokens.dtype, np.integer):  # not a VAE's
                piece["tokens"] = tokens
            if keep:
                piece["images"] = fake
            yield piece | _features(network, real, "real_") | _features(network, fake, "fake_")

    return pieces


def generation_pieces(
    shards: Shards,
    tokenizer,
    generator,
    network,
    labels: np.ndarray,
    seed: int,
    settings: dict[str, Any],
    *,
    keep: bool = False,
) -> Pieces:
    """Of generated images: tokens, pool, spatial, logits; with `keep` images. Arguments as of `titok_jax.sample.sample`."""

    def pieces(numbers):
        options = {"batch_size": shards.size, "batches": numbers, **settings}
        for _, tokens, images in sample(tokenizer, generator, labels, seed, **options):
            kept = {"images": images} if keep else {}
            yield {"tokens": tokens} | kept | _features(network, images)

    return pieces


def blocks(shards: Shards, name: str, num: int | None = None) -> Iterator[np.ndarray]:
    """One array of the pieces, of the first `num` images or all, in blocks of a thousand images or so."""
    left, block = num or shards.length, []
    for piece in shards:
        block.append(piece[name][:left])
        left -= len(block[-1])
        if sum(map(len, block)) >= 1024 or left <= 0:
            yield np.concatenate(block)
            block = []
        if left <= 0:
            return


def gather(shards: Shards, name: str, num: int | None = None) -> np.ndarray:
    """One array of the pieces, of the first `num` images or all."""
    return np.concatenate(list(blocks(shards, name, num)))


def statistics(shards: Shards, name: str, network: str, num: int | None = None) -> metrics.FeatureStatistics:
    """Of one array of features of a network, of the first `num` images or all."""
    result = None
    for features in blocks(shards, name, num):
        result = result or metrics.FeatureStatistics(features.shape[1], network)
        result.update(features)
    return result
