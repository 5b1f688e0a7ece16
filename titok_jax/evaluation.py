"""What an evaluation measures, as functions: features of images in resumable pieces, and the figures made of these.

Every figure is computed from the pieces in their order, by one process and in float64, so it is the same bit for bit for any
number of processes and after any number of kills. Names say of how many images a figure is: "FID" is of 50,000, as published
ones are, "FID-5K" of 5,000; figures in the features of digits are called "digits-FID" and so on.
"""

import collections
import dataclasses
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from titok_jax import metrics
from titok_jax.cli import new_file
from titok_jax.data.transforms import center_crop_adm, center_crop_torchvision, to_uint8_round
from titok_jax.reconstruct import reconstruct
from titok_jax.sample import sample
from titok_jax.shards import Shards
from titok_jax.storage import as_path

PUBLISHED_NUM = 50_000  # images that published figures are of
ADM_SPLIT = 5_000  # images in a chunk of ADM's Inception score
MOST_NEIGHBOURHOODS = 10_000  # reference images of precision and recall, as in ADM's references
CROPS = {"torchvision": center_crop_torchvision, "adm": center_crop_adm}

Piece = dict[str, np.ndarray]
Pieces = Callable[[list[int]], Iterable[Piece]]


def metric_name(metric: str, num_images: int) -> str:
    """ "FID" -> "FID" of the 50,000 images that published figures are of, else "FID-5K", "FID-360"."""
    if num_images == PUBLISHED_NUM:
        return metric
    return f"{metric}-{num_images // 1000}K" if num_images % 1000 == 0 else f"{metric}-{num_images}"


# ---------------------------------------------------------------------------------------------------------------------
# Images


class SourceImages:
    """Images of a data set (`titok_jax.data.sources`), cropped, read when they are asked for.

    Args:
      crop: "torchvision", the published one of reconstructions, or "adm", of ADM's references.
      num: how many, spread evenly over the data set; all if not given.
    """

    def __init__(self, source, crop: str, size: int, num: int | None = None):
        if num is not None and not 1 <= num <= len(source):
            raise ValueError(f"{num} images asked for, but the data set has {len(source)}")
        self._source, self._crop, self._size = source, CROPS[crop], size
        self._places = np.arange(num or len(source)) * len(source) // (num or len(source))
        self._threads = ThreadPoolExecutor()

    def __len__(self) -> int:
        return len(self._places)

    def read(self, items: slice) -> np.ndarray:
        """uint8 [b, size, size, 3]."""
        return np.stack(list(self._threads.map(self._one, self._places[items].tolist())))

    def _one(self, place: int) -> np.ndarray:
        return self._crop(self._source[place]["image"], self._size)


class NpzImages:
    """The images `arr_0` of an .npz file, uint8 [n, H, W, 3], read when they are asked for: forwards is fast.

    Attributes:
      shape: (n, H, W, 3).
      size: H = W.
      names: what the file holds, each with the ending .npy.
      sorted_by_class: by its array `labels`, if it has one.

    Raises:
      ValueError: no such file of images; the message says what it is.
    """

    def __init__(self, path: str | os.PathLike):
        try:
            file = zipfile.ZipFile(as_path(path).open("rb"))
            self.names = file.namelist()
            if "arr_0.npy" not in self.names:
                raise ValueError(f"it holds {', '.join(self.names) or 'nothing'}, expected arr_0.npy")
            self._array = file.open("arr_0.npy")
            version = np.lib.format.read_magic(self._array)
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            self.shape, fortran_order, dtype = read_header(self._array)
        except (zipfile.BadZipFile, ValueError, EOFError) as error:
            raise ValueError(f"{path} is not an .npz file of images: {error}") from None
        if (
            dtype != np.uint8
            or fortran_order
            or len(self.shape) != 4
            or self.shape[1] != self.shape[2]
            or self.shape[3] != 3
        ):
            raise ValueError(f"{path}: arr_0 is {dtype} {list(self.shape)}, expected uint8 [n, size, size, 3]")
        self.path, self.size = path, self.shape[1]
        self._start = self._array.tell()
        labels = np.zeros(0)
        if "labels.npy" in self.names:
            with as_path(path).open("rb") as raw:
                labels = np.load(raw, allow_pickle=False)["labels"]
        self.sorted_by_class = len(np.unique(labels)) > 1 and bool((np.diff(labels) >= 0).all())

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, items: slice) -> np.ndarray:
        """uint8 [b, size, size, 3]."""
        shape = (items.stop - items.start, *self.shape[1:])
        self._array.seek(self._start + items.start * int(np.prod(shape[1:])))
        data = self._array.read(int(np.prod(shape)))
        if len(data) != np.prod(shape):
            raise ValueError(f"{self.path} is cut short: arr_0 should hold {self.shape[0]} images")
        return np.frombuffer(data, np.uint8).reshape(shape)


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


