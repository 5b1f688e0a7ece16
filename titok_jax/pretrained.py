"""Weights on disk: a folder with `config.json` and `model.safetensors`, in the published names and layouts.

What is saved here loads in the published PyTorch code, what that code saved loads here. A folder may hold its tokenizer
in a sub-folder `tokenizer`; a generator that we train does, so that it can make images by itself.
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from titok_jax import convert, models
from titok_jax.convert import WeightsError
from titok_jax.models import TiTokConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def load(
    folder: str | os.PathLike,
    kind: type,
    *,
    place: Callable[[str, np.ndarray], Any] = lambda path, array: jax.device_put(array),
) -> tuple[models.Config, convert.Params]:
    """Reads a model.

    Args:
      folder: holds `config.json` and `model.safetensors`.
      kind: TiTokConfig or GeneratorConfig: what is to be read from it.
      place: (path, array) -> array on its device or devices.

    Returns:
      The configuration and the parameters as a nested dict of float32 arrays.

    Raises:
      FileNotFoundError: the folder or one of the two files does not exist.
      WeightsError: a file is damaged or does not fit; the message lists every difference.
    """
    config = load_config(folder, kind)
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {WEIGHTS_FILE}")
    _, abstract = models.abstract(config)
    with open_safetensors(path) as weights:
        return config, convert.from_published(convert.table_for(config), abstract, weights, source=str(path), place=place)


def load_config(folder: str | os.PathLike, kind: type) -> models.Config:
    """Reads `config.json` of a model folder as a `kind`; errors as in `load`."""
    return kind_from_json(read_config(folder), kind, source=str(Path(folder) / CONFIG_FILE))


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The contents of `config.json`, interpolations resolved."""
    folder = Path(folder)
    path = folder / CONFIG_FILE
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: it holds no {CONFIG_FILE}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise WeightsError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise WeightsError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return resolve_interpolations(config, source=str(path))


def kind_from_json(config: Mapping[str, Any], kind: type, *, source: str) -> models.Config:
    """A configuration dataclass from the published JSON form; `source` names it in errors."""
    try:
        return kind.from_published(config)
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{source}: {error}") from None


def resolve_interpolations(config: dict[str, Any], *, source: str) -> dict[str, Any]:
    """Replaces every string `${a.b.c}` (OmegaConf) by the value at that path of the same configuration.

    Raises:
      WeightsError: for a reference to nothing, or in a circle.
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
        if match is None or target is None or depth > 10:
            raise WeightsError(f"{source}: cannot resolve {value!r}")
        return resolve(target, depth + 1)

    return resolve(config)


def save(
    folder: str | os.PathLike,
    config: models.Config,
    params: convert.Params,
    *,
    tokenizer: tuple[TiTokConfig, convert.Params] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a model folder; it is complete or absent, also when the process is killed.

    Args:
      folder: where; its parent is made if need be.
      config, params: the model; params as a nested dict of arrays.
      tokenizer: written into the sub-folder `tokenizer`.
      overwrite: replace an existing folder.

    Raises:
      FileExistsError: the folder exists and `overwrite` is not set.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists; remove it, choose another, or allow overwriting")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        _write(partial, config, params)
        if tokenizer is not None:
            (partial / "tokenizer").mkdir()
            _write(partial / "tokenizer", *tokenizer)
        partial.chmod(0o755)
        if folder.exists():
            # Two renames: between them the old folder is whole under another name beside it.
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
            os.replace(folder, old)
            os.replace(partial, folder)
            shutil.rmtree(old)
        else:
            os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def _write(folder: Path, config: models.Config, params: convert.Params) -> None:
    weights = convert.to_published(convert.table_for(config), params)
    text = json.dumps(config.to_published(), indent=4) + "\n"
    for name, data in ((WEIGHTS_FILE, safetensors.numpy.save(weights, {"format": "pt"})), (CONFIG_FILE, text.encode())):
        with open(folder / name, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


class _LazyTensor:
    """One tensor of a safetensors file, read when it becomes an array."""

    def __init__(self, file: Any, name: str):
        self._file, self._name = file, name
        self.shape = tuple(file.get_slice(name).get_shape())

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = self._file.get_tensor(self._name)
        return array if dtype is None else array.astype(dtype)


@contextlib.contextmanager
def open_safetensors(path: str | os.PathLike) -> Iterator[dict[str, _LazyTensor]]:
    """{name: tensor} of a safetensors file, each read on use.

    Raises:
      WeightsError: the file is not a whole safetensors file.
    """
    try:
        file = safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not a whole safetensors file: {error}") from None
    with file:
        yield {name: _LazyTensor(file, name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
