"""Configuration files of models, in the published format."""

import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titok_jax import models
from titok_jax.models.generator import SAMPLING_KEYS
from titok_jax.runtime.messages import shown
from titok_jax.weights import kinds
from titok_jax.weights.convert import WeightsError

# The files of a model folder.
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TRAINER_FILE = "pytorch_model.bin"  # the weights file of the published trainer
INDEX = ".index.json"  # the ending of an index, in place of a weights file that is in several parts
WEIGHTS_FILES = (WEIGHTS_FILE, WEIGHTS_FILE + INDEX, TRAINER_FILE, TRAINER_FILE + INDEX)  # the best first
TOKENIZER_FOLDER = "tokenizer"  # of a generator's folder

YAML = (".yaml", ".yml")  # endings of the published configurations in configs/

_MOST_VALUES = 100_000  # in a configuration; YAML can name one part in many places, and so on in each part

FAMILY_KEY = "family"  # in a config.json: the name of a model family that the published code does not have


def read_config_as(path: Path, kind: type) -> models.Config:
    """Reads a configuration file as a configuration of class `kind`.

    Raises:
      WeightsError: the file is not JSON, holds another kind of configuration, or has invalid values.
    """
    return kind_from_json(read_config(path), kind, source=str(path))


def read_config(path: Path) -> dict[str, Any]:
    """Reads a configuration file, JSON or (by its name) YAML, and resolves its interpolations. Errors as in
    `read_config_as`."""
    if path.stat().st_size > 10_000_000:
        raise WeightsError(f"{path} is not a configuration: it has {path.stat().st_size} bytes")
    try:
        config = _parse(path)
        if not isinstance(config, dict):
            raise WeightsError(f"{path}: expected a JSON object, found {type(config).__name__}")
        return resolve_interpolations(config, source=str(path))
    except WeightsError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: bad UTF-8, bad JSON, a number of 5,000 digits
        raise WeightsError(f"{path} is not valid {'YAML' if path.suffix in YAML else 'JSON'}: {error}") from None


def model_section(path: Path) -> Mapping[str, Any]:
    """The section `model` of a configuration file; empty if there is none. Errors as in `read_config`."""
    section = read_config(path).get("model")
    return section if isinstance(section, dict) else {}


def _parse(path: Path) -> Any:
    if path.suffix not in YAML:
        return json.loads(path.read_text(encoding="utf-8"))
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def kind_from_json(config: Mapping[str, Any], kind: type, *, source: str) -> models.Config:
    """Makes a configuration from the JSON of `config.json`.

    Args:
      config: the JSON. Its entry "family" names a family that was registered (`models.register`); without it, the family is
        the published one of `kind`.
      kind: class of the configuration, or a class that it is derived from.
      source: its origin, for errors.

    Raises:
      WeightsError: it is the configuration of another kind of model, or has invalid values.
    """
    cls, config = kind, dict(config)
    try:
        if FAMILY_KEY in config:
            name = config.pop(FAMILY_KEY)
            cls = models.family_named(name if isinstance(name, str) else repr(name)).config
            if not issubclass(cls, kind):
                found = models.family_for(cls).title
                raise WeightsError(f"{source} is the configuration of {found}; {kinds.belongs(kind)}")
        else:
            kinds.check_config(config, kind, source)
        return cls.from_published(config)
    except WeightsError:
        raise
    except ValueError as error:
        raise WeightsError(f"{source}: {error}") from None


def config_checksum(config: Mapping[str, Any]) -> str:
    """The CRC-32 of a configuration's JSON, independent of its order and formatting."""
    return f"{zlib.crc32(json.dumps(config, sort_keys=True).encode()):08x}"


def network_checksum(config: Mapping[str, Any]) -> str:
    """The CRC-32 of what decides the network in a configuration's JSON: of all but the default sampling settings."""
    model = config.get("model")
    generator = model.get("generator") if isinstance(model, Mapping) else None
    if isinstance(generator, Mapping):
        kept = {key: value for key, value in generator.items() if key not in SAMPLING_KEYS}
        config = {**config, "model": {**model, "generator": kept}}
    return config_checksum(config)


# Keys in the metadata of weights saved here -> the checksum of their configuration. The second is of older files.
NETWORK_CHECKSUM = "network_crc32"
CHECKSUMS = {NETWORK_CHECKSUM: network_checksum, "config_crc32": config_checksum}


def is_config_of(metadata: Mapping[str, str], config: Mapping[str, Any]) -> bool:
    """Whether weights with this metadata were saved with this configuration (JSON). True if the metadata does not tell."""
    return all(checksum(config) == metadata[key] for key, checksum in CHECKSUMS.items() if key in metadata)


def resolve_interpolations(config: dict[str, Any], *, source: str) -> dict[str, Any]:
    """Replaces every string `${a.b.c}` (OmegaConf) by the value at that path of the same configuration.

    Raises:
      WeightsError: a reference has no target, its target is not a single value, or references are circular, or
        there are more than 100,000 values.
    """
    count = 0

    def resolve(value: Any, depth: int = 0) -> Any:
        nonlocal count
        count += 1
        if count > _MOST_VALUES:
            raise WeightsError(f"{source} is not a configuration: it has more than {_MOST_VALUES} values")
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
                f"{source}: cannot resolve '{shown(value)}'; expected ${{a.b.c}}, the path of a single value in this file"
            )
        return resolve(target, depth + 1)

    return resolve(config)


def config_json(config: models.Config) -> dict[str, Any]:
    """A configuration as the JSON of `config.json`, which `kind_from_json` reads."""
    family = models.family_of(config)
    return config.to_published() if family.published else {FAMILY_KEY: family.name, **config.to_published()}


def write_config(path: Path, config: models.Config) -> None:
    """Writes a configuration file. Returns when it is on the disk."""
    with open(path, "wb") as file:
        file.write(json.dumps(config_json(config), indent=4).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