# ---------------------------------------------------------------------------------------------------------------------
# Pieces


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


# ---------------------------------------------------------------------------------------------------------------------
# References


@dataclasses.dataclass(frozen=True)
class Reference:
    """Real images that generated ones are compared with.

    Attributes:
      pool: statistics of the pooled features, of FID.
      spatial: those of the spatial features, of sFID; None if the network has none.
      neighbourhoods: pooled features float32 [m, D] of up to 10,000 of the images, for precision and recall.
      about: source, num_images (None: unknown, of ADM's), image_size, crop, network and what else says where it is from.
    """

    pool: metrics.FeatureStatistics
    spatial: metrics.FeatureStatistics | None
    neighbourhoods: np.ndarray
    about: dict[str, Any]

    def save(self, path: str | os.PathLike) -> None:
        """Writes an .npz file that is complete or absent: what `FeatureStatistics.save` writes, `neighbourhoods`, and
        `about` as JSON."""
        arrays: dict[str, np.ndarray] = {"network": np.asarray(self.pool.network)}
        for suffix, stats in (("", self.pool), ("_s", self.spatial)):
            if stats is not None:
                arrays |= {f"mu{suffix}": stats.mean, f"sigma{suffix}": stats.covariance, f"count{suffix}": stats.count}
        with new_file(path) as partial, open(partial, "wb") as file:
            np.savez(file, neighbourhoods=self.neighbourhoods, about=json.dumps(self.about), **arrays)


