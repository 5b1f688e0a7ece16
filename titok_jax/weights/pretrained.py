"""Trained models on disk and on the Hugging Face hub, in the published names and layouts.

What is saved here, a folder with `config.json` and `model.safetensors`, loads in the published PyTorch code; what that code
saved loads here, in any of its forms (`titok_jax.weights`). A folder may hold its tokenizer in a sub-folder `tokenizer`; a
generator that we train does, so that it can make images by itself.
"""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from titok_jax import models
from titok_jax.models import MaskgitVQGANConfig, TiTokConfig
from titok_jax.runtime.outputs import new_folder, sha256
from titok_jax.runtime.paths import as_path, is_remote, local_copy
from titok_jax.weights import convert, published_models, safetensors_file, tensor_files
from titok_jax.weights.config_files import (
    CONFIG_FILE,
    TRAINER_FILE,
    WEIGHTS_FILE,
    config_checksum,
    read_config,
    read_config_as,
    write_config,
)
from titok_jax.weights.convert import WeightsError
from titok_jax.weights.hub import check_download, download_file
from titok_jax.weights.known_models import KINDS, abstract_params, buffers, match, published_shapes

_CONFIG_CHECKSUM = "config_crc32"  # in the metadata of weights: of the configuration that they were saved with


class Source(NamedTuple):
    """Where a model's files are.

    Attributes:
      weights: a file that `titok_jax.weights` reads; None if only the configuration was asked for.
      config: a configuration as `config.json`; None: a known model, told by its tensors.
    """

    weights: Path | None
    config: Path | None


def locate(
    source: str | os.PathLike,
    kind: type | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    config_only: bool = False,
) -> Source:
    """Finds a model's files, and downloads them if they are on the hub and not in its cache.

    Args:
      source: a name of `titok_jax.zoo`, "hf://owner/name" or "hf://owner/name@revision", a folder or a file of weights; in a
        bucket it is copied, once per process. A `Path` is always a path.
      kind: the configuration class of what is wanted. Of a TiTokConfig, a generator's folder gives the tokenizer in it.
      revision: branch, tag or commit, of what is on the hub.
      token: for the hub; by default the one that `hf auth login` or HF_TOKEN set.
      config_only: download no weights.

    Raises:
      ValueError: an unknown name, a revision of something that is not on the hub, or two revisions.
      FileNotFoundError: a folder that holds no model.
      DownloadError: the hub does not give the files, and they are not in its cache.
      WeightsError: the configuration in the cache is damaged.
    """
    if is_remote(source):
        source = _local_model(as_path(source))
    found = published_models.find(source, KINDS.get(kind)) if isinstance(source, str) else Path(source)
    on_hub = isinstance(found, str) or (isinstance(found, published_models.Model) and found.folder is None)
    if on_hub:
        known = isinstance(found, published_models.Model)
        repository, file = (found.repository, found.file) if known else (found, WEIGHTS_FILE)
        repository, _, named = repository.partition("@")
        if named and revision not in (None, named):
            raise ValueError(f"revision {revision!r} given, but {source} names another")
        revision = named or revision
        download = functools.partial(download_file, repository, revision=revision, token=token)
        config = download(CONFIG_FILE) if file == WEIGHTS_FILE else None
        if config is not None:
            check_download(config)
        return Source(None if config_only and config else download(file), config)
    if revision is not None:
        raise ValueError(f"revision {revision!r} given, but {source} is not on the hub")
    path = found.folder if isinstance(found, published_models.Model) else found
    if path.is_file():
        beside = path.with_name(CONFIG_FILE) if path.name in (WEIGHTS_FILE, TRAINER_FILE) else path.with_suffix(".json")
        return Source(path, beside if beside.is_file() else None)
    if not path.is_dir():
        kept = next(path.absolute().parent.glob(f".{path.name}.old-*"), None) if path.name else None
        hint = f"; a save was killed; what was there before is {kept}" if kept else ""
        raise FileNotFoundError(f"{path} is not a folder or file{hint}")
    if kind is TiTokConfig and (path / "tokenizer").is_dir():
        path = path / "tokenizer"
    config = path / CONFIG_FILE
    files = [path / name for name in (WEIGHTS_FILE, TRAINER_FILE) if (path / name).is_file()]
    if not files and not config.is_file():
        inside = [child for child in ("ema_model", "unwrapped_model") if (path / child / TRAINER_FILE).is_file()]
        hint = f"; there is one in {' and one in '.join(inside)}" if inside else ""
        raise FileNotFoundError(f"{path} is not a model folder: it holds no {CONFIG_FILE} or {TRAINER_FILE}{hint}")
    if not files and not config_only:
        raise FileNotFoundError(f"{path} holds no {WEIGHTS_FILE} or {TRAINER_FILE}")
    return Source(files[0] if files else None, config if config.is_file() else None)


