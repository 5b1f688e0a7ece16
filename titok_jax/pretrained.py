"""Trained models on disk and on the Hugging Face hub, in the published names and layouts.

What is saved here, a folder with `config.json` and `model.safetensors`, loads in the published PyTorch code; what that code
saved loads here, in any of its forms (`titok_jax.weights`). A folder may hold its tokenizer in a sub-folder `tokenizer`; a
generator that we train does, so that it can make images by itself.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from titok_jax import convert, models, weights, zoo
from titok_jax.cli import new_folder
from titok_jax.convert import WeightsError
from titok_jax.models import DiscriminatorConfig, GeneratorConfig, InceptionConfig, MaskgitVQGANConfig, TiTokConfig
from titok_jax.storage import as_path, is_remote, local_copy

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TRAINER_FILE = "pytorch_model.bin"  # what the published trainer calls its weights
_CONFIG_CHECKSUM = "config_crc32"  # in the metadata of weights: of the configuration that they were saved with

_KINDS = {
    TiTokConfig: "tokenizer",
    GeneratorConfig: "generator",
    MaskgitVQGANConfig: "vqgan",
    DiscriminatorConfig: "discriminator",
    InceptionConfig: "inception",
}


class DownloadError(OSError):
    """Something that the hub did not give; the message says what to do."""


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
    found = zoo.find(source, _KINDS.get(kind)) if isinstance(source, str) else Path(source)
    on_hub = isinstance(found, str) or (isinstance(found, zoo.Model) and found.folder is None)
    if on_hub:
        known = isinstance(found, zoo.Model)
        repository, file = (found.repository, found.file) if known else (found, WEIGHTS_FILE)
        repository, _, named = repository.partition("@")
        if named and revision not in (None, named):
            raise ValueError(f"revision {revision!r} given, but {source} names another")
        revision = named or revision
        download = functools.partial(_download, repository, revision=revision, token=token)
        config = download(CONFIG_FILE) if file == WEIGHTS_FILE else None
        if config is not None:
            check_download(config)
        return Source(None if config_only and config else download(file), config)
    if revision is not None:
        raise ValueError(f"revision {revision!r} given, but {source} is not on the hub")
    path = found.folder if isinstance(found, zoo.Model) else found
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


def _download(repository: str, file: str, *, revision: str | None, token: str | None) -> Path:
    """The path of a hub file in the cache, downloaded if it is not there."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    what = f"{zoo.HUB_PREFIX}{repository}/{file}"
    try:
        return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision, token=token))
    except errors.RevisionNotFoundError:
        message = f"there is no revision {revision!r} of it; give a branch, a tag or a commit of that repository"
    except errors.RemoteEntryNotFoundError:
        message = "the repository does not hold this file; is it a model of another kind?"
    except errors.RepositoryNotFoundError as error:
        status = error.response.status_code
        message = (
            f"the hub denies it (status {status}): the repository does not exist, or your token does not give access; check "
            "the name, and log in with `hf auth login` or set HF_TOKEN"
        )
    except errors.LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            message = f"it is not in the cache {constants.HF_HUB_CACHE} and HF_HUB_OFFLINE is set; unset it to download"
        else:
            reason = error.__cause__ or error
            message = f"{constants.ENDPOINT} does not give it ({_first_line(reason)}) and it is not in the cache"
    except Exception as error:  # of the libraries below: HTTP statuses, broken connections, full disks, bad repository names
        message = _first_line(error)
    raise DownloadError(f"cannot download {what}: {message}")


