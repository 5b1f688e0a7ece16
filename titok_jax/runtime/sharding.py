"""Placement of arrays: one mesh with three axes, and the rules that shard parameters and batches on it.

    data    the model is replicated, and the batch is sharded
    fsdp    the batch is sharded, and so is every large parameter, with its optimizer state and its average. A device keeps
            1 / fsdp of them and gathers a layer's parameters when it computes the layer
    tensor  attention heads and MLP columns are sharded (Megatron), for layers that are too large for one device

All axes are "Auto": XLA's partitioner (GSPMD) derives every sharding between parameters, batch and results. The models
contain one annotation, `constrain_batch`, around each transformer block, each GroupNorm, each VGG convolution, and on the
outputs of the heads. It needs `jax.set_mesh` around a step, or `jit_on`. The same program runs on one device, where all
axes are 1.

The devices exchange this in a training step (tests/test_sharding.py reads it from the compiled programs):

    data    one sum of every gradient over the devices (all-reduce, or reduce-scatter where parameters are sharded too), and
            one of the few numbers that depend on the whole batch: losses, LeCam's means, code usage, the gradient norm
    fsdp    the same, and each sharded parameter is gathered where it is used, forward and backward, one layer at a time
            (all-gather). The batch is never gathered, except for token ids that index a sharded embedding; the embedding's
            rows are then exchanged (all-to-all). Optimizer state and averages are updated in place, on their shards
    tensor  sums of the activations after the attention's projection and the MLP's second layer (all-reduce). A generator's
            logits stay sharded along the vocabulary: for each token the devices sum the exponentials and find the largest
            logit and the target's (all-reduce; all-gather of one candidate per device for the argmax)
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

# Smaller parameters are replicated: gathering them costs more than sharding saves.
SMALLEST_SHARDED = 2**16

# (pattern, axis sharded along fsdp, axis sharded along tensor). The first pattern that matches the end of a parameter's path
# applies. Axes are counted from the last; a leading axis of stacked layers is never sharded.
_RULES: tuple[tuple[str, int | None, int | None], ...] = (
    (r"attn/qkv/kernel", -3, -1),  # [D, 3, D]: heads along the last axis
    (r"(attn/proj|mlp/fc2)/kernel", -1, -2),  # [in, D]: in holds heads or columns, over which an all-reduce sums
    (r"(mlp/fc1|lm_head)/kernel", -2, -1),  # [D, out]
    # Only 49 numbers per channel. If it were sharded, the partitioner would gather the batch and shard its channels.
    (r"dwconv/kernel", None, None),
    (r".*", -1, None),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: list | None = None) -> Mesh:
    """Makes a mesh over all devices of all processes. One size may be -1: it takes the remaining devices.

    Raises:
      ValueError: the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    rest = math.prod(n for n in sizes if n != -1)
    if sizes.count(-1) == 1 and rest > 0 and len(devices) % rest == 0:
        sizes[sizes.index(-1)] = len(devices) // rest
    if any(n < 1 for n in sizes) or math.prod(sizes) != len(devices):
        raise ValueError(f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not fit {len(devices)} devices: "
                         "the three must multiply to their number; one of them may be -1 for the rest")  # fmt: skip
    return jax.make_mesh(tuple(sizes), AXES, devices=devices, axis_types=(AxisType.Auto,) * 3)


def param_spec(path: str, shape: tuple[int, ...], mesh: Mapping[str, int]) -> PartitionSpec:
    """The sharding of the parameter at `path`.

    An axis whose size is not divisible by the mesh axis is not sharded.

    Args:
      path: "encoder/.../kernel", with any prefix.
      mesh: the sizes of the mesh axes.
    """
    spec: list[str | None] = [None] * len(shape)
    if math.prod(shape) < SMALLEST_SHARDED:
        return PartitionSpec()
    fsdp, tensor = next((f, t) for pattern, f, t in _RULES if re.search(rf"(^|/){pattern}$", path))
    for name, axis in (("fsdp", fsdp), ("tensor", tensor)):
        if axis is not None and len(shape) >= -axis and mesh[name] > 1 and shape[axis] % mesh[name] == 0:
            spec[axis] = name
    return PartitionSpec(*spec)


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """The NamedShardings for a tree of parameters, optimizer states or averages.

    The paths of optimizer states and averages end in those of their parameters, so they are sharded like their parameters.
    """

    def place(path, leaf):
        return NamedSharding(
            mesh, param_spec(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, mesh.shape)
        )

    return jax.tree_util.tree_map_with_path(place, state)


