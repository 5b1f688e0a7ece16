"""The floating-point operations of a training step, counted in the traced program."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from titok_jax.runtime import sharding
from titok_jax.runtime.chips import peak_tflops
from titok_jax.training.build import build_task
from titok_jax.training.settings import Settings


def matmul_flops(jaxpr) -> float:
    """The floating-point operations of all matrix products and convolutions of a traced program, over all devices.

    A conditional counts as its most expensive branch. Loops must have a fixed length. A Pallas kernel counts as often as its
    grid says; other libraries' kernels do not count.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, shapes = equation.primitive.name, [v.aval.shape for v in equation.invars if hasattr(v.aval, "shape")]
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shapes[0][axis] for axis in contracted)
        elif name == "conv_general_dilated":
            numbers = equation.params["dimension_numbers"]
            outputs = shapes[1][numbers.rhs_spec[0]]
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shapes[1]) / outputs
        elif name == "cond":
            total += max(matmul_flops(branch.jaxpr) for branch in equation.params["branches"])
        else:
            inner = [v for v in equation.params.values() if hasattr(v, "eqns") or hasattr(v, "jaxpr")]
            total += _times(name, equation.params) * sum(matmul_flops(getattr(v, "jaxpr", v)) for v in inner)
    return total


def _times(name: str, params: Mapping[str, Any]) -> int:
    """How often what a primitive contains is computed, over all devices."""
    if name == "scan":
        return params["length"]
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    if name == "shard_map":  # the shapes inside are those of one device
        axes = next(value for name, value in params.items() if name.endswith("manual_axes"))  # JAX renames it
        return math.prod(params["mesh"].shape[axis] for axis in axes)
    return 1


def batch_shapes(settings: Settings) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a global batch, as the loader gives it."""
    if settings.data.source.get("name") == "tokens":
        data = {"tokens": ((settings.model.num_tokens,), "int32")}
    else:
        data = {"image": ((settings.image_size, settings.image_size, 3), "uint8")}
    data["label"] = ((), "int32")
    rows = settings.data.batch_size
    return {name: jax.ShapeDtypeStruct((rows, *shape), dtype) for name, (shape, dtype) in data.items()}


def model_flops(settings: Settings, mesh: Mesh) -> float:
    """The operations that a step of this training needs, over all devices: forward and backward, with frozen networks, a
    discriminator that may not have started yet, and nothing that is computed again to save memory. Nothing is computed."""
    # In float32 there is no kernel, whose operations are hidden (cuDNN) or computed twice (TPU).
    plain = dataclasses.replace(settings, remat="none", gradient_accumulation=1, compute_dtype="float32")
    task = build_task(plain, abstract=True)
    state, key = jax.eval_shape(task.begin, jax.random.key(0)), jax.eval_shape(lambda: jax.random.key(0))
    with sharding.on_mesh(mesh):
        return matmul_flops(jax.make_jaxpr(task.step)(state, task.frozen, batch_shapes(settings), key).jaxpr)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a training does, in numbers.

    Attributes:
      num_steps, batch_size: of the whole run; examples of all devices.
      flops: operations of a step over all devices, see `model_flops`. 0 if the chip is not known.
      peak_flops: what all devices could do in a second; None if the chip is not known.
    """

    num_steps: int
    batch_size: int
    flops: float = 0.0
    peak_flops: float | None = None


def work(settings: Settings, mesh: Mesh) -> Work:
    """The work of a training. The operations of a step are counted, on the first process, where the chip is known."""
    steps, rows, devices = settings.num_steps, settings.data.batch_size, mesh.devices.size
    peak = peak_tflops(mesh.devices.flat[0].device_kind)
    if peak is None or jax.process_index():
        return Work(steps, rows)
    flops = model_flops(settings, mesh)
    print(f"A step is {flops / 1e12:,.2f} TFLOP, the devices' peak {peak * devices:,.0f} TFLOP/s in bfloat16", flush=True)
    return Work(steps, rows, flops, peak * 1e12 * devices)
