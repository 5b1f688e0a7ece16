"""Loading and saving of trained models, on disk and on the Hugging Face hub, with the published names and layouts.

A model is saved as a folder with `config.json` and `model.safetensors`, which the published PyTorch code can load. Models
that the published code saved can be loaded here, in all of its formats (`titok_jax.weights`). A generator's folder may hold
its tokenizer in the sub-folder `tokenizer`. The generators that we train have one, so they can make images on their own.
"""

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from titok_jax import models
from titok_jax.models import GeneratorConfig, MaskgitVQGANConfig, TiTokConfig, tables
from titok_jax.runtime.outputs import find_foreign, moved_aside, new_folder
from titok_jax.runtime.paths import HUB_PREFIX, as_path, is_remote, local_copy
from titok_jax.weights import convert, published_models, safetensors_file, tensor_files
from titok_jax.weights.config_files import (
    CHECKSUMS,
    CONFIG_FILE,
    NETWORK_CHECKSUM,
    TOKENIZER_FOLDER,
    TRAINER_FILE,
    WEIGHTS_FILE,
    config_json,
    is_config_of,
    network_checksum,
    read_config,
    read_config_as,
    write_config,
)
from titok_jax.weights.convert import WeightsError
from titok_jax.weights.hub import DownloadError, Repository, check_download, weights_checksum
from titok_jax.weights.known_models import match, published_shapes

# The files of a model folder that is written here, as a regular expression.
FOLDER_FILES = rf"({TOKENIZER_FOLDER}/)?({re.escape(CONFIG_FILE)}|{re.escape(WEIGHTS_FILE)})"
TRAINER_MODELS = ("ema_model", "unwrapped_model")  # in a checkpoint folder of the published trainer, the best first