def read_reference(path: str | os.PathLike, network: str, image_size: int) -> Reference | NpzImages:
    """A reference file: one that `Reference.save` wrote; or ADM's, whose images `arr_0` still have to become features.

    Args:
      network: the name of the network that the others' features are of.
      image_size: of the images that it is to be compared with.

    Raises:
      ValueError: it is neither, of another feature network, or of images of another size.
    """
    try:
        with as_path(path).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            about = json.loads(str(file["about"])) if "about" in file.files else None
            neighbourhoods = file["neighbourhoods"] if about else None
            spatial = "mu_s" in file.files
    except (zipfile.BadZipFile, EOFError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a file of reference statistics: {error}") from None
    images = None if about else NpzImages(path)
    size = images.size if images else about["image_size"]
    if size != image_size:
        raise ValueError(
            f"{path} is of images of {size}x{size} pixels, those to compare with it have {image_size}x{image_size}: a "
            "distance between them would be one of sizes"
        )
    if images:
        return images
    stats = metrics.FeatureStatistics.load(path)
    if stats.network != network:
        raise ValueError(
            f"{path} holds features of {stats.network}, but this evaluation is in those of {network}: distances between the "
            "two mean nothing; choose the network with --features, or another reference"
        )
    return Reference(stats, metrics.FeatureStatistics.load(path, spatial=True) if spatial else None, neighbourhoods, about)


def make_reference(
    shards: Shards, network: str, about: dict[str, Any], adm: NpzImages | None = None, *, features: str = ""
) -> Reference:
    """The reference made of the pieces of `image_pieces`.

    Args:
      network: the name of the network.
      about: source, image_size, crop; the rest is added.
      adm: the images are those of this file. Statistics in it, usually of more images, then take the place of theirs.
      features: in front of the names of the arrays in the pieces.

    Raises:
      ValueError: statistics in the file do not fit the network.
    """
    chosen = np.zeros(shards.length, bool)
    chosen[np.linspace(0, shards.length - 1, min(shards.length, MOST_NEIGHBOURHOODS)).round().astype(int)] = True
    kept, start = [], 0
    for block in blocks(shards, f"{features}pool"):
        kept.append(block[chosen[start : start + len(block)]])
        start += len(block)
    neighbourhoods = np.concatenate(kept)
    about = about | {"num_images": shards.length, "network": network, "neighbourhoods": len(neighbourhoods)}
    stats: dict[str, metrics.FeatureStatistics | None] = {}
    for name, suffix in (("pool", ""), ("spatial", "_s")):
        has = features + name in shards.read(0)
        stats[name] = statistics(shards, features + name, network) if has else None
        if has and adm is not None and f"mu{suffix}.npy" in adm.names:
            given = metrics.FeatureStatistics.load(adm.path, spatial=name == "spatial")
            if given.dim != stats[name].dim:
                raise ValueError(
                    f"{adm.path}: mu{suffix} has {given.dim} features, those of {network} are {stats[name].dim}; is it of "
                    "another network?"
                )
            stats[name], about["num_images"] = given, given.count or None
    return Reference(stats["pool"], stats["spatial"], neighbourhoods, about)


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def codebook_figures(shards: Shards, codebook_size: int) -> dict[str, float]:
    """How evenly the tokens use the codebook: codebook_usage (a fraction), perplexity, entropy_bits."""
    usage = metrics.CodebookUsage(codebook_size)
    for tokens in blocks(shards, "tokens"):
        usage.update(tokens)
    return {"codebook_usage": usage.usage, "perplexity": usage.perplexity, "entropy_bits": usage.entropy}


def reconstruction_figures(shards: Shards, network: str, codebook_size: int | None, prefix: str = "") -> dict[str, float]:
    """Of the pieces of `reconstruction_pieces`.

    Args:
      network: the name of the network.
      codebook_size: None of a VAE.
      prefix: of the names of what is measured in features: "" of Inception.

    Returns:
      rFID between the images and their reconstructions, IS of the reconstructions (one split, as the published evaluation of
      tokenizers has it), the means of psnr (dB), ssim and lpips, codebook figures. Names carry the number of images.
    """
    score = metrics.InceptionScore()
    for logits in blocks(shards, "fake_logits"):
        score.update(logits)
    real, fake = (statistics(shards, name, network) for name in ("real_pool", "fake_pool"))
    figures = {"rFID": metrics.frechet_distance(real, fake), "IS": score.value}
    named = {metric_name(prefix + name, shards.length): value for name, value in figures.items()}
    for name in ("psnr", "ssim", "lpips"):
        if name in shards.read(0):
            named[name] = float(gather(shards, name).mean(dtype=np.float64))
    return named | ({} if codebook_size is None else codebook_figures(shards, codebook_size))


def generation_figures(
    shards: Shards, reference: Reference, prefix: str = "", num: int | None = None, *, features: str = ""
) -> dict[str, float]:
    """Of the pieces of `generation_pieces` or `image_pieces`, the first `num` images or all, against a reference.

    Args:
      prefix: of the names: "" of Inception.
      features: in front of the names of the arrays in the pieces: "real_" or "fake_" of `reconstruction_pieces`.

    Returns:
      FID, sFID (if the network has spatial features), IS (ADM's: the mean over consecutive chunks of 5,000), precision and
      recall (k = 3). Names carry the number of images.
    """
    network, num = reference.about["network"], num or shards.length
    pool, score = gather(shards, f"{features}pool", num), metrics.InceptionScore(ADM_SPLIT)
    for logits in blocks(shards, f"{features}logits", num):
        score.update(logits)
    figures = {
        "FID": metrics.frechet_distance(metrics.FeatureStatistics(pool.shape[1], network).update(pool), reference.pool)
    }
    if reference.spatial is not None:
        figures["sFID"] = metrics.frechet_distance(statistics(shards, f"{features}spatial", network, num), reference.spatial)
    figures["IS"] = score.value
    figures["precision"], figures["recall"] = metrics.precision_recall(reference.neighbourhoods, pool)
    return {metric_name(prefix + name, num): value for name, value in figures.items()}