def _local_model(source: epath.Path) -> Path:
    """A model folder or file of weights in a bucket -> a copy of what `locate` may read of it."""
    if source.is_file():
        beside = {source.with_name(CONFIG_FILE), source.with_suffix(".json")}
        for path in beside:
            if path.is_file():
                local_copy(path)
        return local_copy(source)
    if not (source / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{source} is no model folder: it has no {CONFIG_FILE}")
    for path in (source / "tokenizer" / WEIGHTS_FILE, source / "tokenizer" / CONFIG_FILE, source / WEIGHTS_FILE):
        if path.is_file():
            local_copy(path)
    return local_copy(source / CONFIG_FILE).parent


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
      kind: TiTokConfig, GeneratorConfig or MaskgitVQGANConfig: what is to be read.
      place: (path, array) -> array on its device or devices. It gets one whole parameter at a time, and no other copy of
        the weights is held. (A PyTorch file from before PyTorch 1.6 is: it is read whole.)

    Returns:
      The configuration and the parameters as a nested dict of float32 arrays.

    Raises:
      WeightsError: a file is damaged or does not fit; the message lists every difference.
      ValueError, FileNotFoundError, DownloadError: as in `locate`.
    """
    files = locate(source, kind, revision=revision, token=token)
    config = None if files.config is None else read_config_as(files.config, kind)
    check_config(files)
    with ThreadPoolExecutor(1) as pool, open_model(files.weights, kind, config) as (config, tensors):
        intact = pool.submit(check_download, files.weights)  # takes as long as reading, so it goes on beside it
        table, source = convert.table_for(config), str(files.weights)
        params = convert.from_published(table, abstract_params(config), tensors, source=source, place=place)
        intact.result()
        return config, params


def load_config(
    source: str | os.PathLike, kind: type, *, revision: str | None = None, token: str | None = None
) -> models.Config:
    """The configuration of what `load` loads, errors as there. Reads no weights; of a file without a configuration beside it
    the names and shapes."""
    files = locate(source, kind, revision=revision, token=token, config_only=True)
    if files.config is not None:
        return read_config_as(files.config, kind)
    with open_model(files.weights, kind, None) as (config, _):
        return config


def tokenizer_kind(source: str | os.PathLike, *, revision: str | None = None, token: str | None = None) -> type:
    """TiTokConfig or MaskgitVQGANConfig: which tokenizer of images a source is, for `load` and `load_config`. Reads no
    weights; errors as there."""
    found = published_models.find(source) if isinstance(source, str) else None
    if isinstance(found, published_models.Model):
        return MaskgitVQGANConfig if found.kind == KINDS[MaskgitVQGANConfig] else TiTokConfig
    files = locate(source, TiTokConfig, revision=revision, token=token, config_only=True)
    if files.config is not None:
        model = read_config(files.config).get("model")
        return MaskgitVQGANConfig if isinstance(model, dict) and "maskgit_vqgan" in model else TiTokConfig
    with open_model(files.weights, None, None) as (config, _):
        return MaskgitVQGANConfig if isinstance(config, MaskgitVQGANConfig) else TiTokConfig


@contextlib.contextmanager
def open_model(
    path: Path, kind: type | None, config: models.Config | None
) -> Iterator[tuple[models.Config, dict[str, Any]]]:
    """Opens a file of weights as a model.

    Args:
      kind: what it must be, None if anything known will do.
      config: its configuration; None: that of the known model which has these tensors.

    Yields:
      The configuration, and {published name: tensor in the published layout, read on use}: the parameters, all of them and
      nothing else.

    Raises:
      WeightsError: damaged, misfit, or no known model; the message lists every difference or the candidates.
    """
    with tensor_files.open_weights(path) as (format, tensors):
        if format == "flax":
            config = config or MaskgitVQGANConfig()
            if kind not in (None, MaskgitVQGANConfig) or not isinstance(config, MaskgitVQGANConfig):
                raise WeightsError(f"{path} is a Flax checkpoint; of these only the MaskGIT-VQGAN's is read")
            tensors = _from_jax_vqgan(tensors, config, str(path))
        if config is None:
            config = match(tensors, kind, source=str(path))
            saved_with = tensor_files.safetensors_metadata(path).get(_CONFIG_CHECKSUM)
            if saved_with is not None and config_checksum(config.to_published()) != saved_with:
                raise WeightsError(f"{path} was saved with a configuration that is not beside it: put it there")
        optional = buffers(config)
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
    """The original JAX MaskGIT-VQGAN's tensors under their published PyTorch names, none of them read."""
    tensors = {path.removeprefix("params/"): tensor for path, tensor in tensors.items()}
    names = convert.jax_vqgan_names(config)
    problems = [f"missing: {path}" for path in names if path not in tensors]
    problems += [f"surplus: {path}" for path in tensors if path not in names]
    if problems:
        raise WeightsError(f"{source}: {len(problems)} arrays are not a JAX MaskGIT-VQGAN's:\n  " + "\n  ".join(problems))
    return {
        name: _Transposed(tensors[path], (3, 2, 0, 1)) if len(tensors[path].shape) == 4 else tensors[path]
        for path, name in names.items()
    }


def check_config(files: Source) -> None:
    """Raises WeightsError unless the configuration file is the one that the weights were saved with, where they tell: what
    is saved here holds its checksum, as most of a configuration no tensor's shape would betray."""
    saved_with = tensor_files.safetensors_metadata(files.weights).get(_CONFIG_CHECKSUM)
    if None in (saved_with, files.config):
        return
    if config_checksum(json.loads(files.config.read_text(encoding="utf-8"))) != saved_with:
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
    """Writes a model folder; it is complete or absent, also when the process is killed (`cli.new_folder` says the rest).
    In a bucket nothing can be renamed at once: there the configuration, without which a folder is no model, comes last.

    Args:
      folder: where, also "gs://"; its parent is made if need be.
      config, params: the model; params as a nested dict of arrays.
      tokenizer: written into the sub-folder `tokenizer`.
      overwrite: replace an existing folder.

    Raises:
      FileExistsError: the folder exists and `overwrite` is not set, or it holds more than a model.
      WeightsError: the parameters are not those of the configuration.
    """
    folder = as_path(folder) if is_remote(folder) else Path(folder).absolute()
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists; remove it, choose another, or allow overwriting")
    if folder.is_dir():
        foreign = sorted({path.name for path in folder.iterdir()} - {CONFIG_FILE, WEIGHTS_FILE, "tokenizer"})
        if foreign:
            raise FileExistsError(f"{folder} holds other files ({foreign[0]}) and is not replaced; move them away")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder, last=CONFIG_FILE) as partial:
        _write(partial, config, params)
        if tokenizer is not None:
            (partial / "tokenizer").mkdir()
            _write(partial / "tokenizer", *tokenizer)
    return folder


