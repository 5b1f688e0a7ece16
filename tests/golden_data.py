"""Helpers for the golden tests: the seeded weights and inputs of the published code's runs, and the comparison with its
outputs.

tests/golden holds only arrays. They come from runs of the published PyTorch and JAX code in float32 with seeded weights. A
weight depends only on its published name and shape, so any model here can be filled with the same weights. The files use
published layouts (images NCHW). Our arrays are transposed before the comparison.
"""

import json
import pathlib
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from titok_jax.models import tables
from titok_jax.weights import convert

GOLDEN = pathlib.Path(__file__).parent / "golden"
SLICE_SUFFIXES = (".stride", ".shape", ".stats")  # stored beside the slice of a large array, see `compare`


def seeded_array(name: str, shape: tuple[int, ...], salt: str = "") -> np.ndarray:
    """The float32 weight that the golden runs used for the published tensor `name`.

    It is a standard normal w, seeded by the CRC-32 of the name. Codebooks are w, other embeddings are w / 2, norm scales are
    1 + 0.1 w, biases are 0.1 w, and kernels are w divided by the square root of the fan-in.
    """
    w = np.random.default_rng(zlib.crc32((salt + name).encode())).standard_normal(shape).astype(np.float32)
    leaf = name.split(".")[-1]

    def has(*words):
        return any(word in name for word in words)

    if leaf == "running_mean":
        return 0.1 * w
    if leaf == "running_var":
        return 1 + 0.1 * np.abs(w)
    if w.ndim >= 2 and has("embed", "mask_token", "latent_tokens") and not has("patch_embed", "decoder_embed"):
        return w if has("quantize") else 0.5 * w
    if w.ndim <= 1:
        return 1 + 0.1 * w if leaf in ("weight", "gamma", "scale") else 0.1 * w
    return w * np.float32(np.prod(shape[1:]) ** -0.5)


def seeded_weights(shapes: Mapping[str, tuple[int, ...]], prefix: str = "", salt: str = "") -> dict[str, np.ndarray]:
    """{published name: shape} -> {published name: seeded array}. For seeding, `prefix` is put before each name, because
    golden runs seeded some models as part of a larger one, e.g. "discriminator."."""
    return {name: seeded_array(prefix + name, tuple(shape), salt) for name, shape in shapes.items()}


def seeded_params(table: tables.Table, abstract_params: convert.Params, prefix: str = "", salt: str = "") -> convert.Params:
    """A model's parameters (nested dict of numpy arrays) from seeded published weights, loaded like any published file."""
    weights = seeded_weights(convert.published_shapes(table, abstract_params), prefix, salt)
    return convert.from_published(table, abstract_params, weights, source="seeded weights")


