"""Weights on their way to the devices of several processes and back, without a copy of the whole model in each process."""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from titok_jax.runtime.sharding import replicated, state_shardings


def placer(mesh: Mesh) -> Callable[[str, np.ndarray], jax.Array]:
    """Returns (path, array) -> the sharded array, for reading weights directly onto a mesh. Raises the error of `put`."""

    def place(path: str, array: np.ndarray) -> jax.Array:
        tree = {path: array}
        return put(tree, state_shardings(mesh, tree))[path]

    return place


def put(tree: Any, shardings: Any, what: str = "params") -> Any:
    """Places a tree of arrays in host memory on a mesh: all that puts weights on devices goes through here.

    Each process copies only what its own devices hold. `jax.device_put` would gather every array from all processes of the
    mesh to compare them; here the processes compare checksums (`check_same`).

    Args:
      tree: whole arrays, the same on every process of the mesh.
      shardings: a tree of NamedSharding like `tree`, or one for all arrays. All are on the same mesh.
      what: where the arrays are from, for the error.

    Raises:
      ValueError: as `check_same`.
    """
    if jax.tree.leaves(tree):
        check_same(tree, jax.tree.leaves(shardings)[0].mesh, what)
    return put_checked(tree, shardings)


def put_checked(tree: Any, shardings: Any) -> Any:
    """The same for arrays that all processes have compared before."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)

    def place(leaf, sharding):
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place, tree, shardings)


def check_same(tree: Any, mesh: Mesh, what: str) -> None:
    """Raises ValueError on all processes of a mesh if they do not hold the same arrays, by their CRC-32.

    All processes of the mesh call this together. It does nothing for a mesh of this process alone.

    Args:
      tree: arrays in host memory.
      what: where they are from: "config.init_from (FOLDER)".
    """
    if all(device.process_index == jax.process_index() for device in mesh.devices.flat):
        return
    arrays = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    kinds = "".join(f"{name} {array.dtype} {array.shape}\n" for name, array in arrays.items())
    for names, own in (
        (["names, shapes or dtypes"], [zlib.crc32(kinds.encode())]),
        # Read only if the above are the same, so all processes have as many.
        (list(arrays), (zlib.crc32(np.ascontiguousarray(a).reshape(-1).view(np.uint8)) for a in arrays.values())),
    ):
        seen = _from_all(mesh, np.array(list(own), np.uint32))
        first = mesh.devices.flat[0].process_index
        for process, theirs in seen.items():
            if (theirs != seen[first]).any():
                raise ValueError(
                    f"{what}: process {process} has other weights than process {first} "
                    f"({names[np.flatnonzero(theirs != seen[first])[0]]}), but every host needs the same weights"
                )


def _from_all(mesh: Mesh, own: np.ndarray) -> dict[int, np.ndarray]:
    """{index: the vector `own` of that process} of all processes of a mesh, which pass vectors of one length."""
    devices = mesh.devices.reshape(-1)
    flat = Mesh(devices, ("device",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(flat, PartitionSpec("device"))
    each = jax.make_array_from_callback((len(devices), len(own)), rows, lambda index: own[None])
    return {device.process_index: row for device, row in zip(devices, _whole(each), strict=True)}


def _same(x: jax.Array) -> jax.Array:
    return x


def _replicate(array: jax.Array) -> jax.Array:
    """Gathers a sharded array on every device, unless each has it already. All processes of its mesh call this together."""
    if array.is_fully_replicated:
        return array
    mesh = array.sharding.mesh
    with jax.set_mesh(mesh):
        return jax.block_until_ready(jax.jit(_same, out_shardings=replicated(mesh))(array))


def _whole(array: jax.Array) -> np.ndarray:
    """A sharded array in host memory. If its mesh has several processes, all of them call this together."""
    return np.asarray(array if array.is_fully_addressable else _replicate(array).addressable_data(0))


class _Gathered:
    """An array whose parts come from all processes when numpy reads it."""

    def __init__(self, array: jax.Array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = _whole(self.array)
        return array if dtype is None else array.astype(dtype)


def gathered(tree: Any) -> Any:
    """A tree of sharded arrays as one process writes them to a file: `np.asarray` gathers a leaf from all processes.

    One process reads each leaf once, in the order of `jax.tree.leaves`. Meanwhile the others call `take_part`. So no
    process holds more than one leaf, or two while the next one arrives.
    """
    return jax.tree.map(_Gathered, tree)


def take_part(tree: Any) -> None:
    """Gives this process's parts of a `gathered` tree to the process that reads it, and keeps nothing."""
    for leaf in jax.tree.leaves(tree):
        if not leaf.array.is_fully_addressable:
            _replicate(leaf.array)
