"""The perceptual network of a loss on pixels: its weights from the files they are published in, and its place in a task."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
from flax import nnx

from titok_jax import convert, models, weights
from titok_jax.models.perceptual import VGG_LEVELS, PerceptualConfig


class Perceptual(NamedTuple):
    """A perceptual network with its weights.

    Attributes:
      name: as in `PerceptualConfig`.
      distance: (params, images [B, H, W, 3], reconstructions [B, H, W, 3]) -> distances [B] or one for all.
      params: nested dict of arrays, which nothing changes.
    """

    name: str
    distance: Callable[[convert.Params, jax.Array, jax.Array], jax.Array]
    params: convert.Params


class _File(NamedTuple):
    stem: str  # of the file's name; .pth or .safetensors
    url: str


CONVNEXT_FILE = _File("convnext_small-0c510722", "https://download.pytorch.org/models/convnext_small-0c510722.pth")
VGG_FILE = _File("vgg16-397923af", "https://download.pytorch.org/models/vgg16-397923af.pth")
# The linear heads alone. Published as vgg.pth, which is too little of a name.
HEADS_FILE = _File(
    "lpips_vgg", "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth (rename it)"
)


def make_perceptual(name: str, params: convert.Params) -> Perceptual:
    """The network `name` with parameters that are at hand.

    Raises:
      ValueError: an unknown name.
    """
    graphdef, _ = models.abstract(PerceptualConfig(name))
    return Perceptual(name, lambda p, images, others: nnx.merge(graphdef, p)(images, others), params)


def load_perceptual(name: str, folder: str | os.PathLike) -> Perceptual:
    """Reads the network `name` from the files of its authors, as they are or turned into safetensors.

    Args:
      folder: holds convnext_small-0c510722 and, for LPIPS, vgg16-397923af and lpips_vgg, each .pth or .safetensors.

    Raises:
      ValueError: an unknown name.
      FileNotFoundError: a file is absent; the message says which, where it comes from and what to set.
      WeightsError: a file is damaged or of another model.
    """
    config = PerceptualConfig(name)
    table, abstract = convert.table_for(config), models.abstract(config)[1]
    lpips, convnext = config.weights
    with contextlib.ExitStack() as stack:

        def open_file(file: _File):
            candidates = [Path(folder) / (file.stem + ending) for ending in (".safetensors", ".pth")] if folder else []
            path = next((c for c in candidates if c.is_file()), None)
            if path is None:
                place = (
                    f"{folder} holds neither {candidates[0].name} nor {candidates[1].name}" if folder else "no folder is set"
                )
                raise FileNotFoundError(
                    f"the perceptual loss {name!r} needs {file.stem}.pth, but {place}: download it from {file.url} and set "
                    "--config.perceptual_weights to the folder that holds it (or --config.loss.perceptual=none)"
                )
            return stack.enter_context(weights.open_weights(path)).tensors

        tensors = {}
        if convnext:
            tensors |= {f"convnext.{key}": tensor for key, tensor in open_file(CONVNEXT_FILE).items()}
        if lpips:
            levels = {str(n): f"slice{i + 1}" for i, numbers in enumerate(VGG_LEVELS) for n in numbers}
            for key, tensor in open_file(VGG_FILE).items():
                part, number, *rest = key.split(".")
                if part == "features":  # the rest classifies
                    tensors[".".join(["lpips.net", levels.get(number, "?"), number, *rest])] = tensor
            tensors |= {f"lpips.{key}": tensor for key, tensor in open_file(HEADS_FILE).items()}
        return make_perceptual(name, convert.from_published(table, abstract, tensors, source=str(folder)))
