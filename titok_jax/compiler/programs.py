"""Programs to compile for a slice, and checks of the results."""

import importlib.metadata
import math
import time
from typing import Any, NamedTuple

from titok_jax.compiler.hlo import Cost, num_bytes, program_cost
from titok_jax.compiler.slices import slice_chip
from titok_jax.runtime.chips import Chip


class Program(NamedTuple):
    """A program to compile.

    Attributes:
      name: its name in the table.
      mesh: the mesh it runs on.
      batch_size: the global batch size.
      function, args, kwargs: traced as `function.trace(*args, **kwargs)`; the arguments are shapes with shardings.
      trained: shapes of the trained parameters; None if the program trains nothing.
      parameters: shapes of all parameters, with shardings.
    """

    name: str
    mesh: Any
    batch_size: int
    function: Any
    args: tuple
    kwargs: dict[str, Any]
    trained: Any
    parameters: Any


def _placed(tree: Any, shardings: Any) -> Any:
    import jax

    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def training_step(name: str, settings, devices: list) -> Program:
    """The step that `titok_jax.train` runs.

    Args:
      settings: from `parse_settings(config, abstract=True)`.

    Raises:
      ValueError: a batch or mesh that does not fit the devices.
    """
    import jax

    from titok_jax.runtime import sharding
    from titok_jax.training.build import build_task
    from titok_jax.training.flops import batch_shapes
    from titok_jax.training.tasks.base import jit_step

    mesh = sharding.make_mesh(**settings.mesh.sizes, devices=devices)
    batch_size = settings.data.batch_size
    sharding.check_batch_size(mesh, batch_size, settings.gradient_accumulation)
    task = build_task(settings, abstract=True)
    state = jax.eval_shape(task.begin, jax.random.key(0))
    shardings = sharding.state_shardings(mesh, state, shard_optimizer=settings.mesh.shard_optimizer)
    frozen = jax.tree.map(lambda _: sharding.replicated(mesh), task.frozen)
    batch = batch_shapes(settings)
    batch = _placed(batch, dict.fromkeys(batch, sharding.batch_sharding(mesh)))
    key = jax.eval_shape(lambda: jax.random.key(0))
    args = (_placed(state, shardings), _placed(task.frozen, frozen), batch, key)
    trained = {name: network.trainable(state["params"][name]) for name, network in task.networks.items()}
    function = jit_step(task, mesh, shardings)
    return Program(name, mesh, batch_size, function, args, {}, trained, (args[0]["params"], args[1]))


def sampler(name: str, devices: list, images_per_device: int = 64) -> Program:
    """A program from labels [B] to images: a published generator with its sampling settings, then its tokenizer's decoder.

    It runs in bfloat16, with the models replicated on every device.

    Raises:
      ValueError: an unknown generator.
    """
    import jax
    import jax.numpy as jnp

    from titok_jax import models
    from titok_jax.inference.functions import GeneratorFunctions, TokenizerFunctions, image_keys
    from titok_jax.runtime import sharding
    from titok_jax.weights import known_models

    known = known_models.known_configs()
    if ("generator", name) not in known:
        choices = ", ".join(model for kind, model in known if kind == "generator")
        raise ValueError(f"--sampler is {name!r}, expected one of {choices}")
    mesh = sharding.make_mesh(devices=devices)
    everywhere, batch_size = sharding.replicated(mesh), images_per_device * len(devices)
    tokenizer, generator = known["tokenizer", name], known["generator", name]
    parameters = [
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), models.abstract(config)[1])
        for config in (tokenizer, generator)
    ]
    to_ids, to_images = GeneratorFunctions(generator, "bfloat16"), TokenizerFunctions(tokenizer, "bfloat16")

    def sample(params, labels, key, first_index, scale, temperature):
        keys = image_keys(key, batch_size, first_index)
        out = to_ids.sample(params[1], labels, keys, guidance_scale=scale, temperature=temperature)
        return to_images.decode(params[0], out.ids)

    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    labels = jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=sharding.batch_sharding(mesh))
    key, index = jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((), jnp.int32)
    args = (parameters, labels, key, index, scalar, scalar)
    function = jax.jit(sample, out_shardings=sharding.batch_sharding(mesh))
    return Program(f"sample {name}", mesh, batch_size, function, args, {}, None, parameters)


