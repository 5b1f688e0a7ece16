"""Configuration files of models, in the published format."""

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
TRAINER_FILE = "pytorch_model.bin"  # the weights file of the published trainer
TOKENIZER_FOLDER = "tokenizer"  # of a generator's folder


def read_config_as(path: Path, kind: type) -> models.Config:
    """Reads a configuration file as a configuration of class `kind`.

    Raises:
      WeightsError: the file is not JSON, holds another kind of configuration, or has invalid values.
    """
    return kind_from_json(read_config(path), kind, source=str(path))


def read_config(path: Path) -> dict[str, Any]:
    """Reads a configuration file and resolves its interpolations. Errors as in `read_config_as`."""
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
    """Makes a configuration dataclass from the published JSON format. Errors name `source` as its origin."""
    try:
        return kind.from_published(config)
    except ValueError as error:
        raise WeightsError(f"{source}: {error}") from None


def config_checksum(config: Mapping[str, Any]) -> str:
    """The CRC-32 of a configuration, independent of the order and the formatting of its JSON."""
    return f"{zlib.crc32(json.dumps(config, sort_keys=True).encode()):08x}"


def resolve_interpolations(config: dict[str, Any], *, source: str) -> dict[str, Any]:
    """Replaces every string `${a.b.c}` (OmegaConf) by the value at that path of the same configuration.

    Raises:
      WeightsError: a reference has no target, its target is not a single value, or references are circular.
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
    """Writes a configuration in the published format. Returns when it is on the disk."""
    with open(path, "wb") as file:
        file.write(json.dumps(config.to_published(), indent=4).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
