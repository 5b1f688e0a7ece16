"""Conversion between our parameters and the published weights, by the tables of `titok_jax.models.tables`.

Every check is strict: a path without a rule is an error, and so is a published name that is missing, unexpected or has a
wrong shape. One message lists them all. torch is never imported here.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from titok_jax import models
from titok_jax.models import tables
from titok_jax.models.tables import Layout, Table
from titok_jax.runtime.messages import first_lines, shown

Params = dict[str, Any]  # nested dict of arrays (or of ShapeDtypeStructs)


class WeightsError(ValueError):
    """The weights do not fit the model. The message counts the differences, and lists five of each kind."""


def flatten(params: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested dict -> {path: leaf}."""
    flat = {}
    for key, value in params.items():
        path = f"{prefix}{key}"
        flat.update(flatten(value, path + "/") if isinstance(value, Mapping) else {path: value})
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """{path: leaf} -> nested dict."""
    nested: Params = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = nested
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return nested


class _Entry(NamedTuple):
    names: list[tuple[str, ...]]  # the published names per layer; a single entry if not stacked
    layout: Layout
    stacked: bool


def _entry(table: Table, path: str, shape: tuple[int, ...]) -> _Entry:
    for rule in table:
        match = re.fullmatch(rule.pattern, path)
        if match:
            names = rule.names if isinstance(rule.names, tuple) else (rule.names,)
            names = tuple(match.expand(name) for name in names)
            stacked = "{layer}" in names[0]
            layers = range(shape[0] if stacked else 1)
            return _Entry([tuple(n.replace("{layer}", str(i)) for n in names) for i in layers], rule.layout, stacked)
    raise WeightsError(f"no rule gives parameter {path!r} a published name")


def published_names(table: Table, params: Params) -> dict[str, str]:
    """Returns {path: published name}, with the first name if a parameter has several (layers, query/key/value).

    One name is enough for rules by name, such as weight decay: they treat all names of a parameter alike.
    """
    return {path: _entry(table, path, leaf.shape).names[0][0] for path, leaf in flatten(params).items()}


def published_shapes(table: Table, params: Params) -> dict[str, tuple[int, ...]]:
    """Returns {published name: shape in the published layout} for parameters that are arrays or ShapeDtypeStructs."""
    return {name: tensor.shape for name, tensor in published_abstract(table, params).items()}


def published_abstract(table: Table, params: Params) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns {published name: shape and dtype in the published layout} for arrays or ShapeDtypeStructs."""
    abstract = {}
    for path, leaf in flatten(params).items():
        entry = _entry(table, path, leaf.shape)
        one = jax.ShapeDtypeStruct(leaf.shape[1:] if entry.stacked else leaf.shape, leaf.dtype)
        outputs = jax.eval_shape(entry.layout.publish, one)
        for names in entry.names:
            abstract.update({n: jax.ShapeDtypeStruct(o.shape, leaf.dtype) for n, o in zip(names, outputs, strict=True)})
    return abstract


def to_published(table: Table, params: Params) -> dict[str, np.ndarray]:
    """Our parameters -> {published name: array in the published layout}."""
    return dict(publish(table, params))


def publish(table: Table, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (published name, array in the published layout). Reads our parameters one at a time, in their order, by
    `np.asarray`."""
    for path, leaf in flatten(params).items():
        entry = _entry(table, path, leaf.shape)
        array = np.asarray(leaf)
        for names, one in zip(entry.names, array if entry.stacked else [array], strict=True):
            for name, out in zip(names, entry.layout.publish(one), strict=True):
                yield name, np.ascontiguousarray(out)


def check_shapes(expected: Mapping[str, tuple], found: Mapping[str, tuple], source: str) -> None:
    """Raises WeightsError if names are missing or unexpected, or shapes are wrong. The message lists five of each kind."""
    missing = [f"missing: {n} {list(expected[n])}" for n in expected if n not in found]
    surplus = [f"surplus: {shown(n)} {list(found[n])}" for n in found if n not in expected]
    misshapen = [
        f"shape of {n}: {list(found[n])}, expected {list(expected[n])}"
        for n in expected
        if n in found and tuple(found[n]) != tuple(expected[n])
    ]
    if missing or surplus or misshapen:
        lines = [*first_lines(missing, "missing"), *first_lines(surplus, "surplus"), *first_lines(misshapen, "misshapen")]
        raise WeightsError(
            f"{source}: {len(missing) + len(surplus) + len(misshapen)} tensors do not fit the model:\n  "
            + "\n  ".join(lines)
        )


