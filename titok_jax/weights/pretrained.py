"""Loading and saving of trained models, on disk and on the Hugging Face hub, with the published names and layouts.

A model is saved as a folder with `config.json` and `model.safetensors`, which the published PyTorch code can load. Models
that the published code saved can be loaded here, in all of its formats (`titok_jax.weights`). A generator's folder may hold
its tokenizer in the sub-folder `tokenizer`. The generators that we train have one, so they can make images on their own.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from titok_jax import models
from titok_jax.models import GeneratorConfig, MaskgitVQGANConfig, TiTokConfig, tables
from titok_jax.runtime.outputs import find_foreign, new_folder
from titok_jax.runtime.paths import as_path, is_remote
from titok_jax.weights import convert, kinds, published_models, safetensors_file, tensor_files
from titok_jax.weights.config_files import (
    CHECKSUMS,
    CONFIG_FILE,
    NETWORK_CHECKSUM,
    TOKENIZER_FOLDER,
    WEIGHTS_FILE,
    config_json,
    is_config_of,
    model_section,
    network_checksum,
    read_config,
    read_config_as,
    write_config,
)
from titok_jax.weights.convert import WeightsError
from titok_jax.weights.hub import check_download, weights_checksum
from titok_jax.weights.known_models import match, published_shapes
from titok_jax.weights.model_files import Source, locate

# The files of a model folder that is written here, as a regular expression.
FOLDER_FILES = rf"({TOKENIZER_FOLDER}/)?({re.escape(CONFIG_FILE)}|{re.escape(WEIGHTS_FILE)})"


def load(
    source: str | os.PathLike,
    kind: type,
    *,
    place: Callable[[str, np.ndarray], Any] = lambda path, array: jax.device_put(array),
    revision: str | None = None,
    token: str | None = None,
) -> tuple[models.Config, convert.Params]:
    """Reads a model.

    Args:
      source, revision, token: as in `locate`.
      kind: class of the model to read: TiTokConfig, GeneratorConfig or MaskgitVQGANConfig.
      place: (path, array) -> array on its device or devices. It gets one complete parameter at a time, and no other copy of
        the weights is in memory. (Files from before PyTorch 1.6 are an exception: all of their data is read first.)

    Returns:
      The configuration, and the parameters as a nested dict of float32 arrays.

    Raises:
      WeightsError: a file is damaged, or the weights do not fit the model.
      ValueError, FileNotFoundError, DownloadError: as in `locate`.
    """
    files = locate(source, kind, revision=revision, token=token)
    config = None if files.config is None else read_config_as(files.config, kind)
    check_config(files)
    with ThreadPoolExecutor(1) as pool, open_model(files.weights, kind, config) as (config, tensors):
        intact = pool.submit(check_downloads, files.weights)  # takes as long as reading, so both run in parallel
        table, source = convert.table_for(config), str(files.weights)
        params = convert.from_published(table, models.abstract(config)[1], tensors, source=source, place=place)
        intact.result()
        return config, params


def check_downloads(weights: Path) -> None:
    """`hub.check_download` for a file of weights, or for an index and the files that it names."""
    for path in tensor_files.parts(weights):
        check_download(path)


def load_config(
    source: str | os.PathLike, kind: type, *, revision: str | None = None, token: str | None = None
) -> models.Config:
    """Reads the configuration of the model that `load` would load. Errors as in `load`.

    Reads no weights. For a weights file without a configuration, it reads the names and shapes of the tensors.
    """
    files = locate(source, kind, revision=revision, token=token, config_only=True)
    if files.config is not None:
        config = read_config_as(files.config, kind)
        _check_kind(files, kind)
        return config
    with open_model(files.weights, kind, None) as (config, _):
        return config


def _check_kind(files: Source, kind: type) -> None:
    """Raises WeightsError if the configuration describes several kinds of models, as that of a published training may, and
    the names of the tensors tell of another kind. (Names in a PyTorch file are looked at only when it is loaded.)"""
    if files.weights is None or len(kinds.families_of_config(read_config(files.config))) < 2:
        return
    names = tensor_files.tensor_names(files.weights)
    if names is not None:
        kinds.check_tensors(names, kind, str(files.weights))


def tokenizer_kind(source: str | os.PathLike, *, revision: str | None = None, token: str | None = None) -> type:
    """The class of an image tokenizer's configuration, TiTokConfig or MaskgitVQGANConfig, for `load` and `load_config`.

    Reads no weights. Errors as in those functions.
    """
    found = published_models.find(source) if isinstance(source, str) else None
    if isinstance(found, published_models.Model):
        return MaskgitVQGANConfig if found.kind == models.family_for(MaskgitVQGANConfig).name else TiTokConfig
    files = locate(source, TiTokConfig, revision=revision, token=token, config_only=True)
    if files.config is not None:
        return MaskgitVQGANConfig if "maskgit_vqgan" in model_section(files.config) else TiTokConfig
    with open_model(files.weights, None, None) as (config, _):
        return MaskgitVQGANConfig if isinstance(config, MaskgitVQGANConfig) else TiTokConfig


@contextlib.contextmanager
def open_model(
    path: Path, kind: type | None, config: models.Config | None
) -> Iterator[tuple[models.Config, dict[str, Any]]]:
    """Opens a weights file as a model.

    Args:
      kind: configuration class that the model must have; None accepts every known class.
      config: the model's configuration; None uses that of the known model with these tensors.

    Yields:
      The configuration and {published name: tensor in the published layout}. The dict has exactly the parameters of the
      model, and each tensor is read on use.

    Raises:
      WeightsError: the file is damaged, does not fit the configuration, or is not a known model. The message lists
        differences, or the closest known models.
    """
    with tensor_files.open_weights(path) as (format, tensors):
        if format == "flax":
            config = config or MaskgitVQGANConfig()
            if kind not in (None, MaskgitVQGANConfig) or not isinstance(config, MaskgitVQGANConfig):
                found = kinds.family_of_tensors(tensors)
                what = "of which only the MaskGIT-VQGAN's is read" if found is None else f"of {found.title}"
                raise WeightsError(f"{path} is a Flax checkpoint {what}; {kinds.belongs(kind)}")
            tensors = _from_jax_vqgan(tensors, config, str(path))
        if config is None:
            config = match(tensors, kind, source=str(path))
            metadata = tensor_files.safetensors_metadata(path)
            if metadata.keys() & CHECKSUMS.keys() and not is_config_of(metadata, config_json(config)):
                raise WeightsError(f"{path} was saved with a configuration that is not beside it: put it there")
        elif models.family_of(config).published:
            kinds.check_tensors(tensors.keys(), type(config), str(path))
        optional = models.family_of(config).buffers(config)
        for name in optional.keys() & tensors.keys():
            if not np.array_equal(np.asarray(tensors[name]), optional[name]):
                raise WeightsError(f"{path}: {name} is not the constant that it is in the published models")
        tensors = {name: tensor for name, tensor in tensors.items() if name not in optional}
        convert.check_shapes(published_shapes(config), {name: tensor.shape for name, tensor in tensors.items()}, str(path))
        for name, tensor in tensors.items():
            convert.check_float(tensor.dtype, name, str(path))
        yield config, tensors


class _Transposed:
    """A tensor with its axes in another order, read on use."""

    def __init__(self, tensor: Any, axes: tuple[int, ...]):
        self._tensor, self._axes = tensor, axes
        self.shape, self.dtype = tuple(tensor.shape[axis] for axis in axes), tensor.dtype

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = np.asarray(self._tensor).transpose(self._axes)
        return array if dtype is None else array.astype(dtype)


def _from_jax_vqgan(tensors: Mapping[str, Any], config: MaskgitVQGANConfig, source: str) -> dict[str, Any]:
    """Renames the tensors of the original JAX MaskGIT-VQGAN to the published PyTorch names, without reading them."""
    tensors = {path.removeprefix("params/"): tensor for path, tensor in tensors.items()}
    names = tables.jax_vqgan_names(config)
    convert.check_jax_vqgan_names(names, tensors, source)
    return {
        name: _Transposed(tensors[path], (3, 2, 0, 1)) if len(tensors[path].shape) == 4 else tensors[path]
        for path, name in names.items()
    }


def check_config(files: Source) -> None:
    """Raises WeightsError if the configuration file is not the one that the weights were saved with.

    Weights saved here hold the configuration's checksum, because tensor shapes show little of a configuration. Weights
    without a checksum pass.
    """
    if files.config is None:
        return
    metadata = tensor_files.safetensors_metadata(files.weights)
    if not is_config_of(metadata, json.loads(files.config.read_text(encoding="utf-8"))):
        raise WeightsError(
            f"{files.config} is not the configuration that {files.weights.name} was saved with: restore it (for other "
            "settings, save the model with them)"
        )


def save(
    folder: str | os.PathLike,
    config: models.Config,
    params: convert.Params,
    *,
    tokenizer: tuple[TiTokConfig, convert.Params] | None = None,
    overwrite: bool = False,
) -> Path | epath.Path:
    """Writes a model folder. It is complete or absent, even if the process is killed (see `outputs.new_folder`).

    A folder in a bucket cannot be renamed atomically. There the configuration is written last, because a folder without it
    is not a model.

    Args:
      folder: the folder to write, also "gs://". Its parent is created if it does not exist.
      config, params: the model, with params as a nested dict of arrays. They are read one at a time, in their order.
      tokenizer: a tokenizer to write into the sub-folder `tokenizer`.
      overwrite: replace an existing folder.

    Raises:
      FileExistsError: the folder exists and `overwrite` is not set, or it holds other files than those of a model.
      WeightsError: the parameters do not fit the configuration.
    """
    folder = as_path(folder) if is_remote(folder) else Path(folder).absolute()
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists; remove it, choose another, or allow overwriting")
    foreign = find_foreign(folder, FOLDER_FILES) if folder.is_dir() else None
    if foreign:
        raise FileExistsError(f"{folder} holds other files ({foreign}) and is not replaced; move them away")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder, files=FOLDER_FILES, replace=overwrite, last=CONFIG_FILE) as partial:
        _write(partial, config, params)
        if tokenizer is not None:
            (partial / TOKENIZER_FOLDER).mkdir()
            _write(partial / TOKENIZER_FOLDER, *tokenizer)
    return folder


def _write(folder: Path, config: models.Config, params: convert.Params) -> None:
    table = convert.table_for(config)
    tensors = convert.published_abstract(table, params)
    convert.check_shapes(published_shapes(config), {name: tensor.shape for name, tensor in tensors.items()}, "to be saved")
    write_weights(folder / WEIGHTS_FILE, tensors, config, convert.publish(table, params))
    write_config(folder / CONFIG_FILE, config)


def write_weights(
    path: Path, tensors: Mapping[str, Any], config: models.Config, arrays: Iterable[tuple[str, Any]] | None = None
) -> None:
    """Writes {published name: tensor} as safetensors with the checksum of `config`. Arguments: `write_safetensors`."""
    metadata = {NETWORK_CHECKSUM: network_checksum(config_json(config))}
    safetensors_file.write_safetensors(path, tensors, metadata, arrays)


def weights_sha256(
    generator: str | None, tokenizer: str | None, revision: str | None = None, tokenizer_revision: str | None = None
) -> dict[str, str]:
    """The SHA-256 of the weights (`_checksum`) that `load_generator` and `load_tokenizer` (or `load_vqgan`) read.

    Args:
      generator, tokenizer: names or folders; None is left out.
      revision, tokenizer_revision: their revisions on the hub.

    Returns:
      {"generator": ..., "tokenizer": ...}.

    Raises:
      The errors of `load_generator` and `load_tokenizer`.
    """
    result = {}
    if generator is not None:
        result["generator"] = _checksum(locate(generator, GeneratorConfig, revision=revision).weights)
    if tokenizer is not None:
        kind = tokenizer_kind(tokenizer, revision=tokenizer_revision) if generator is None else TiTokConfig
        result["tokenizer"] = _checksum(locate(tokenizer, kind, revision=tokenizer_revision).weights)
    return result


def _checksum(weights: Path) -> str:
    """The SHA-256 of a file of weights; of an index, that of the lines "FILE SHA-256" of its parts, in the order of their
    names."""
    if not tensor_files.is_index(weights):
        return weights_checksum(weights)
    lines = (f"{path.name} {weights_checksum(path)}\n" for path in sorted(tensor_files.parts(weights)[1:]))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