def abstract_model(make: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, convert.Params]:
    """(graphdef, nested dict of ShapeDtypeStructs) of the module that `make()` builds, without computing anything."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    return graphdef, nnx.to_pure_dict(state)


def seeded_model(
    make: Callable[[], nnx.Module], table: tables.Table, prefix: str = ""
) -> tuple[nnx.GraphDef, convert.Params]:
    """(graphdef, seeded parameters) of the module that `make()` builds. `nnx.merge(graphdef, params)` is the model."""
    graphdef, abstract = abstract_model(make)
    return graphdef, seeded_params(table, abstract, prefix)


def images(batch: int, size: int, seed: int) -> np.ndarray:
    """The golden inputs: [batch, size, size, 3] float32 in [0, 1], 8x8 blocks with fine noise on them. (The golden files use
    the same pictures as NCHW.)"""
    rng = np.random.default_rng(seed)
    coarse = rng.random((batch, 3, size // 8, size // 8)).repeat(8, axis=2).repeat(8, axis=3)
    fine = rng.random((batch, 3, size, size))
    return np.ascontiguousarray((0.75 * coarse + 0.25 * fine).astype(np.float32).transpose(0, 2, 3, 1))


def nchw(x: Any) -> np.ndarray:
    """[B, H, W, C] -> [B, C, H, W], the layout of the golden files."""
    return np.asarray(x).transpose(0, 3, 1, 2)


def load(path: str) -> dict[str, np.ndarray]:
    """All arrays of an .npz file; `path` is relative to tests/golden, e.g. "tiny/tiny_vae.npz".

    An array that belongs to several files, such as the blocks of a shared encoder, is stored in only one of them. The others
    list it in `stored_elsewhere`: each row has the name, the path of the other file and the name there.
    """
    with np.load(GOLDEN / path) as file:
        arrays = dict(file)
    elsewhere = arrays.pop("stored_elsewhere", np.empty((0, 3), str)).tolist()
    files = {other: load(other) for other in {other for _, other, _ in elsewhere}}
    for name, other, there in elsewhere:
        for suffix in ("", *SLICE_SUFFIXES):
            if there + suffix in files[other]:
                arrays[name + suffix] = files[other][there + suffix]
    return arrays


def load_json(path: str) -> Any:
    """A .json file; `path` is relative to tests/golden."""
    return json.loads((GOLDEN / path).read_text())


def published_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """{published name: shape} of a `.shapes.json` file."""
    return {name: tuple(shape) for name, shape in load_json(path)["tensors"].items()}


def compare(golden: Mapping[str, np.ndarray], name: str, ours: Any, tolerance: float, undetermined: Any = 0.0) -> float:
    """Asserts that `ours`, a whole array in the published layout, equals the golden array `name` within `tolerance`.

    Large golden arrays are stored as strided slices. Beside them are the mean, the population standard deviation and the
    largest magnitude of the whole array (`.stride`, `.shape`, `.stats`). Both are checked. `tolerance` is relative to the
    largest magnitude. If no element is off by more, none of the three statistics can be.

    `undetermined`, a number or an array like `ours`, is added to what is allowed: what float32 leaves open there.

    Returns:
      the largest error of the slice, relative to the largest magnitude.
    """
    full = np.asarray(ours, dtype=np.float64)
    open_to = np.broadcast_to(undetermined, full.shape)
    if name + ".flat2d" in golden:
        got, left = (array.reshape(full.shape[0], -1) for array in (full, open_to))
        want, part = golden[name + ".flat2d"], tuple(slice(None, None, max(1, size // 64)) for size in got.shape)
    else:
        got, left = full, open_to
        want, part = golden[name], tuple(slice(None, None, int(step)) for step in golden.get(name + ".stride", ()))
    got, left = got[part], left[part]
    shape = tuple(int(n) for n in golden[name + ".shape"]) if name + ".shape" in golden else None
    assert shape is None or full.shape == shape, f"{name}: shape {full.shape}, expected {shape}"
    assert got.shape == want.shape, f"{name}: shape {got.shape}, expected {want.shape}"
    assert np.isfinite(full).all(), f"{name}: not finite"

    stats = golden.get(name + ".stats")
    largest = float(np.abs(want).max() if stats is None else stats[2])
    difference, allowed = np.abs(got - want) / (largest or 1.0), tolerance + left / (largest or 1.0)
    error = float(difference.max())
    worst = np.unravel_index((difference - allowed).argmax(), difference.shape)
    within(
        difference,
        allowed,
        f"{name}: error {difference[worst]:.2e} of max |x| = {largest:.4g}, allowed {allowed[worst]:.0e}; "
        f"at {tuple(map(int, worst))} of the stored slice {got[worst]:.7g}, expected {want[worst]:.7g}",
    )
    if stats is not None:
        found = np.array([full.mean(), full.std(), np.abs(full).max()])
        within(
            found - stats,
            tolerance * largest + np.array([open_to.mean(), np.sqrt(np.square(open_to).mean()), open_to.max()]),
            f"{name}: the slice agrees, but (mean, std, max) of the whole are {found}, "
            f"expected {stats}, tolerance {tolerance:.0e}",
        )
    return error


def within(difference: Any, allowed: Any, label: str) -> None:
    """Asserts that the absolute value of each element of `difference` is at most `allowed`, a number or an array.

    All comparisons with bounds go through this function, except `np.testing.assert_allclose`. margins.py records both.
    """
    assert (np.abs(difference) <= allowed).all(), label