class Source(NamedTuple):
    """The files of a model.

    Attributes:
      weights: a file in a format that `titok_jax.weights` reads; None if only the configuration was requested.
      config: a configuration file in the format of `config.json`; None if there is none, so that the model must be a known
        one and is recognised by its tensors.
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
    """Finds a model's files. Downloads them if they are on the hub and not in its cache.

    All files from the hub are of one commit.

    Args:
      source: a name in `titok_jax.zoo`, "hf://owner/name", "hf://owner/name@revision", "hf://owner/name/FILE", a model
        folder, a checkpoint folder of the published trainer (its averaged weights), or a weights file. Files in a bucket are
        copied once per process. A `Path` is always a path.
      kind: configuration class of the wanted model. With TiTokConfig, a generator's folder or repository gives the tokenizer
        inside it.
      revision: branch, tag or commit of a model on the hub.
      token: access token for the hub (default: the one set by `hf auth login` or HF_TOKEN).
      config_only: download no weights.

    Raises:
      ValueError: an unknown name, a revision for a model that is not on the hub, two different revisions, or a text that
        cannot be a revision.
      FileNotFoundError: a folder that holds no model, or a generator's repository that holds no tokenizer.
      DownloadError: the hub does not provide the files, and they are not in its cache.
      WeightsError: the configuration in the cache is damaged.
    """
    if is_remote(source):
        source = _local_model(as_path(source))
    found = published_models.find(source, _kind_name(kind)) if isinstance(source, str) else Path(source)
    if _on_hub(found):
        return _locate_on_hub(found, kind, str(source), revision, token, config_only)[0]
    if revision is not None:
        raise ValueError(f"revision {revision!r} given, but {source} is not on the hub")
    path = found.folder if isinstance(found, published_models.Model) else found
    if path.is_file():
        beside = path.with_name(CONFIG_FILE) if path.name in (WEIGHTS_FILE, TRAINER_FILE) else path.with_suffix(".json")
        return Source(path, beside if beside.is_file() else None)
    if not path.is_dir():
        kept = moved_aside(path.absolute()) if path.name else None
        hint = f"; a save was killed; what was there before is {kept}" if kept else ""
        raise FileNotFoundError(f"{path} is not a folder or file{hint}")
    if kind is TiTokConfig and (path / TOKENIZER_FOLDER).is_dir():
        path = path / TOKENIZER_FOLDER
    path = _in_checkpoint(path)
    config = path / CONFIG_FILE
    files = [path / name for name in (WEIGHTS_FILE, TRAINER_FILE) if (path / name).is_file()]
    if not files and not config.is_file():
        raise FileNotFoundError(f"{path} is not a model folder: it holds no {CONFIG_FILE} or {TRAINER_FILE}")
    if not files and not config_only:
        raise FileNotFoundError(f"{path} holds no {WEIGHTS_FILE} or {TRAINER_FILE}")
    return Source(files[0] if files else None, config if config.is_file() else None)


def _in_checkpoint(path: Path) -> Path:
    """The model in a checkpoint folder of the published trainer, the averaged one if it is there; the folder itself if it is
    not one. Says what it takes, since the folder holds other weights too."""
    names = [name for name in TRAINER_MODELS if any((path / name / f).is_file() for f in (WEIGHTS_FILE, TRAINER_FILE))]
    if not names:
        return path
    others = f"; for the weights without averaging name {path / names[1]}" if len(names) > 1 else ""
    logging.getLogger(__name__).warning("%s is a checkpoint of the published trainer: taking %s%s", path, names[0], others)
    return path / names[0]


def _kind_name(kind: type | None) -> str | None:
    """The kind under which a class of configurations has names; None for others, whose models have no names."""
    name = None if kind is None else models.family_for(kind).name
    return name if name in published_models.KINDS else None


def _on_hub(found: published_models.Model | os.PathLike | str) -> bool:
    """Whether what `published_models.find` returned is on the hub."""
    return found.folder is None if isinstance(found, published_models.Model) else isinstance(found, str)


def _locate_on_hub(
    found: published_models.Model | str,
    kind: type | None,
    source: str,
    revision: str | None,
    token: str | None,
    config_only: bool,
) -> tuple[Source, str | None]:
    """The part of `locate` that reads from the hub: the files, all of one commit, and that commit.

    The configuration comes first. It says whether the repository holds a generator, with its tokenizer in a sub-folder.
    """
    known = isinstance(found, published_models.Model)
    name, _, named = (found.repository if known else found).partition("@")
    owner, name, *file = name.split("/", 2)
    name, file = f"{owner}/{name}", "".join(file)
    if revision is not None:
        published_models.check_revision(revision)
        if named and revision != named:
            raise ValueError(f"revision {revision!r} given, but {source} names another")
    repository = Repository(name, named or revision, token)
    file = found.file if known else file
    if file not in ("", WEIGHTS_FILE):
        return Source(repository.download(file), None), repository.revision
    folder, config = "", repository.download(CONFIG_FILE)
    check_download(config)
    if kind is TiTokConfig and not known and "generator" in _model_section(config):
        folder = f"{TOKENIZER_FOLDER}/"
        try:
            config = repository.download(folder + CONFIG_FILE)
        except DownloadError as error:
            if not error.not_held:
                raise
            raise FileNotFoundError(
                f"{source} holds no sub-folder {TOKENIZER_FOLDER}: name the tokenizer of this generator"
            ) from None
        check_download(config)
    weights = None if config_only else repository.download(folder + WEIGHTS_FILE)
    return Source(weights, config), repository.revision


def pin(
    source: str | os.PathLike, kind: type, *, revision: str | None = None, token: str | None = None
) -> tuple[str | os.PathLike, str | None]:
    """Fixes the commit of a model on the hub, so that several calls read the files of one commit.

    Args:
      As in `locate`. Downloads the configuration.

    Returns:
      (source, revision) with the commit in place of a branch, of a tag or of no revision. The arguments if the model is not
      on the hub. Errors as in `locate`.
    """
    if (
        is_remote(source)
        or not isinstance(source, str)
        or not _on_hub(found := published_models.find(source, _kind_name(kind)))
    ):
        return source, revision
    _, commit = _locate_on_hub(found, kind, str(source), revision, token, config_only=True)
    if isinstance(found, published_models.Model):
        return source, commit
    return HUB_PREFIX + found.partition("@")[0] + (f"@{commit}" if commit else ""), None


def pin_pair(
    source: str | os.PathLike,
    tokenizer: str | os.PathLike | None = None,
    *,
    revision: str | None = None,
    tokenizer_revision: str | None = None,
    token: str | None = None,
) -> tuple[tuple[str | os.PathLike, str | os.PathLike | None], dict[str, str | None]]:
    """`pin` for a generator and its tokenizer.

    Returns:
      (source, tokenizer) and the two revisions by name. If a generator's repository brings the tokenizer, that is named too.

    Raises:
      ValueError: as `locate`, and for another revision of a tokenizer that is in its generator's repository.
      DownloadError, WeightsError: as `locate`.
    """
    named = tokenizer_revision in (None, revision)
    source, revision = pin(source, GeneratorConfig, revision=revision, token=token)
    if tokenizer is None and isinstance(source, str) and source.startswith(HUB_PREFIX):
        if not named:
            raise ValueError(
                f"tokenizer revision {tokenizer_revision!r} given, but the tokenizer is in the repository of its generator"
            )
        tokenizer, tokenizer_revision = source, None
    elif tokenizer is not None:
        tokenizer, tokenizer_revision = pin(tokenizer, TiTokConfig, revision=tokenizer_revision, token=token)
    elif source in published_models.names("tokenizer"):
        _, tokenizer_revision = pin(source, TiTokConfig, revision=tokenizer_revision, token=token)
    return (source, tokenizer), {"revision": revision, "tokenizer_revision": tokenizer_revision}


def _model_section(path: Path) -> Mapping[str, Any]:
    """The section `model` of a configuration file; empty if there is none. Errors as in `read_config`."""
    section = read_config(path).get("model")
    return section if isinstance(section, dict) else {}


def _local_model(source: epath.Path) -> Path:
    """Copies the files that `locate` may read from a model folder or weights file in a bucket. Returns the local path."""
    if source.is_file():
        beside = {source.with_name(CONFIG_FILE), source.with_suffix(".json")}
        for path in beside:
            if path.is_file():
                local_copy(path)
        return local_copy(source)
    if not (source / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{source} is no model folder: it has no {CONFIG_FILE}")
    for path in (source / TOKENIZER_FOLDER / WEIGHTS_FILE, source / TOKENIZER_FOLDER / CONFIG_FILE, source / WEIGHTS_FILE):
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
        intact = pool.submit(check_download, files.weights)  # takes as long as reading, so both run in parallel
        table, source = convert.table_for(config), str(files.weights)
        params = convert.from_published(table, models.abstract(config)[1], tensors, source=source, place=place)
        intact.result()
        return config, params


def load_config(
    source: str | os.PathLike, kind: type, *, revision: str | None = None, token: str | None = None
) -> models.Config:
    """Reads the configuration of the model that `load` would load. Errors as in `load`.

    Reads no weights. For a weights file without a configuration, it reads the names and shapes of the tensors.
    """
    files = locate(source, kind, revision=revision, token=token, config_only=True)
    if files.config is not None:
        return read_config_as(files.config, kind)
    with open_model(files.weights, kind, None) as (config, _):
        return config


def tokenizer_kind(source: str | os.PathLike, *, revision: str | None = None, token: str | None = None) -> type:
    """The class of an image tokenizer's configuration, TiTokConfig or MaskgitVQGANConfig, for `load` and `load_config`.

    Reads no weights. Errors as in those functions.
    """
    found = published_models.find(source) if isinstance(source, str) else None
    if isinstance(found, published_models.Model):
        return MaskgitVQGANConfig if found.kind == models.family_for(MaskgitVQGANConfig).name else TiTokConfig
    files = locate(source, TiTokConfig, revision=revision, token=token, config_only=True)
    if files.config is not None:
        return MaskgitVQGANConfig if "maskgit_vqgan" in _model_section(files.config) else TiTokConfig
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
                raise WeightsError(f"{path} is a Flax checkpoint; of these only the MaskGIT-VQGAN's is read")
            tensors = _from_jax_vqgan(tensors, config, str(path))
        if config is None:
            config = match(tensors, kind, source=str(path))
            metadata = tensor_files.safetensors_metadata(path)
            if metadata.keys() & CHECKSUMS.keys() and not is_config_of(metadata, config_json(config)):
                raise WeightsError(f"{path} was saved with a configuration that is not beside it: put it there")
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
      config, params: the model, with params as a nested dict of arrays.
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
    tensors = convert.to_published(convert.table_for(config), params)
    convert.check_shapes(published_shapes(config), {name: tensor.shape for name, tensor in tensors.items()}, "to be saved")
    write_weights(folder / WEIGHTS_FILE, tensors, config)
    write_config(folder / CONFIG_FILE, config)


def write_weights(path: Path, tensors: Mapping[str, Any], config: models.Config) -> None:
    """Writes {published name: tensor} as safetensors with the checksum of `config`. Returns when the file is on the disk."""
    safetensors_file.write_safetensors(path, tensors, {NETWORK_CHECKSUM: network_checksum(config_json(config))})


def weights_sha256(
    generator: str | None, tokenizer: str | None, revision: str | None = None, tokenizer_revision: str | None = None
) -> dict[str, str]:
    """The SHA-256 of the weights files that `load_generator` and `load_tokenizer` (or `load_vqgan`) read.

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
        result["generator"] = weights_checksum(locate(generator, GeneratorConfig, revision=revision).weights)
    if tokenizer is not None:
        kind = tokenizer_kind(tokenizer, revision=tokenizer_revision) if generator is None else TiTokConfig
        result["tokenizer"] = weights_checksum(locate(tokenizer, kind, revision=tokenizer_revision).weights)
    return result
