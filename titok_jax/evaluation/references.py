"""Statistics of real images, as references for generated images."""

import dataclasses
import json
import os
from typing import Any

import numpy as np

from titok_jax.evaluation import metrics
from titok_jax.evaluation.image_sources import NpzImages
from titok_jax.evaluation.pieces import blocks, statistics
from titok_jax.runtime.npz import NpzFile
from titok_jax.runtime.outputs import new_file
from titok_jax.runtime.shards import Shards

MOST_NEIGHBOURHOODS = 10_000  # reference images for precision and recall, as in ADM's references


@dataclasses.dataclass(frozen=True)
class Reference:
    """Statistics of the real images that generated images are compared with.

    Attributes:
      pool: statistics of the pooled features, for FID.
      spatial: statistics of the spatial features, for sFID; None if the network has no such features.
      neighbourhoods: pooled features float32 [m, D] of up to 10,000 of the images, for precision and recall.
      about: the origin: source, num_images (None if unknown, as in ADM's files), image_size, crop, network and more.
    """

    pool: metrics.FeatureStatistics
    spatial: metrics.FeatureStatistics | None
    neighbourhoods: np.ndarray
    about: dict[str, Any]

    def save(self, path: str | os.PathLike, *, replace: bool) -> None:
        """Writes an .npz file, which is either complete or absent. It holds the arrays of `FeatureStatistics.save`,
        `neighbourhoods`, and `about` as JSON."""
        arrays: dict[str, np.ndarray] = {"network": np.asarray(self.pool.network)}
        for suffix, stats in (("", self.pool), ("_s", self.spatial)):
            if stats is not None:
                arrays |= {f"mu{suffix}": stats.mean, f"sigma{suffix}": stats.covariance, f"count{suffix}": stats.count}
        with new_file(path, replace=replace) as partial, open(partial, "wb") as file:
            np.savez(file, neighbourhoods=self.neighbourhoods, about=json.dumps(self.about), **arrays)


def read_reference(path: str | os.PathLike, network: str, image_size: int) -> Reference | NpzImages:
    """Reads a reference file that `Reference.save` wrote, or one of ADM's. ADM's files give images (`arr_0`), whose features
    are still to be computed.

    Args:
      network: name of the feature network of this evaluation.
      image_size: size of the images to compare with the reference.

    Raises:
      ValueError: if the file is neither, or is for another feature network or another image size.
    """
    with NpzFile(path) as file:
        about = _read_about(file) if "about" in file.names else None
        neighbourhoods = file.read("neighbourhoods") if about else None
        spatial = "mu_s" in file.names
    images = None if about else NpzImages(path)
    size = images.size if images else about["image_size"]
    if size != image_size:
        raise ValueError(
            f"{path} is of images of {size}x{size} pixels, those to compare with it have {image_size}x{image_size}: a "
            "distance between them would be one of sizes"
        )
    if images:
        if "mu" in images.names and (given := metrics.FeatureStatistics.load(path)).network:
            _check_network(path, given, network)
        return images
    stats = metrics.FeatureStatistics.load(path)
    _check_network(path, stats, network)
    if neighbourhoods.dtype.kind != "f" or neighbourhoods.shape[1:] != (stats.dim,) or not np.isfinite(neighbourhoods).all():
        raise ValueError(
            f"{path}: neighbourhoods is {neighbourhoods.dtype} {list(neighbourhoods.shape)}, expected finite floats "
            f"[m, {stats.dim}]"
        )
    spatial_stats = metrics.FeatureStatistics.load(path, spatial=True) if spatial else None
    return Reference(stats, spatial_stats, neighbourhoods, about | {"network": network})


def saved_network(path: str | os.PathLike) -> str:
    """The network that the statistics in a file are of; "" if it does not say."""
    with NpzFile(path) as file:
        return file.text("network", most=2**12) if "network" in file.names else ""


def _read_about(file: NpzFile) -> dict[str, Any]:
    """The origin of saved statistics, as `Reference.save` wrote it."""
    try:
        about = json.loads(file.text("about", most=2**20))
    except (ValueError, RecursionError):
        about = None
    numbers = [about.get("image_size"), about.get("num_images") or 1] if isinstance(about, dict) else [None]
    network = saved_network(file.path)
    if not all(type(value) is int and value > 0 for value in numbers) or about.get("network", network) != network:
        raise ValueError(
            f"{file.path}: its entry about is not what --save-reference writes, so what it is of is not known; make it again"
        )
    return about


def _check_network(path: str | os.PathLike, stats: metrics.FeatureStatistics, network: str) -> None:
    if stats.network != network:
        raise ValueError(
            f"{path} holds features of {stats.network}, but this evaluation is in those of {network}: distances between the "
            "two mean nothing; choose the network with --features, or another reference"
        )


def make_reference(
    shards: Shards, network: str, about: dict[str, Any], adm: NpzImages | None = None, *, features: str = ""
) -> Reference:
    """Makes a reference from the pieces of `image_pieces`.

    Args:
      network: name of the feature network.
      about: source, image_size, crop; the rest is added.
      adm: the file that the images are from. If it holds statistics, usually of more images, they are used instead.
      features: prefix of the array names in the pieces.

    Raises:
      ValueError: if statistics in the file do not fit the network.
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
        if has and adm is not None and f"mu{suffix}" in adm.names:
            given = metrics.FeatureStatistics.load(adm.path, spatial=name == "spatial")
            if given.dim != stats[name].dim:
                raise ValueError(
                    f"{adm.path}: mu{suffix} has {given.dim} features, those of {network} are {stats[name].dim}; is it of "
                    "another network?"
                )
            stats[name], about["num_images"] = given, given.count or None
    return Reference(stats["pool"], stats["spatial"], neighbourhoods, about)
