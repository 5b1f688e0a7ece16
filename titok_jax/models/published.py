"""Reads values of a published configuration. A value of the wrong type or of an implausible size is an error that names
its key."""

import dataclasses
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

from titok_jax.runtime.messages import first_lines, near, shown

# Upper limits, so that a damaged number causes an error and not hours of building a model.
_LARGEST = {"num_layers": 1000, "num_res_blocks": 12, "num_stages": 10, "image_size": 8192, "resolution": 8192}
_LARGEST |= {"num_steps": 10_000}
_LARGEST_NUMBER = 10_000_000
_RATES = ("dropout", "attn_dropout", "class_label_dropout")  # probabilities


def section(config: Any, path: str, what: str) -> dict[str, Any]:
    """A copy of the object at `path` ("model.vq_model") in the configuration of a `what`; ValueError if it is missing."""
    for key in path.split("."):
        config = config.get(key) if isinstance(config, Mapping) else None
    if not isinstance(config, Mapping):
        raise ValueError(f"not a {what} configuration: no {path} in it")
    return dict(config)


def take(values: dict[str, Any], keys: Mapping[str, str], cls: type, where: str) -> dict[str, Any]:
    """Removes fields of the dataclass `cls` from `values` and returns them.

    Args:
      keys: {key in `values`: name of the field}; missing keys are skipped.
      where: path of `values` in the file, for error messages.

    Raises:
      ValueError: for a value of the wrong type or of an implausible size.
    """
    types = {field.name: field.type for field in dataclasses.fields(cls)}
    return {ours: check(f"{where}.{key}", values.pop(key), ours, types[ours]) for key, ours in keys.items() if key in values}


def take_all(values: Any, cls: type, where: str) -> Any:
    """Makes the dataclass `cls` from an object whose keys are its fields. Missing keys have their defaults. Raises the
    errors of `take`, and ValueError for an unknown key."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} is {_shown(values)}, expected an object")
    values, names = dict(values), {field.name: field.name for field in dataclasses.fields(cls)}
    fields = take(values, names, cls, where)
    check_all_taken(values, where, names)
    try:
        return cls(**fields)
    except (TypeError, ValueError) as error:  # TypeError: a field without a default is missing
        raise ValueError(f"{where}: {error}") from None


def check_all_taken(values: Mapping[str, Any], where: str, known: Iterable[str]) -> None:
    """Raises ValueError if `take` has left a key. The message names the nearest one of the `known` keys."""
    if values:
        keys = sorted(map(str, values))
        raise ValueError(
            f"unknown keys in {where}: {', '.join(first_lines([shown(k) for k in keys]))}{near(keys[0], known)}"
        )


def check(key: str, value: Any, field: str, kind: Any) -> Any:
    """Returns the value of a key, with lists as tuples. Raises ValueError unless it is valid for a field of this type."""
    largest = _LARGEST.get(field, _LARGEST_NUMBER)

    def is_size(number: Any) -> bool:
        return type(number) is int and 1 <= number <= largest  # a bool is not a number

    if kind is int:
        expected, good = f"a whole number from 1 to {largest}", is_size(value)
    elif kind is float:
        largest = 1 if field in _RATES else _LARGEST_NUMBER
        expected = f"a number from 0 to {largest}"
        good = type(value) in (int, float) and 0 <= value <= largest
    elif kind is bool:
        expected, good = "true or false", isinstance(value, bool)
    elif kind is str:
        expected, good = "a string", isinstance(value, str)
    else:  # tuple[int, ...]
        expected = f"one to ten whole numbers from 1 to {largest}"
        good = isinstance(value, list | tuple) and 1 <= len(value) <= 10 and all(map(is_size, value))
    if not good:
        raise ValueError(f"{key} is {_shown(value)}, expected {expected}")
    return tuple(value) if isinstance(value, list) else value


def check_fields(config: Any) -> None:
    """Checks the numbers of a configuration when it is made: whole numbers are at least 1, other numbers at least 0, both
    at most what a published configuration may have, probabilities at most 1.

    Raises:
      ValueError: for the first one that is not.
    """
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), field.name
        largest = _LARGEST.get(name, _LARGEST_NUMBER)
        if field.type is int or field.type == tuple[int, ...]:
            several = isinstance(value, tuple)
            whole = [
                not isinstance(number, bool) and hasattr(number, "__index__") for number in (value if several else [value])
            ]
            if not whole or not all(whole) or min(value if several else [value]) < 1:
                expected = "whole numbers" if several else "a whole number"
                raise ValueError(f"{name} is {_shown(value)}, expected {expected} of at least 1")
            if max(value if several else [value]) > largest:
                raise ValueError(f"{name} is {_shown(value)}, expected at most {largest}")
        elif field.type is float:
            largest = 1 if name in _RATES else largest
            if not isinstance(value, numbers.Real) or not 0 <= value <= largest:  # also of NaN
                raise ValueError(f"{name} is {_shown(value)}, expected a number from 0 to {largest}")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else text[:80] + "..."