def from_published(
    table: Table,
    abstract: Params,
    weights: Mapping[str, Any],
    *,
    source: str,
    place: Callable[[str, np.ndarray], Any] = lambda path, array: array,
) -> Params:
    """{published name: array} -> our parameters, the exact inverse of `to_published`.

    Args:
      abstract: the model's parameters as arrays or ShapeDtypeStructs, for their shapes and dtypes.
      weights: {published name: value}. A value has `.shape`, and `np.asarray` converts it, so it may be read lazily. Only
        one of our parameters at a time is in memory, beside the results of `place`.
      source: name of the weights in errors (a file name).
      place: (path, array) -> array on its device; the default keeps numpy arrays.

    Raises:
      WeightsError: as `check_shapes`; or the message names the first tensor that is not floating-point or not finite.
    """
    check_shapes(published_shapes(table, abstract), {n: tuple(w.shape) for n, w in weights.items()}, source)
    flat = {
        path: place(path, _gather(_entry(table, path, leaf.shape), leaf, weights, source))
        for path, leaf in flatten(abstract).items()
    }
    return unflatten(flat)


def _gather(entry: _Entry, leaf: Any, weights: Mapping[str, Any], source: str) -> np.ndarray:
    """Makes one of our parameters from its published tensors. The tensors of one layer at a time are in memory beside it."""
    array = np.empty(leaf.shape, leaf.dtype)
    for part, names in zip(array if entry.stacked else [array], entry.names, strict=True):
        with np.errstate(over="ignore"):
            part[...] = entry.layout.load(tuple(_float(weights[name], name, source) for name in names))
        if not np.isfinite(part).all():
            raise WeightsError(
                f"{source}: tensor {' or '.join(names)} holds a NaN, an infinity or a number too large for {leaf.dtype}; "
                "the training that it is from diverged, or the file is damaged"
            )
    return array


def _float(value: Any, name: str, source: str) -> np.ndarray:
    array = np.asarray(value)
    check_float(array.dtype, name, source)
    return array


def check_float(dtype: np.dtype, name: str, source: str) -> None:
    """Raises WeightsError unless a tensor has a floating-point dtype."""
    if dtype.kind != "f" and dtype.name != "bfloat16":
        raise WeightsError(f"{source}: tensor {shown(name)} has dtype {dtype}, expected a floating-point type")


def decay_mask(table: Table, params: Params, exempt: Iterable[str]) -> Params:
    """A mask that is True where weight decay applies.

    The published rule decays a tensor if it has two or more axes in the *published* layout and its published name contains
    none of the `exempt` words.
    """
    shapes = published_shapes(table, params)
    names = published_names(table, params)
    flat = {p: len(shapes[n]) >= 2 and not any(word in n for word in exempt) for p, n in names.items()}
    return unflatten(flat)


def table_for(config: models.Config) -> Table:
    """The table of the model that `config` describes."""
    return models.family_of(config).table(config)


def jax_vqgan_to_published(
    tree: Mapping, *, source: str, config: models.MaskgitVQGANConfig = tables.PUBLISHED_VQGAN
) -> dict[str, np.ndarray]:
    """The original JAX MaskGIT-VQGAN -> {published PyTorch name: array}, for `from_published` (which checks the shapes).

    The returned arrays are views.

    Args:
      tree: nested dict of arrays as in its msgpack checkpoint, `{"params": {"encoder": ...}}`, or its entry `params`. The
        convolutions are HWIO.
      source: name of the checkpoint in errors.

    Raises:
      WeightsError: as `check_jax_vqgan_names`.
    """
    flat = flatten(tree.get("params", tree))
    names = tables.jax_vqgan_names(config)
    check_jax_vqgan_names(names, flat, source)
    arrays = {path: np.asarray(array) for path, array in flat.items()}
    return {name: a.transpose(3, 2, 0, 1) if (a := arrays[path]).ndim == 4 else a for path, name in names.items()}


def check_jax_vqgan_names(expected: Iterable[str], found: Iterable[str], source: str) -> None:
    """Raises WeightsError if paths of the original JAX MaskGIT-VQGAN are missing or unexpected. The message lists five of
    each kind."""
    expected, found = dict.fromkeys(expected), dict.fromkeys(found)
    missing = [f"missing: {path}" for path in expected if path not in found]
    surplus = [f"surplus: {shown(path)}" for path in found if path not in expected]
    if missing or surplus:
        lines = [*first_lines(missing, "missing"), *first_lines(surplus, "surplus")]
        raise WeightsError(
            f"{source}: {len(missing) + len(surplus)} arrays are not a JAX MaskGIT-VQGAN's:\n  " + "\n  ".join(lines)
        )


def published_to_jax_vqgan(
    weights: Mapping[str, Any], *, config: models.MaskgitVQGANConfig = tables.PUBLISHED_VQGAN
) -> Params:
    """The inverse of `jax_vqgan_to_published`: {published name: array} -> `{"params": {"encoder": ...}}`."""
    arrays = {path: np.asarray(weights[name]) for path, name in tables.jax_vqgan_names(config).items()}
    return {"params": unflatten({path: a.transpose(2, 3, 1, 0) if a.ndim == 4 else a for path, a in arrays.items()})}
