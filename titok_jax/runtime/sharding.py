"""Placement of arrays: one mesh with three axes, and the rules that shard parameters and batches on it.

    data    the model is replicated, and the batch is sharded. Optimizer states and averages are sharded too, unless
            `mesh.shard_optimizer` is off
    fsdp    the batch is sharded, and so is every large kernel of a transformer, with its optimizer state and its average. A
            device keeps 1 / fsdp of them and gathers a layer's kernels when it computes the layer
    tensor  attention heads and MLP columns are sharded (Megatron), for layers that are too large for one device

All axes are "Auto": XLA's partitioner (GSPMD) derives every sharding between parameters, batch and results. The models
contain one annotation, `hint`, around each transformer block, each GroupNorm, each VGG convolution, and on the outputs of
the heads. It needs `on_mesh` around a step, or `jit_on`. The same program runs on one device, where all axes are 1.

The devices exchange this in a training step (tests/test_sharding.py reads it from the compiled programs):

    data    one sum of every gradient over the devices (all-reduce), also of a batch in several parts, and one of the few
            numbers that depend on the whole batch: losses, LeCam's means, code usage, the gradient norm. With a sharded
            optimizer, the new parameters (all-gather, float32)
    fsdp    the same, and each sharded parameter is gathered where it is used, forward and backward, one layer at a time
            (all-gather). The batch is never gathered, except for token ids that index a sharded embedding; the embedding's
            rows are then exchanged (all-to-all). Optimizer state and averages are updated in place, on their shards
    tensor  sums of the activations after the attention's projection and the MLP's second layer (all-reduce). A generator's
            logits stay sharded along the vocabulary: for each token the devices sum the exponentials and find the largest
            logit and the target's (all-reduce; all-gather of one candidate per device for the argmax)
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.core.spmd import get_logical_axis_rules, logical_axis_rules
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

# The mesh axes of the logical axis names in `hint`.
RULES = (("batch", ("data", "fsdp")), ("vocabulary", "tensor"), ("heads", "tensor"))

GATHERED = "gathered"  # see `hint_gathered`

# Smaller parameters are replicated: gathering them costs more than sharding saves. Of stacked layers, one layer counts,
# because a step gathers one layer at a time.
SMALLEST_SHARDED = 2**16

# (pattern, number of axes, axis sharded along fsdp, axis sharded along tensor). The first rule whose pattern matches the end
# of a parameter's path applies. Axes are counted from the last; axes before that number belong to stacked layers. Other
# parameters are replicated. So are the kernels of convolutions: cut, a TPU exchanges them piece by piece, which took longer
# than the convolutions themselves.
_RULES: tuple[tuple[str, int, int, int | None], ...] = (
    (r"attn/qkv/kernel", 3, -3, -1),  # [D, 3, D]: heads along the last axis
    (r"(attn/proj|mlp/fc2)/kernel", 2, -1, -2),  # [in, D]: in holds heads or columns, over which an all-reduce sums
    (r"(mlp/fc1|lm_head)/kernel", 2, -2, -1),  # [D, out]
    (r"(patch_embed|ffn_\d+|skip_linear)/kernel", 2, -1, None),
    (r"(word_)?embeddings", 2, -1, None),
)


def target_platform() -> str:
    """The platform that the current program is traced for: "cpu", "gpu" or "tpu". It is the platform of the mesh set by
    `jax.set_mesh`, whose devices may belong to another machine. Without such a mesh, it is the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, dcn_data: int = -1, devices: list | None = None) -> Mesh:
    """Makes a mesh over all devices of all processes. One of `data`, `fsdp` and `tensor` may be -1: it takes the remaining
    devices.

    Several TPU slices are joined along the outer part of `data`. So fsdp and tensor communicate inside a slice, over its
    fast links, and little but the sum of the gradients crosses the network between slices.

    Args:
      dcn_data: the number of slices; -1 takes as many as there are.

    Raises:
      ValueError: the product of the sizes is not the number of devices, `dcn_data` is not the number of slices, or `data` is
        not a multiple of it.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    rest = math.prod(n for n in sizes if n != -1)
    if sizes.count(-1) == 1 and rest > 0 and len(devices) % rest == 0:
        sizes[sizes.index(-1)] = len(devices) // rest
    if any(n < 1 for n in sizes) or math.prod(sizes) != len(devices):
        raise ValueError(f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not fit {len(devices)} devices: "
                         "the three must multiply to their number; one of them may be -1 for the rest")  # fmt: skip
    slices = _num_slices(devices)
    if dcn_data not in (-1, slices):
        raise ValueError(f"mesh dcn_data={dcn_data} does not fit the devices, which belong to {slices} TPU slice(s): "
                         "set it to their number, or to -1")  # fmt: skip
    if sizes[0] % slices:
        raise ValueError(f"mesh data={sizes[0]}, fsdp={fsdp}, tensor={tensor} does not fit {slices} TPU slices of "
                         f"{len(devices) // slices} devices: data must be a multiple of {slices}, "
                         "because fsdp and tensor stay inside a slice")  # fmt: skip
    return Mesh(_arranged(sizes, slices, devices), AXES, axis_types=(AxisType.Auto,) * 3)


def _num_slices(devices: list) -> int:
    """How many TPU slices the devices belong to; 1 for other devices."""
    return len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1


def _arranged(sizes: list[int], slices: int, devices: list) -> np.ndarray:
    """The devices [data, fsdp, tensor], so that neighbours along an axis are near each other.

    An axis of the mesh takes whole axes of the slice if it can, otherwise parts of them.
    """
    inner = (sizes[0] // slices, *sizes[1:])
    if slices == 1:
        return mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1), devices, allow_split_physical_axes=True)


def param_spec(path: str, shape: tuple[int, ...], mesh: Mapping[str, int]) -> PartitionSpec:
    """The sharding of the parameter at `path`.

    An axis whose size is not divisible by the mesh axis is not sharded.

    Args:
      path: "encoder/.../kernel", with any prefix.
      mesh: the sizes of the mesh axes.
    """
    spec: list[str | None] = [None] * len(shape)
    rule = next((rule for rule in _RULES if re.search(rf"(^|/){rule[0]}$", path)), None)
    if rule is None or len(shape) < rule[1] or math.prod(shape[-rule[1] :]) < SMALLEST_SHARDED:
        return PartitionSpec()
    _, _, fsdp, tensor = rule
    for name, axis in (("fsdp", fsdp), ("tensor", tensor)):
        if axis is not None and mesh[name] > 1 and shape[axis] % mesh[name] == 0:
            spec[axis] = name
    return PartitionSpec(*spec)


def _also_along_data(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mapping[str, int]) -> PartitionSpec:
    """Shards an array along data too, on the largest axis that can be, if it is large."""
    if mesh["data"] == 1 or math.prod(shape) < SMALLEST_SHARDED:
        return spec
    names = [(name,) if name else () for name in (*spec, *[None] * (len(shape) - len(spec)))]
    pieces = [size // math.prod(mesh[name] for name in held) for size, held in zip(shape, names, strict=True)]
    axis = max(range(len(shape)), key=lambda axis: pieces[axis] if pieces[axis] % mesh["data"] == 0 else 0)
    if pieces[axis] % mesh["data"]:
        return spec
    names[axis] = (*names[axis], "data")
    return PartitionSpec(*((held if len(held) > 1 else held[0]) if held else None for held in names))


def state_shardings(mesh: Mesh, state: Any, *, shard_optimizer: bool = False) -> Any:
    """The NamedShardings for the state of a training, or for a tree of parameters.

    The paths of optimizer states and averages end in those of their parameters, so they are sharded like their parameters.

    Args:
      shard_optimizer: shard optimizer states ("opt") and averages ("ema") along data too (ZeRO-1, arXiv 1910.02054).
    """

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = param_spec(name, leaf.shape, mesh.shape)
        if shard_optimizer and name.split("/")[0] in ("opt", "ema"):
            spec = _also_along_data(spec, leaf.shape, mesh.shape)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, state)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds in full."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: the leading axis is sharded along data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def hint(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains the sharding of an array in terms of logical axis names: the only thing that the models say about meshes.

    `flax.nnx.logical_axis_rules` maps the names to mesh axes; `on_mesh` sets ours (`RULES`). Without rules, without a mesh,
    and for mesh axes that are not of type Auto (Explicit ones, or those of an enclosing `jax.shard_map`), nothing is
    constrained. So a module runs unchanged in a program with any mesh.

    If a layer's input is sharded along the batch and its kernel along fsdp, the partitioner could also gather the batch and
    shard the features. This constraint makes it gather the kernel.

    Args:
      names: one per axis, from the first; axes without a name are replicated.
    """
    if not get_logical_axis_rules() or not jax.sharding.get_abstract_mesh().auto_axes:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(_auto_axes_of(name) or None for name in names)))


