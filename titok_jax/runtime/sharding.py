"""Where arrays live: one mesh of three axes, and the rules that place parameters and batches on it.

    data    copies of the model; the batch is cut along it
    fsdp    the batch is cut along it too, and every large parameter, its optimizer state and its average: a device keeps
            1 / fsdp of them and gathers a layer's parameters when it computes the layer
    tensor  attention heads and MLP columns are cut along it (Megatron): for layers too large for one device

All axes are "Auto": XLA's partitioner (GSPMD) derives everything between parameters, batch and results. The models contain
one annotation, `constrain_batch`, around each block of a transformer, each GroupNorm, each convolution of VGG, and on what the
heads give; it needs `jax.set_mesh` around a step, or `jit_on`. The same program runs on one device, where all axes are 1.

What devices send each other in a training step (tests/test_sharding.py reads it from the compiled programs):

    data    one sum of every gradient over the devices (all-reduce, or reduce-scatter where parameters are cut too), and of
            the few numbers that are of the whole batch: losses, LeCam's means, the usage of codes, the gradient norm
    fsdp    the same, and each cut parameter is gathered where it is used, forward and backward, one layer at a time
            (all-gather). Never the batch, but for token ids, with which a cut embedding is looked up; its rows then change
            places (all-to-all). Optimizer and averages are updated in place, on their shards
    tensor  sums of the activations, after the attention's projection and the MLP's second layer (all-reduce). A generator's
            logits stay cut along the vocabulary: of each token the devices sum the exponentials and find the largest and
            the target's logit (all-reduce; all-gather of one candidate per device for the argmax)
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


# Smaller parameters are kept whole: gathering them costs more than it saves.
SMALLEST_SHARDED = 2**16


# The first pattern that matches the end of a parameter's path says which of its axes, counted from the last (a stacked
# layer axis in front is never cut), is cut along fsdp and which along tensor.
_RULES: tuple[tuple[str, int | None, int | None], ...] = (
    (r"attn/qkv/kernel", -3, -1),  # [D, 3, D]: heads along the last axis
    (r"(attn/proj|mlp/fc2)/kernel", -1, -2),  # [in, D]: in holds heads or columns, summed over by an all-reduce
    (r"(mlp/fc1|lm_head)/kernel", -2, -1),  # [D, out]
    # 49 numbers a channel: cut, the partitioner would rather gather the batch and cut its channels.
    (r"dwconv/kernel", None, None),
    (r".*", -1, None),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: list | None = None) -> Mesh:
    """A mesh over all devices (of all processes); one of the sizes may be -1: what the others leave.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
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
    """How the array at `path` ("encoder/.../kernel", any prefix in front) is cut; `mesh` gives the axes' sizes.

    An axis that the mesh does not divide is not cut.
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
    """A tree of NamedShardings for any tree of parameters: optimizer states and averages hold the parameters' paths at the
    end of their own, so they are placed as their parameters are."""

    def place(path, leaf):
        return NamedSharding(
            mesh, param_spec(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, mesh.shape)
        )

    return jax.tree_util.tree_map_with_path(place, state)


def placer(mesh: Mesh) -> Callable[[str, np.ndarray], jax.Array]:
    """(path, array) -> the array on its shards; for reading weights straight onto a mesh."""
    return lambda path, array: jax.device_put(array, NamedSharding(mesh, param_spec(path, array.shape, mesh.shape)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis cut along data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def constrain_batch(x: jax.Array, last: str | None = None) -> jax.Array:
    """x [B, ..., D], cut along its batch as `batch_sharding` does, along its last axis by the mesh's axis `last` if one is
    named, and whole in its other axes; x where no mesh is set by `jax.set_mesh`.

    Where a layer's input is cut along the batch and its kernel along fsdp, the partitioner may as well gather the batch and
    cut the features; with this it gathers the kernel.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    spec = PartitionSpec(("data", "fsdp"), *[None] * (x.ndim - 2), last) if last else PartitionSpec(("data", "fsdp"))
    return jax.lax.with_sharding_constraint(x, spec)


def jit_on(mesh: Mesh | None, function: Callable, **options: Any) -> Callable:
    """`jax.jit(function, **options)`; if a mesh is given, traced and run under `jax.set_mesh(mesh)`, so that `constrain_batch`
    acts. Then its attribute `__wrapped__` is what has been jitted."""
    jitted = jax.jit(function, **options)
    if mesh is None:
        return jitted

    @functools.wraps(jitted)
    def call(*arguments, **named):
        with jax.set_mesh(mesh):
            return jitted(*arguments, **named)

    return call


def check_batch_size(mesh: Mesh, batch_size: int, parts: int = 1) -> None:
    """Raises ValueError unless a global batch, cut into `parts` for gradient accumulation, divides among the devices."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (devices * parts):
        raise ValueError(f"global batch size {batch_size} does not divide among data x fsdp = {devices} devices"
                         + (f" times {parts} accumulated parts" if parts > 1 else "")
                         + f"; make it a multiple of {devices * parts}")  # fmt: skip


def batch_part(mesh: Mesh) -> dict[str, int]:
    """Which of how many parts of every batch this process reads, as the arguments of a loader. The parts lie on the mesh in
    their order. Processes that the axis tensor joins compute the same rows, and so read the same part.

    Raises:
      ValueError: some processes share a part of their rows only.
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
    """This process's rows of a batch, those of its `batch_part`, -> global arrays on the mesh."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def to_host(tree: Any) -> Any:
    """A tree of arrays, however they are placed -> the same of whole numpy arrays, on every process, one array at a time."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(lambda leaf: multihost_utils.process_allgather(leaf, tiled=True), tree)


def local_mesh():
    """A mesh of this process's devices, for the batches that it makes; None if there is one device."""
    import jax

    from titok_jax.runtime.sharding import make_mesh

    devices = jax.local_devices()
    return make_mesh(devices=devices) if len(devices) > 1 else None


def whole_batch(batch_size: int, num: int) -> int:
    """The batch size for `num` images: no larger than need be, and a multiple of the devices that share a batch."""
    import jax

    devices = jax.local_device_count()
    return -(-min(batch_size, num) // devices) * devices