def placer(mesh: Mesh) -> Callable[[str, np.ndarray], jax.Array]:
    """Returns (path, array) -> the sharded array, for reading weights directly onto a mesh."""
    return lambda path, array: jax.device_put(array, NamedSharding(mesh, param_spec(path, array.shape, mesh.shape)))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds in full."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: the leading axis is sharded along data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def constrain_batch(x: jax.Array, last: str | None = None) -> jax.Array:
    """Constrains the batch axis of x [B, ..., D] to `batch_sharding`. Returns x unchanged if `jax.set_mesh` has set no mesh.

    If a layer's input is sharded along the batch and its kernel along fsdp, the partitioner could also gather the batch and
    shard the features. This constraint makes it gather the kernel.

    Args:
      last: the mesh axis along which the last axis of x is sharded. All other axes are replicated.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    spec = PartitionSpec(("data", "fsdp"), *[None] * (x.ndim - 2), last) if last else PartitionSpec(("data", "fsdp"))
    return jax.lax.with_sharding_constraint(x, spec)


def jit_on(mesh: Mesh | None, function: Callable, **options: Any) -> Callable:
    """Returns `jax.jit(function, **options)`. With a mesh, the function is traced and run under `jax.set_mesh(mesh)`.

    `constrain_batch` needs that mesh. With a mesh, the attribute `__wrapped__` of the result is the jitted function.
    """
    jitted = jax.jit(function, **options)
    if mesh is None:
        return jitted

    @functools.wraps(jitted)
    def call(*arguments, **named):
        with jax.set_mesh(mesh):
            return jitted(*arguments, **named)

    return call


def check_batch_size(mesh: Mesh, batch_size: int, parts: int = 1) -> None:
    """Raises ValueError unless each of the `parts` of a global batch (gradient accumulation) divides among the devices."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (devices * parts):
        raise ValueError(f"global batch size {batch_size} does not divide among data x fsdp = {devices} devices"
                         + (f" times {parts} accumulated parts" if parts > 1 else "")
                         + f"; make it a multiple of {devices * parts}")  # fmt: skip


def batch_part(mesh: Mesh) -> dict[str, int]:
    """The part of every batch that this process reads, as the arguments `process_index` and `process_count` of a loader.

    The parts are in the order of the mesh. Processes along the same tensor axis compute the same rows, so they read the same
    part.

    Raises:
      ValueError: two processes share some of their rows but not all.
    """
    rows: dict[int, set[int]] = {}
    for row, devices in enumerate(mesh.devices.reshape(-1, mesh.shape["tensor"])):
        for device in devices:
            rows.setdefault(device.process_index, set()).add(row)
    parts = sorted({tuple(sorted(own)) for own in rows.values()})
    if sum(map(len, parts)) != len(set().union(*rows.values())) or len(set(map(len, parts))) > 1:
        raise ValueError(
            f"mesh {dict(mesh.shape)}: {len(rows)} processes would share their rows of a batch in part; make tensor a "
            "divisor or a multiple of the number of devices of a process"
        )
    own = tuple(sorted(rows[jax.process_index()]))
    return {"process_index": parts.index(own), "process_count": len(parts)}


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Makes global arrays on the mesh from this process's rows of a batch (its `batch_part`)."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def to_host(tree: Any) -> Any:
    """Gathers a tree of arrays, however they are sharded, to full numpy arrays on every process, one array at a time."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(lambda leaf: multihost_utils.process_allgather(leaf, tiled=True), tree)


def local_mesh():
    """A mesh over this process's own devices, for batches that it makes alone; None if there is only one device."""
    devices = jax.local_devices()
    return make_mesh(devices=devices) if len(devices) > 1 else None


def round_up_batch_size(batch_size: int, num: int) -> int:
    """The batch size for `num` images: the smaller of the two, rounded up to a multiple of this process's devices."""
    devices = jax.local_device_count()
    return -(-min(batch_size, num) // devices) * devices
