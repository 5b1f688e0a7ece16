"""Computes features of images in resumable pieces."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from titok_jax.data.transforms import to_uint8_round
from titok_jax.evaluation import metrics
from titok_jax.inference.many import filled, reconstruct, sample
from titok_jax.models.generator import SamplingConfig
from titok_jax.runtime.shards import Shards

Piece = dict[str, np.ndarray]
Pieces = Callable[[list[int]], Iterable[Piece]]


def _ahead(read: Callable[[int], np.ndarray], numbers: Iterable[int]) -> Iterator[np.ndarray]:
    """Yields read(number) for each number, in order. The next one is read while the current one is used."""
    with ThreadPoolExecutor(1) as thread:
        waiting: collections.deque = collections.deque()
        for number in numbers:
            waiting.append(thread.submit(read, number))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _features(network, images: np.ndarray, prefix: str = "") -> Piece:
    """The features of uint8 images [b, H, W, 3] as arrays of a piece; none without a network."""
    if network is None:
        return {}
    import jax

    with jax.default_matmul_precision("highest"):  # whatever the model's precision is
        features = network(images)
    arrays = {"pool": features.pool, "spatial": features.spatial, "logits": features.logits}
    return {prefix + name: array for name, array in arrays.items() if array is not None}


def image_pieces(shards: Shards, images, network) -> Pieces:
    """Makes pieces with the features of the given images: pool, spatial, logits."""

    def pieces(numbers):
        for batch in _ahead(lambda number: images.read(shards.items(number)), numbers):
            yield _features(network, batch)

    return pieces


def reconstruction_pieces(
    shards: Shards, images, tokenizer, network, *, lpips: Callable | None = None, keep: bool = False, key: int | None = None
) -> Pieces:
    """Makes pieces for images and their reconstructions, which are rounded to uint8 as published.

    The arrays are psnr, ssim, lpips (if given), tokens (not for a VAE), and the features of both, unless `network` is None:
    real_pool, fake_pool, fake_logits and so on. With `keep`, the array images holds the reconstructions.

    Args:
      key: for VAEs only: a seed, to decode draws from the posterior instead of its mean.
      lpips: maps two float [b, H, W, 3] in [0, 1] to [b].
    """

    def pieces(numbers):
        for number, real in zip(numbers, _ahead(lambda number: images.read(shards.items(number)), numbers), strict=True):
            options = {"batch_size": shards.size, "key": key, "first_index": number * shards.size}
            ((_, tokens, decoded),) = reconstruct(tokenizer, filled(real, shards.size), **options)
            tokens, fake = tokens[: len(real)], to_uint8_round(decoded)[: len(real)]
            a, b = real / 255.0, fake / 255.0
            piece = {"psnr": metrics.psnr(a, b), "ssim": metrics.ssim(a, b)}
            if lpips is not None:
                pair = [filled(x, shards.size).astype(np.float32) for x in (a, b)]
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
    settings: SamplingConfig,
    *,
    keep: bool = False,
) -> Pieces:
    """Makes pieces for generated images: tokens, pool, spatial, logits, and images if `keep`. The other arguments are those
    of `titok_jax.inference.many.sample`."""

    def pieces(numbers):
        options = {"batch_size": shards.size, "numbers": numbers, "sampling": settings}
        for _, tokens, images in sample(tokenizer, generator, labels, seed, **options):
            kept = {"images": images} if keep else {}
            yield {"tokens": tokens} | kept | _features(network, images)

    return pieces


def blocks(shards: Shards, name: str, num: int | None = None) -> Iterator[np.ndarray]:
    """Yields one array of the pieces for the first `num` images (default: all), in blocks of about a thousand images."""
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
    """Returns one array of the pieces for the first `num` images (default: all)."""
    return np.concatenate(list(blocks(shards, name, num)))


def statistics(shards: Shards, name: str, network: str, num: int | None = None) -> metrics.FeatureStatistics:
    """Statistics of one array of features for the first `num` images (default: all)."""
    result = None
    for features in blocks(shards, name, num):
        result = result or metrics.FeatureStatistics(features.shape[1], network)
        result.update(features)
    return result
