"""Configurations of models as files, in the published form."""

import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titok_jax import models
from titok_jax.weights.convert import WeightsError

# The files of a model folder.
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TRAINER_FILE = "pytorch_model.bin"  # what the published trainer calls its weights


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


def config_checksum(config: Mapping[str, Any]) -> str:
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


def write_config(path: Path, config: models.Config) -> None:
    """Writes a configuration in its published form. Returns when it is on the disk."""
    with open(path, "wb") as file:
        file.write(json.dumps(config.to_published(), indent=4).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