def _auto_axes_of(name: str | None) -> tuple[str, ...]:
    """The mesh axes of type Auto to which the rules map a logical axis name."""
    mapped = dict(get_logical_axis_rules()).get(name) or ()
    auto = jax.sharding.get_abstract_mesh().auto_axes
    return tuple(axis for axis in ((mapped,) if isinstance(mapped, str) else mapped) if axis in auto)


def split_by_rules(sizes: Mapping[str, int]) -> dict[str, tuple[str, ...]] | None:
    """How to split a computation that the partitioner cannot split, with `split`: from {logical name of an axis: its size}
    to {logical name: the mesh axes along which it is split}.

    No mesh axes where nothing has to be split: on one device, or inside a `jax.shard_map` over all axes. None where it is
    not known how to split (several devices without rules for these names), or where a size is not divisible.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return dict.fromkeys(sizes, ()) if jax.device_count() == 1 else None
    found = {name: _auto_axes_of(name) for name in sizes}
    if mesh.size == 1 or len(mesh.manual_axes) == len(mesh.axis_names):
        return dict.fromkeys(sizes, ())
    unknown = not any(found.values()) or mesh.explicit_axes
    if unknown or any(sizes[name] % math.prod(mesh.shape[axis] for axis in axes) for name, axes in found.items()):
        return None
    return found


def split(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`jax.shard_map` over all mesh axes of type Auto, or the function itself where there is nothing to split."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh.auto_axes or mesh.size == 1:
        return function
    axes = set(mesh.auto_axes)
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False)


def gathers() -> bool:
    """Whether `hint_gathered` gathers anything here."""
    return bool(get_logical_axis_rules()) and _auto_sizes()["fsdp"] > 1


def _auto_sizes() -> dict[str, int]:
    """The sizes of our axes in the mesh that is set; 1 for those that it lacks or that are not of type Auto."""
    mesh = jax.sharding.get_abstract_mesh()
    return {axis: mesh.shape[axis] if axis in mesh.auto_axes else 1 for axis in AXES}


def hint_gathered(params: Any, dtype: Any) -> Any:
    """Gathers those of a layer's parameters that are sharded along fsdp, in the dtype in which the layer computes with them.

    They have the name `GATHERED` for policies of `jax.checkpoint`, so that they are gathered again rather than kept. The
    partitioner would otherwise multiply by one shard of a kernel at a time, which leaves a TPU's matrix units idle. Like
    `hint`, it does nothing in a program without our rules.
    """
    if not gathers():
        return params
    sizes = _auto_sizes()

    def gather(path, leaf):
        name = jax.tree_util.keystr([key for key in path if hasattr(key, "key")], simple=True, separator="/")
        spec = param_spec(name, leaf.shape, sizes)
        if "fsdp" not in spec:
            return leaf
        kept = PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec))
        return checkpoint_name(jax.lax.with_sharding_constraint(leaf.astype(dtype), kept), GATHERED)

    return jax.tree_util.tree_map_with_path(gather, params)


def apart_along_data(function: Callable, params: Any, rows: Any) -> tuple[Any, Any]:
    """Applies `function` to each part of a batch that lies at one position along data, without exchange between them.

    Under the mesh that is set, if its axis data is of type Auto. Otherwise, and where data is 1, the batch is one part.

    Args:
      function: (params, rows) -> (means over the rows, outputs [b, ...] of the rows).
      params: all that is differentiated; the function may close over other traced arrays.
      rows: tree of [B, ...], sharded along the batch.

    Returns:
      (the means over the whole batch, the outputs [B, ...]).
    """
    if _auto_sizes()["data"] == 1:
        return function(params, rows)

    def local(params, rows):
        means, outputs = function(params, rows)
        return jax.lax.pmean(means, "data"), outputs

    specs = PartitionSpec(), PartitionSpec("data")
    return jax.shard_map(local, in_specs=specs, out_specs=specs, axis_names={"data"}, check_vma=False)(params, rows)


def any_mesh(method: Callable) -> Callable:
    """Decorator for methods that compute on batches: lets them run under mesh axes of type Explicit.

    Under Explicit axes, which `jax.make_mesh` gives by default, JAX wants the sharding of each reshape and gather to be
    written down. Inside the method these axes are Auto instead, so the partitioner derives the shardings. An output that has
    the batch axis in front is sharded along it; other outputs are replicated. Elsewhere the method is unchanged.

    The method belongs to a module, whose parameters may be sharded in any way, and its first argument has a leading batch
    axis; or it belongs to a plain object, its first argument holds parameters, and its second has the batch axis.
    """

    @functools.wraps(method)
    def call(self, *arguments, **named):
        mesh = jax.sharding.get_abstract_mesh()
        if not mesh.explicit_axes:
            return method(self, *arguments, **named)
        graphdef, params = nnx.split(self) if isinstance(self, nnx.Module) else (None, ())
        batch = jax.tree.leaves(arguments[1 if graphdef is None else 0])[0]
        spec = PartitionSpec(jax.typeof(batch).sharding.spec[0])

        def free(x):
            return jax.sharding.reshard(x, PartitionSpec()) if hasattr(x, "shape") else x

        with jax.sharding.use_abstract_mesh(mesh.update_axis_types(dict.fromkeys(mesh.explicit_axes, AxisType.Auto))):
            params, arguments, named = jax.tree.map(free, (params, arguments, named))
            outputs = method(self if graphdef is None else nnx.merge(graphdef, params), *arguments, **named)

        def placed(x):
            is_batch = x.ndim > 0 and x.shape[0] == batch.shape[0]
            return jax.sharding.reshard(x, spec if is_batch else PartitionSpec())

        return jax.tree.map(placed, outputs)

    return call


@contextlib.contextmanager
def on_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Sets the mesh and our `RULES` for it, so that `hint` constrains what is traced inside. Does nothing for None."""
    if mesh is None:
        yield
        return
    with jax.set_mesh(mesh), logical_axis_rules(RULES):
        yield