def _write(folder: Path, config: models.Config, params: convert.Params) -> None:
    tensors = convert.to_published(convert.table_for(config), params)
    convert.check_shapes(published_shapes(config), {name: tensor.shape for name, tensor in tensors.items()}, "to be saved")
    write_weights(folder / WEIGHTS_FILE, tensors, config)
    write_config(folder / CONFIG_FILE, config)


def write_weights(path: Path, tensors: Mapping[str, Any], config: models.Config) -> None:
    """Writes {published name: tensor} as safetensors that know their configuration. Returns when they are on the disk."""
    safetensors_file.write_safetensors(path, tensors, {_CONFIG_CHECKSUM: config_checksum(config.to_published())})


def weights_sha256(
    generator: str | None, tokenizer: str | None, revision: str | None = None, tokenizer_revision: str | None = None
) -> dict[str, str]:
    """{"generator": ..., "tokenizer": ...}: SHA-256 of the files that `load_generator` and `load_tokenizer` (`load_vqgan`)
    read for these names or folders, of these revisions on the hub; what is None is left out. Errors as there."""
    from titok_jax.models import GeneratorConfig, TiTokConfig

    result = {}
    if generator is not None:
        result["generator"] = sha256(locate(generator, GeneratorConfig, revision=revision).weights)
    if tokenizer is not None:
        kind = tokenizer_kind(tokenizer, revision=tokenizer_revision) if generator is None else TiTokConfig
        result["tokenizer"] = sha256(locate(tokenizer, kind, revision=tokenizer_revision).weights)
    return result