def compile_program(program: Program, slice_name: str) -> dict[str, Any]:
    """Compiles a program. Returns its table row: figures per device and step, and `problems`, which should be empty."""
    import jax

    from titok_jax.runtime import sharding
    from titok_jax.training.flops import matmul_flops

    chip = slice_chip(slice_name)
    row = {
        "name": program.name,
        "slice": slice_name,
        "mesh": {axis: size for axis, size in program.mesh.shape.items() if size > 1},
        "batch_size": program.batch_size,
        "effort": jax.config.jax_exec_time_optimization_effort,
        "date": time.strftime("%Y-%m-%d"),
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
    }
    start = time.perf_counter()
    with sharding.on_mesh(program.mesh):
        traced = program.function.trace(*program.args, **program.kwargs)
        try:
            compiled = traced.lower(lowering_platforms=("tpu",)).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return row | {"problems": [f"does not fit: {str(error).splitlines()[0]}"]}
    row["compile_seconds"] = time.perf_counter() - start
    memory, cost = compiled.memory_analysis(), program_cost(compiled.as_text(), chip)
    devices = program.mesh.devices.size
    row |= {
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "total_bytes": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes,
        "flops": matmul_flops(traced.jaxpr.jaxpr) / devices,
        "estimated_seconds": cost.cycles / chip.clock_ghz / 1e9 if math.isfinite(cost.cycles) else None,
        "collective_bytes": cost.bytes,
        "collective_count": cost.count,
        "sent_bytes": cost.sent,
        "unknown_loops": cost.unknown_loops,
    }
    return row | {"problems": find_problems(program, cost, row["total_bytes"], chip)}


def find_problems(program: Program, cost: Cost, total_bytes: float, chip: Chip) -> list[str]:
    """Describes everything in a compiled program that does not fit its mesh."""
    import jax

    problems = []
    if total_bytes > chip.hbm * 2**30:
        problems.append(f"takes {total_bytes / 2**30:.1f} GiB of {chip.hbm}")
    fsdp = program.mesh.shape["fsdp"]
    leaves = jax.tree.leaves(program.parameters)
    # The size of the sharded parameters, which are gathered in bfloat16 at least once.
    sharded = sum(leaf.size for leaf in leaves if not leaf.sharding.is_fully_replicated)
    gathered = sum(cost.bytes.get(kind, 0) for kind in ("all-gather", "collective-permute", "all-to-all"))
    reduced = sum(cost.bytes.get(kind, 0) for kind in ("all-reduce", "reduce-scatter"))
    trained = sum(leaf.size for leaf in jax.tree.leaves(program.trained))  # gradients are at least bfloat16
    if fsdp > 1 and gathered + reduced < 2 * sharded:
        problems.append(f"{(gathered + reduced) / 1e6:.0f} MB are exchanged, less than the sharded parameters")
    if fsdp == 1 and program.trained is not None and program.mesh.size > 1 and gathered + reduced < 1.9 * trained:
        problems.append(f"{reduced / 1e6:.0f} MB are reduced, less than the gradients")
    if program.trained is None and gathered + reduced > 1e6:
        problems.append(f"{(gathered + reduced) / 1e6:.0f} MB are exchanged, though every image is made on one device")
    # No device should ever hold an array with the whole batch in front, unless it has the shape of a parameter or is small.
    parameters = {tuple(sorted(n for n in leaf.shape if n > 1)) for leaf in leaves}
    stacked = {tuple(sorted(n for n in leaf.shape[1:] if n > 1)) for leaf in leaves}
    for kind, dims in sorted(cost.arrays):
        large = [n for n in dims if n > 1]
        whole = large and large[0] == program.batch_size and tuple(sorted(large)) not in parameters | stacked
        if whole and num_bytes((kind, dims)) > 2**20:
            problems.append(f"the whole batch is exchanged: {kind}{list(dims)}")
    return problems
