"""The perceptual network of a pixel loss, with weights read from the files that its authors published."""

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from etils import epath
from flax import nnx

from titok_jax import models
from titok_jax.models.perceptual import PerceptualConfig
from titok_jax.runtime.paths import as_path
from titok_jax.weights import convert, tensor_files


class Perceptual(NamedTuple):
    """A perceptual network with its weights.

    Attributes:
      name: as in `PerceptualConfig`.
      distance: (params, images [B, H, W, 3], reconstructions [B, H, W, 3]) -> distances [B], or one distance for all.
      params: nested dict of arrays, never changed.
    """

    name: str
    distance: Callable[[convert.Params, jax.Array, jax.Array], jax.Array]
    params: convert.Params


class _File(NamedTuple):
    stem: str  # file name without its suffix, .pth or .safetensors
    url: str


CONVNEXT_FILE = _File("convnext_small-0c510722", "https://download.pytorch.org/models/convnext_small-0c510722.pth")
VGG_FILE = _File("vgg16-397923af", "https://download.pytorch.org/models/vgg16-397923af.pth")
# The linear heads alone. They are published as vgg.pth, which could be any VGG file.
HEADS_FILE = _File(
    "lpips_vgg", "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth (rename it)"
)
_FILES = (CONVNEXT_FILE, VGG_FILE, HEADS_FILE)


def make_perceptual(name: str, params: convert.Params) -> Perceptual:
    """Makes the network `name` from parameters in memory.

    Raises:
      ValueError: an unknown name.
    """
    graphdef, _ = models.abstract(PerceptualConfig(name))
    return Perceptual(name, lambda p, images, others: nnx.merge(graphdef, p)(images, others), params)


def check_perceptual(name: str, perceptual: Perceptual | None) -> None:
    """Raises ValueError unless `perceptual` is the network `name` of the loss, or None if `name` is "none"."""
    if name != ("none" if perceptual is None else perceptual.name):
        found = "no network is given" if perceptual is None else f"the network given is {perceptual.name!r}"
        raise ValueError(f"loss.perceptual is {name!r}, but {found}")


_ADVICE = "set --config.perceptual_weights to the folder that holds it (or --config.loss.perceptual=none)"


def load_perceptual(name: str, folder: str | os.PathLike, *, advice: str = _ADVICE) -> Perceptual:
    """Reads the network `name` from the original files of its authors, or from their conversions to safetensors.

    Args:
      folder: local folder or bucket that holds convnext_small-0c510722 and, for LPIPS, vgg16-397923af and lpips_vgg, each as
        .pth or .safetensors.
      advice: the end of the error message for a missing file: what to do after its download. The default is for training.

    Raises:
      ValueError: an unknown name.
      FileNotFoundError: a file is missing; the message says which one, where to download it and what to set.
      WeightsError: a file is damaged or belongs to another model.
    """
    config = PerceptualConfig(name)
    table, abstract = convert.table_for(config), models.abstract(config)[1]
    origins = {published: _origin(published) for published in convert.published_shapes(table, abstract)}
    tensors = {}
    with contextlib.ExitStack() as stack:
        used = {file for file, _ in origins.values()}
        for file in (file for file in _FILES if file in used):
            found = stack.enter_context(tensor_files.open_weights(_find(file, name, folder, advice))).tensors
            names = {key: published for published, (origin, key) in origins.items() if origin is file}
            tensors |= {
                names.get(key, key): tensor for key, tensor in found.items() if key in names or not _unused(file, key)
            }
        return make_perceptual(name, convert.from_published(table, abstract, tensors, source=str(folder)))


def _origin(published: str) -> tuple[_File, str]:
    """The file that holds one of our tensors, and the tensor's name in that file."""
    if published.startswith("convnext."):
        return CONVNEXT_FILE, published.removeprefix("convnext.")
    if published.startswith("lpips.net."):
        return VGG_FILE, ".".join(["features", *published.split(".")[3:]])  # without lpips.net.slice1
    return HEADS_FILE, published.removeprefix("lpips.")


def _unused(file: _File, key: str) -> bool:
    """Whether a tensor is part of VGG's classifier, which LPIPS does not use."""
    return file is VGG_FILE and key.startswith("classifier.")


def _find(file: _File, name: str, folder: str | os.PathLike, advice: str) -> Path | epath.Path:
    candidates = [as_path(folder) / (file.stem + ending) for ending in (".safetensors", ".pth")] if folder else []
    path = next((c for c in candidates if c.is_file()), None)
    if path is None:
        place = f"{folder} holds neither {candidates[0].name} nor {candidates[1].name}" if folder else "no folder is set"
        raise FileNotFoundError(
            f"the perceptual network {name!r} needs {file.stem}.pth, but {place}: download it from {file.url} and {advice}"
        )
    return path


def used_tensors(tensors: Mapping[str, Any]) -> dict[str, Any] | None:
    """Selects the tensors of a published file that perceptual networks use. Returns None if it is not such a file."""
    config = PerceptualConfig("lpips-convnext_s-1-1")
    shapes = convert.published_shapes(convert.table_for(config), models.abstract(config)[1])
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    for file in _FILES:
        expected = {key: shapes[p] for p, (origin, key) in ((p, _origin(p)) for p in shapes) if origin is file}
        if {key: shape for key, shape in found.items() if not _unused(file, key)} == expected:
            return {key: tensors[key] for key in expected}
    return None