def check_download(path: Path) -> None:
    """Raises WeightsError if a file in the hub's cache is not what the hub sent: its name there is its checksum, SHA-256 or,
    of a small file, git's. Any other file passes."""
    blob = Path(os.path.realpath(path))
    if blob.parent.name != "blobs" or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
        return
    with open(blob, "rb") as file:
        if len(blob.name) == 64:
            checksum = hashlib.file_digest(file, "sha256")
        else:
            checksum = hashlib.sha1(b"blob %d\0" % blob.stat().st_size + file.read())
    if checksum.hexdigest() != blob.name:
        raise WeightsError(f"{path} is damaged: it is not what the hub sent; remove {blob} to download it again")


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


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
        params = convert.from_published(table, _abstract(config), tensors, source=source, place=place)
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
    found = zoo.find(source) if isinstance(source, str) else None
    if isinstance(found, zoo.Model):
        return MaskgitVQGANConfig if found.kind == _KINDS[MaskgitVQGANConfig] else TiTokConfig
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
    with weights.open_weights(path) as (form, tensors):
        if form == "flax":
            config = config or MaskgitVQGANConfig()
            if kind not in (None, MaskgitVQGANConfig) or not isinstance(config, MaskgitVQGANConfig):
                raise WeightsError(f"{path} is a Flax checkpoint; of these only the MaskGIT-VQGAN's is read")
            tensors = _from_jax_vqgan(tensors, config, str(path))
        if config is None:
            config = match(tensors, kind, source=str(path))
            saved_with = weights.safetensors_metadata(path).get(_CONFIG_CHECKSUM)
            if saved_with is not None and _checksum(config.to_published()) != saved_with:
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


def buffers(config: models.Config) -> dict[str, np.ndarray]:
    """{published name: constant} of what a published file may hold beside the parameters."""
    if isinstance(config, DiscriminatorConfig):
        return convert.discriminator_buffers(config.num_stages)
    if isinstance(config, GeneratorConfig) and config.model_type == "ViT":
        # Only transformers 4.30 and older saved it; the others do not load it.
        return {"model.embeddings.position_ids": np.arange(config.num_tokens + 1)[None]}
    return {}


@functools.lru_cache(maxsize=64)
def published_shapes(config: models.Config) -> dict[str, tuple[int, ...]]:
    """{published name: shape} of a model's parameters."""
    return convert.published_shapes(convert.table_for(config), _abstract(config))


@functools.lru_cache(maxsize=64)
def _abstract(config: models.Config) -> convert.Params:
    """A model's parameters as ShapeDtypeStructs."""
    return models.abstract(config)[1]


def known_configs(kind: type | None = None) -> dict[tuple[str, str], models.Config]:
    """{(kind, name): configuration} of the published models, the tokenizers in the middle of their training among them."""
    configs: dict[tuple[str, str], models.Config] = {}
    for model in zoo.MODELS:
        if model.architecture is None:
            continue
        cls = next(cls for cls, name in _KINDS.items() if name == model.kind)
        config = cls.from_published(model.published_config)
        configs[model.kind, model.name] = config
        if cls is TiTokConfig and config.is_legacy:
            configs[model.kind, f"{model.name}, stage 1"] = dataclasses.replace(config, finetune_decoder=False)
    configs["discriminator", "discriminator"] = DiscriminatorConfig()
    configs["inception", "inception-2015-12-05"] = InceptionConfig()
    return {key: config for key, config in configs.items() if kind is None or key[0] == _KINDS[kind]}