def jit_on(mesh: Mesh | None, function: Callable, **options: Any) -> Callable:
    """Returns `jax.jit(function, **options)`, which is traced and run under `on_mesh(mesh)`.

    The attribute `__wrapped__` of the result is the jitted function. If an argument is traced (inside another program's jit,
    grad or vmap), it is called without `on_mesh`: the mesh is then the other program's.
    """
    jitted = jax.jit(function, **options)
    if mesh is None:
        return jitted

    @functools.wraps(jitted)
    def call(*arguments, **named):
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((arguments, named)))
        with on_mesh(None if traced else mesh):
            return jitted(*arguments, **named)

    return call


def check_batch_size(mesh: Mesh, batch_size: int, parts: int = 1) -> None:
    """Raises ValueError unless each of the `parts` of a global batch (gradient accumulation) divides among the devices."""
    devices = batch_devices(mesh)
    if batch_size % (devices * parts):
        raise ValueError(f"global batch size {batch_size} does not divide among data x fsdp = {devices} devices"
                         + (f" times {parts} accumulated parts" if parts > 1 else "")
                         + f"; make it a multiple of {devices * parts}")  # fmt: skip


def process_blocks(mesh: Mesh) -> dict[int, tuple[int, ...]]:
    """The blocks of every batch that each process reads: {its index: blocks, in increasing order}.

    A batch is cut into one block of rows for each position along data and fsdp, in the order of the mesh. A process reads
    the blocks of its devices. They need not be neighbours: the mesh follows the links between devices, not their processes.
    Processes along the same tensor axis compute the same rows, so they read the same blocks.

    Raises:
      ValueError: two processes share some of their blocks but not all.
    """
    found: dict[int, set[int]] = {}
    for block, devices in enumerate(mesh.devices.reshape(-1, mesh.shape["tensor"])):
        for device in devices:
            found.setdefault(device.process_index, set()).add(block)
    own = {process: tuple(sorted(blocks)) for process, blocks in found.items()}
    different = set(own.values())
    if sum(map(len, different)) != batch_devices(mesh) or len(set(map(len, different))) > 1:
        raise ValueError(
            f"mesh {dict(mesh.shape)}: {len(own)} processes would share their rows of a batch in part; make tensor a "
            "divisor or a multiple of the number of devices of a process"
        )
    return own


def batch_part(mesh: Mesh) -> dict[str, Any]:
    """The part of every batch that this process reads (`process_blocks`), as the arguments `blocks` and `num_blocks` of a
    loader."""
    return {"blocks": process_blocks(mesh)[jax.process_index()], "num_blocks": batch_devices(mesh)}


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Makes global arrays on the mesh from this process's rows of a batch (its `batch_part`, in increasing order)."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def local_mesh():
    """A mesh over this process's own devices, for batches that it makes alone; None if there is only one device."""
    devices = jax.local_devices()
    return make_mesh(devices=devices) if len(devices) > 1 else None


def batch_devices(mesh: Mesh | None) -> int:
    """How many parts a batch is split into on a mesh; 1 without one."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def round_up_batch_size(batch_size: int, num: int, devices: int | None = None) -> int:
    """The batch size for `num` images: the smaller of the two, rounded up to a multiple of the devices, by default those of
    this process."""
    devices = jax.local_device_count() if devices is None else devices
    return -(-min(batch_size, num) // devices) * devices