def match(tensors: Mapping[str, Any], kind: type | None, *, source: str) -> models.Config:
    """The known model that has exactly these tensors, by names and shapes.

    Raises:
      WeightsError: there is none; the message says how far off each is, or which model of another kind it is.
    """
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    differences = {}
    for (kind_name, name), config in known_configs().items():
        expected, optional = published_shapes(config), buffers(config)
        given = {n: shape for n, shape in found.items() if n not in optional}
        if given == expected:
            if kind is not None and not isinstance(config, kind):
                raise WeightsError(f"{source} is the {kind_name} {name}, expected a {_KINDS[kind]}")
            return config
        differing = [n for n in given.keys() | expected.keys() if given.get(n) != expected.get(n)]
        differences[f"{kind_name} {name}"] = len(differing), min(differing)
    closest = sorted(differences.items(), key=lambda item: item[1])[:5]
    raise WeightsError(
        f"{source}: there is no configuration beside it, and its {len(found)} tensors are those of no known model. Put one "
        f"beside it: named {CONFIG_FILE} for a {WEIGHTS_FILE} or {TRAINER_FILE}, else like the file with the ending .json. "
        "The closest known models are:"
        + "".join(f"\n  {name}: {count} tensors differ, the first is {first}" for name, (count, first) in closest)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Configurations


def read_config_as(path: Path, kind: type) -> models.Config:
    """Reads a configuration file as a `kind`.

    Raises:
      WeightsError: not JSON, another kind of configuration, or one that cannot be.
    """
    return kind_from_json(read_config(path), kind, source=str(path))


def read_config(path: Path) -> dict[str, Any]:
    """The contents of a configuration file, interpolations resolved; errors as in `read_config_as`."""
    if path.stat().st_size > 10_000_000:
        raise WeightsError(f"{path} is not a configuration: it has {path.stat().st_size} bytes")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise WeightsError(f"{path}: expected a JSON object, found {type(config).__name__}")
        return resolve_interpolations(config, source=str(path))
    except WeightsError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: bad UTF-8, bad JSON, a number of 5,000 digits
        raise WeightsError(f"{path} is not valid JSON: {error}") from None


def kind_from_json(config: Mapping[str, Any], kind: type, *, source: str) -> models.Config:
    """A configuration dataclass from the published JSON form; `source` names it in errors."""
    try:
        return kind.from_published(config)
    except ValueError as error:
        raise WeightsError(f"{source}: {error}") from None


def check_config(files: Source) -> None:
    """Raises WeightsError unless the configuration file is the one that the weights were saved with, where they tell: what
    is saved here holds its checksum, as most of a configuration no tensor's shape would betray."""
    saved_with = weights.safetensors_metadata(files.weights).get(_CONFIG_CHECKSUM)
    if None in (saved_with, files.config):
        return
    if _checksum(json.loads(files.config.read_text(encoding="utf-8"))) != saved_with:
        raise WeightsError(
            f"{files.config} is not the configuration that {files.weights.name} was saved with: restore it (for other "
            "settings, save the model with them)"
        )


def _checksum(config: Mapping[str, Any]) -> str:
    """Of a configuration as JSON, however it is written."""
    return f"{zlib.crc32(json.dumps(config, sort_keys=True).encode()):08x}"


def resolve_interpolations(config: dict[str, Any], *, source: str) -> dict[str, Any]:
    """Replaces every string `${a.b.c}` (OmegaConf) by the value at that path of the same configuration.

    Raises:
      WeightsError: for a reference to nothing, to more than a single value, or in a circle.
    """

    def resolve(value: Any, depth: int = 0) -> Any:
        if isinstance(value, dict):
            return {key: resolve(item, depth) for key, item in value.items()}
        if isinstance(value, list):
            return [resolve(item, depth) for item in value]
        if not isinstance(value, str) or "${" not in value:
            return value
        match = re.fullmatch(r"\$\{([\w.]+)\}", value)
        target: Any = config
        for key in match.group(1).split(".") if match else ():
            target = target.get(key) if isinstance(target, dict) else None
        if match is None or target is None or isinstance(target, dict | list) or depth > 10:
            raise WeightsError(
                f"{source}: cannot resolve {value!r}; expected ${{a.b.c}}, the path of a single value in this file"
            )
        return resolve(target, depth + 1)

    return resolve(config)


# ---------------------------------------------------------------------------------------------------------------------
# Saving


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
    weights.write_safetensors(path, tensors, {_CONFIG_CHECKSUM: _checksum(config.to_published())})


def write_config(path: Path, config: models.Config) -> None:
    """Writes a configuration in its published form. Returns when it is on the disk."""
    with open(path, "wb") as file:
        file.write(json.dumps(config.to_published(), indent=4).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
