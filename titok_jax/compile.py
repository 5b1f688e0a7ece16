"""Compiles training steps and samplers for TPU slices on a machine without a TPU: does it fit, what does it send?"""

import argparse
import dataclasses
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from titok_jax.cli import command, new_file, read_config
from titok_jax.storage import as_path

# JAX is imported where it is first used, after the environment is set for the TPU compiler: see `topology_devices`.

_EPILOG = """examples:
  python -m titok_jax.compile --config configs/stage1.py:l32 --slice v5e-16
      the training step of a recipe as it is
  python -m titok_jax.compile --config configs/stage1.py:l32 --slice v5e-16 --config.mesh.fsdp=16 --config.remat=True
      with changes to its configuration, as for titok_jax.train
  python -m titok_jax.compile --sampler titok_l32 --slice v5e-16
      the sampler of a published generator, with its tokenizer's decoder
  python -m titok_jax.compile --all --results runs/tpu_check.json
      everything in the tables of docs/tpu.md (make tpu-check); what FILE already holds is not compiled again

The TPU compiler is the package libtpu (make tpu-check installs it into .venv-tpu); no TPU is used. Times are what the
compiler estimates.
"""


class Chip(NamedTuple):
    """A TPU chip; with megacore (v4, v5p) it is one device. Published figures, but for the clock: see `clock_ghz`.

    Attributes:
      topology: name in topology descriptions.
      hbm: GiB of memory that the compiler lets a program use.
      tflops: peak bfloat16 multiply-adds, counted as two operations.
      clock_ghz: the clock at which the matrix units give `tflops`; turns the compiler's cycles into seconds.
      ici: GB/s out of a chip over all its links, in one direction.
    """

    topology: str
    hbm: float
    tflops: float
    clock_ghz: float
    ici: float


CHIPS = {
    "v4": Chip("v4", 30.75, 275.0, 1.05, 150.0),
    "v5e": Chip("v5e", 15.75, 197.0, 1.5, 100.0),
    "v5p": Chip("v5p", 95.74, 459.0, 1.75, 300.0),
    "v6e": Chip("v6e", 31.25, 918.0, 1.75, 224.0),
}

# Google's names: of v4 and v5p they count TensorCores, two to a chip; of v5e and v6e, chips.
SLICES = {
    "v4-8": "2x2x1",
    "v4-32": "2x2x4",
    "v5e-4": "2x2",
    "v5e-16": "4x4",
    "v5p-32": "2x2x4",
    "v5p-128": "4x4x4",
    "v6e-64": "8x8",
    "v6e-256": "16x16",
}


def slice_chip(name: str) -> Chip:
    """The chip of a slice.

    Raises:
      ValueError: an unknown slice.
    """
    if name not in SLICES:
        raise ValueError(f"--slice is {name!r}, expected one of {', '.join(SLICES)}")
    return CHIPS[name.split("-")[0]]


def topology_devices(name: str) -> list[Any]:
    """The devices of a slice, one per chip, to be compiled for. Call it before anything else of JAX.

    Raises:
      ValueError: an unknown slice, or the TPU compiler is not installed.
    """
    chip = slice_chip(name)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("the TPU compiler is not installed: pip install libtpu, of the version in constraints.txt")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # asks the metadata server of a cloud machine otherwise
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # it holds no chip, so it need not be alone on the machine
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from jax.experimental import topologies

    # On v4 a device is a chip where "megacore" is said, else a core; v5p is so by itself.
    options = {"chip_config_name": "megacore"} if chip.topology == "v4" else {}
    return list(topologies.get_topology_desc(f"{chip.topology}:{SLICES[name]}", "tpu", **options).devices)


# ---------------------------------------------------------------------------------------------------------------------
# What the compiler made


@dataclasses.dataclass
class Cost:
    """What one run of a computation takes on one device.

    Attributes:
      cycles: as the TPU compiler estimates them, without waiting for other devices; infinite if it says so of something.
      bytes: {kind of collective: bytes of the arrays that it makes}; those of an all-gather are whole on every device, an
        all-reduce sends them about twice.
      count: {kind of collective: how many are run}.
      arrays: the shapes that collectives make, each once.
      unknown_loops: loops whose number of rounds could not be told; they count as one round.
    """

    cycles: float = 0.0
    bytes: dict[str, float] = dataclasses.field(default_factory=dict)
    count: dict[str, float] = dataclasses.field(default_factory=dict)
    arrays: set[tuple[str, tuple[int, ...]]] = dataclasses.field(default_factory=set)
    unknown_loops: int = 0

    def add(self, other: "Cost", times: float = 1.0, cycles: bool = True) -> None:
        self.cycles += other.cycles * times if cycles else 0.0
        for mine, theirs in ((self.bytes, other.bytes), (self.count, other.count)):
            for kind, value in theirs.items():
                mine[kind] = mine.get(kind, 0.0) + value * times
        self.arrays |= other.arrays
        self.unknown_loops += other.unknown_loops

    @property
    def sent(self) -> float:
        """Bytes that a device sends, about: an all-reduce is a reduce-scatter and an all-gather."""
        return sum(value * (2 if kind == "all-reduce" else 1) for kind, value in self.bytes.items())


class _Instruction(NamedTuple):
    name: str
    opcode: str
    shapes: list[tuple[str, tuple[int, ...]]]  # (type, dimensions) of the result, flat if it is a tuple
    text: str


_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16}


def _num_bytes(shape: tuple[str, tuple[int, ...]]) -> float:
    kind, dims = shape
    bits = _BITS.get(kind) or int(re.search(r"\d+", kind)[0])
    return math.prod(dims) * bits / 8


def _computations(hlo: str) -> tuple[dict[str, list[_Instruction]], str]:
    """The instructions of each computation of an HLO module's text, and the name of the first one."""
    found: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            current = found.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
            continue
        instruction = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(", line)
        if instruction and current is not None:
            shapes = [
                (kind, tuple(int(n) for n in dims.split(",") if n))
                for kind, dims in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", instruction[2])
            ]
            current.append(_Instruction(instruction[1], instruction[3], shapes, line))
    return found, entry


def _operands(instruction: _Instruction) -> list[str]:
    inside = instruction.text.split(f" {instruction.opcode}(", 1)[1].split(")", 1)[0]
    return re.findall(r"%([\w.\-]+)", inside)


def _rounds(loop: _Instruction, computations: Mapping[str, list[_Instruction]]) -> float | None:
    """How often a `while` that counts up from 0 goes round; None if it is of another kind."""
    known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.text)
    if known:
        return float(known[1])
    names = {key: re.search(rf"{key}=%([\w.\-]+)", loop.text)[1] for key in ("condition", "body")}
    condition, body = ({i.name: i for i in computations[names[key]]} for key in ("condition", "body"))

    def constant(name: str, of: Mapping[str, _Instruction]) -> int | None:
        value = name in of and re.search(r" constant\((\d+)\)", of[name].text)
        return int(value[1]) if value else None

    test = next((i for i in reversed(condition.values()) if i.text.lstrip().startswith("ROOT")), None)
    if test is None or test.opcode != "compare" or "direction=LT" not in test.text:
        return None
    counter, limit = _operands(test)
    limit = constant(limit, condition)
    index = counter in condition and re.search(r"index=(\d+)", condition[counter].text)
    result = next(i for i in reversed(body.values()) if i.text.lstrip().startswith("ROOT"))
    if limit is None or not index or result.opcode != "tuple":
        return None
    step = body.get(_operands(result)[int(index[1])])
    while step is not None and step.opcode in ("copy", "bitcast"):
        step = body.get(_operands(step)[0])
    if step is None or step.opcode != "add":
        return None
    increment = next((n for n in (constant(name, body) for name in _operands(step)) if n is not None), None)
    return None if not increment else math.ceil(limit / increment)


def program_cost(hlo: str) -> Cost:
    """The cost of a TPU program from the text of its optimised HLO, loops counted as often as they go round and of
    branches the dearest."""
    computations, entry = _computations(hlo)
    costs: dict[str, Cost] = {}

    def cost(name: str) -> Cost:
        if name in costs:
            return costs[name]
        total = costs[name] = Cost()
        for instruction in computations[name]:
            cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.text)
            total.cycles += (math.inf if int(cycles[1]) >= 2**63 - 1 else float(cycles[1])) if cycles else 0.0
            opcode, text = instruction.opcode, instruction.text
            kind = opcode.removesuffix("-start")
            if kind in _COLLECTIVES:
                shapes = instruction.shapes
                if opcode.endswith("-start") and kind != "all-reduce":  # (operands, results, two counters)
                    shapes = [shape for shape in shapes if shape != ("u32", ())]
                    shapes = shapes[len(shapes) // 2 :]
                total.add(Cost(bytes={kind: sum(map(_num_bytes, shapes))}, count={kind: 1}, arrays=set(shapes)))
            elif opcode == "while":
                rounds = _rounds(instruction, computations)
                total.unknown_loops += rounds is None
                total.add(cost(re.search(r"body=%([\w.\-]+)", text)[1]), times=rounds or 1)
            elif opcode == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", text)
                names = branches[1] if branches else " ".join(re.findall(r"(?:true|false)_computation=%[\w.\-]+", text))
                found = [cost(branch) for branch in re.findall(r"%([\w.\-]+)", names)]
                total.add(max(found, key=lambda branch: branch.cycles))
            elif opcode in ("fusion", "call", "async-start"):
                called = re.search(r"(?:calls|to_apply)=%([\w.\-]+)", text)
                if called:  # a fusion has its own estimate
                    total.add(cost(called[1]), cycles=opcode != "fusion")
        return total

    return cost(entry)


def matmul_flops(jaxpr) -> float:
    """Floating point operations of all matrix products and convolutions of a traced program, for all devices together;
    of branches the dearest. Loops without a fixed length are not expected."""
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
            times = equation.params["length"] if name == "scan" else 1
            total += times * sum(matmul_flops(getattr(v, "jaxpr", v)) for v in inner)
    return total


# ---------------------------------------------------------------------------------------------------------------------
# Programs


class Program(NamedTuple):
    """Something to compile.

    Attributes:
      name: for the table.
      mesh: the mesh.
      batch_size: global.
      function, args, kwargs: `function.trace(*args, **kwargs)`; the arguments are shapes with their shardings.
      trained: parameters that are trained, as shapes; None: nothing is.
      parameters: all parameters, as shapes with shardings.
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


def training_step(name: str, config, devices: list) -> Program:
    """The step that `titok_jax.train` runs.

    Raises:
      ValueError: a bad field, or a batch or mesh that does not fit the devices.
    """
    import jax

    from titok_jax import sharding
    from titok_jax.inference import load_tokenizer_config
    from titok_jax.tasks import jit_step
    from titok_jax.tasks.build import build_task

    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    batch_size = config.data.batch_size
    sharding.check_batch_size(mesh, batch_size, config.gradient_accumulation)
    task = build_task(config, abstract=True)
    state = jax.eval_shape(task.begin, jax.random.key(0))
    shardings, frozen = sharding.state_shardings(mesh, state), sharding.state_shardings(mesh, task.frozen)
    model = next(iter(task.networks.values())).config
    if config.data.source.get("name") == "tokens":
        data = {"tokens": ((model.num_tokens,), "int32")}
    else:
        images = load_tokenizer_config(config.tokenizer) if config.task == "generator" else model
        data = {"image": ((images.image_size, images.image_size, 3), "uint8")}
    data["label"] = ((), "int32")
    batch = {
        key: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=sharding.batch_sharding(mesh))
        for key, (shape, dtype) in data.items()
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    args = (_placed(state, shardings), _placed(task.frozen, frozen), batch, key)
    trained = {name: network.trainable(state["params"][name]) for name, network in task.networks.items()}
    function = jit_step(task, mesh, shardings, frozen)
    return Program(name, mesh, batch_size, function, args, {}, trained, (args[0]["params"], args[1]))


def sampler(name: str, devices: list, images_per_device: int = 64) -> Program:
    """A published generator with its sampling settings, then its tokenizer's decoder, in bfloat16; the models whole on every
    device. Labels [B] to images.

    Raises:
      ValueError: an unknown generator.
    """
    import jax
    import jax.numpy as jnp

    from titok_jax import models, pretrained, sharding
    from titok_jax.inference import Generator, Tokenizer

    known = pretrained.known_configs()
    if ("generator", name) not in known:
        choices = ", ".join(model for kind, model in known if kind == "generator")
        raise ValueError(f"--sampler is {name!r}, expected one of {choices}")
    mesh = sharding.make_mesh(devices=devices)
    whole, batch_size = sharding.replicated(mesh), images_per_device * len(devices)
    tokenizer, generator = known["tokenizer", name], known["generator", name]
    parameters = [
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), models.abstract(config)[1])
        for config in (tokenizer, generator)
    ]
    settings = generator.sampling

    def sample(params, labels, key, first_index, scale, temperature):
        ids = Generator(generator, params[1], dtype="bfloat16")._sample(
            params[1],
            labels,
            key,
            first_index,
            scale,
            temperature,
            num_steps=settings.num_steps,
            schedule=settings.guidance_schedule,
            annealing=settings.softmax_temperature_annealing,
        )
        return Tokenizer(tokenizer, params[0], dtype="bfloat16")._decode(params[0], ids)

    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    labels = jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=sharding.batch_sharding(mesh))
    key, index = jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((), jnp.int32)
    args = (parameters, labels, key, index, scalar, scalar)
    function = jax.jit(sample, out_shardings=sharding.batch_sharding(mesh))
    return Program(f"sample {name}", mesh, batch_size, function, args, {}, None, parameters)


def compile_program(program: Program, slice_name: str) -> dict[str, Any]:
    """Compiles -> the row of the table: figures per device and step, and `problems`, which should be empty."""
    import jax

    chip = slice_chip(slice_name)
    row = {
        "name": program.name,
        "slice": slice_name,
        "mesh": {axis: size for axis, size in program.mesh.shape.items() if size > 1},
        "batch_size": program.batch_size,
        "effort": jax.config.jax_exec_time_optimization_effort,
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
    }
    start = time.perf_counter()
    with jax.set_mesh(program.mesh):
        traced = program.function.trace(*program.args, **program.kwargs)
        try:
            compiled = traced.lower(lowering_platforms=("tpu",)).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return row | {"problems": [f"does not fit: {str(error).splitlines()[0]}"]}
    row["compile_seconds"] = time.perf_counter() - start
    memory, cost = compiled.memory_analysis(), program_cost(compiled.as_text())
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
    """What is not as the mesh should give it, in words."""
    import jax

    problems = []
    if total_bytes > chip.hbm * 2**30:
        problems.append(f"takes {total_bytes / 2**30:.1f} GiB of {chip.hbm}")
    fsdp = program.mesh.shape["fsdp"]
    leaves = jax.tree.leaves(program.parameters)
    # Parameters that are cut, and are gathered in bfloat16 at least once.
    cut = sum(leaf.size for leaf in leaves if not leaf.sharding.is_fully_replicated)
    gathered = sum(cost.bytes.get(kind, 0) for kind in ("all-gather", "collective-permute", "all-to-all"))
    reduced = sum(cost.bytes.get(kind, 0) for kind in ("all-reduce", "reduce-scatter"))
    trained = sum(leaf.size for leaf in jax.tree.leaves(program.trained))  # gradients are in bfloat16 at least
    if fsdp > 1 and gathered + reduced < 2 * cut:
        problems.append(f"{(gathered + reduced) / 1e6:.0f} MB are exchanged, less than the parameters that are cut")
    if fsdp == 1 and program.trained is not None and program.mesh.size > 1 and gathered + reduced < 1.9 * trained:
        problems.append(f"{reduced / 1e6:.0f} MB are reduced, less than the gradients")
    if program.trained is None and gathered + reduced > 1e6:
        problems.append(f"{(gathered + reduced) / 1e6:.0f} MB are exchanged, though every image is made on one device")
    # An array with the whole batch in front, larger than any parameter of that shape, is what no device should ever hold.
    parameters = {tuple(sorted(n for n in leaf.shape if n > 1)) for leaf in leaves}
    stacked = {tuple(sorted(n for n in leaf.shape[1:] if n > 1)) for leaf in leaves}
    for kind, dims in sorted(cost.arrays):
        large = [n for n in dims if n > 1]
        whole = large and large[0] == program.batch_size and tuple(sorted(large)) not in parameters | stacked
        if whole and _num_bytes((kind, dims)) > 2**20:
            problems.append(f"the whole batch is exchanged: {kind}{list(dims)}")
    return problems


# ---------------------------------------------------------------------------------------------------------------------
# The table

_REMAT, _FSDP16 = "--config.remat=True", "--config.mesh.fsdp=16"
_ACCUMULATION = "--config.gradient_accumulation={}".format
_LOW = "--effort=-0.3"  # training through a pixel decoder and a discriminator takes the compiler hours otherwise
_LOWEST = "--effort=-1"

Row = tuple[str, str, tuple[str, ...]]  # recipe or sampler, slice, options

# What is compiled so well that the estimated time says something.
TIMED: tuple[Row, ...] = (
    ("configs/generator.py:l32", "v5e-16", ()),
    ("configs/generator.py:b64", "v4-32", ()),
    ("configs/generator.py:l32", "v5p-32", ()),
    ("configs/generator.py:s128", "v5p-32", ()),
    ("configs/generator.py:l64_512", "v5p-32", ()),
    ("configs/generator.py:l32", "v6e-64", ()),
    ("configs/generator.py:l32", "v6e-256", ()),
    ("titok_l32", "v5e-16", ()),
    ("titok_b64", "v6e-64", ()),
    ("titok_s128", "v5p-32", ()),
    ("configs/stage1.py:l32", "v5e-16", (_REMAT,)),
    ("configs/stage1.py:l32", "v5e-16", (_REMAT, _FSDP16)),
    ("configs/stage1.py:l32", "v4-8", (_REMAT, _ACCUMULATION(4))),
    ("configs/stage1.py:l32", "v5p-32", ()),
    ("configs/stage1.py:b64", "v4-32", ()),
    ("configs/stage1.py:s128", "v5e-16", ()),
    ("configs/maskgit_vqgan.py:imagenet256", "v5e-16", (_LOW,)),
    ("configs/maskgit_vqgan.py:imagenet256", "v5p-32", (_LOW,)),
    ("configs/stage2.py:l32", "v5e-16", (_REMAT, "--config.mesh.fsdp=2", _LOW)),
    ("configs/stage2.py:b64", "v5e-16", (_REMAT, _LOW)),
    *((f"configs/stage2.py:{variant}", "v5p-32", (_LOW,)) for variant in ("l32", "b64", "s128")),
    ("configs/single_stage.py:bl64_vq8k", "v5e-16", (_REMAT, _ACCUMULATION(2), _LOW)),
    *(
        (f"configs/single_stage.py:{variant}", "v5p-32", (_LOW,))
        for variant in ("bl64_vq8k", "bl128_vq8k", "sl256_vq8k", "ll32_vae", "bl64_vae", "bl128_vae")
    ),
)

# Every recipe for 256 pixels and every sampler on each of these slices; {slice: options that it needs there}.
ALL_SLICES = ("v4-32", "v5e-16", "v5p-32", "v6e-64", "v6e-256")
_SINGLE_STAGE = {"v4-32": (_REMAT,), "v5e-16": (_REMAT, _ACCUMULATION(2))}
EVERYWHERE: dict[str, dict[str, tuple[str, ...]]] = {
    "configs/maskgit_vqgan.py:imagenet256": {},
    "configs/stage1.py:l32": {"v4-32": (_REMAT,)},
    "configs/stage1.py:b64": {"v5e-16": (_REMAT,)},
    "configs/stage1.py:s128": {},
    "configs/stage2.py:l32": {"v4-32": (_REMAT,)},
    "configs/stage2.py:b64": {},
    "configs/stage2.py:s128": {"v5e-16": (_REMAT,)},
    **{
        f"configs/single_stage.py:{variant}": _SINGLE_STAGE
        for variant in ("bl64_vq8k", "bl128_vq8k", "sl256_vq8k", "bl64_vae", "bl128_vae")
    },
    "configs/single_stage.py:ll32_vae": {"v4-32": (_REMAT,), "v5e-16": (_REMAT, "--config.mesh.fsdp=2")},
    "configs/generator.py:l32": {},
    "configs/generator.py:b64": {"v5e-16": (_REMAT,)},
    "configs/generator.py:s128": {"v4-32": (_REMAT,), "v5e-16": (_REMAT,)},
    "titok_l32": {},
    "titok_b64": {},
    "titok_s128": {},
}
# Those for 512 pixels on one slice, where the VQGAN is set to the one that has a name, as its sizes are the same; and the
# smallest slice in docs/tpu.md.
_VQGAN = "--config.vqgan=maskgit_vqgan"
OTHERS: tuple[Row, ...] = (
    ("configs/maskgit_vqgan.py:imagenet512", "v5p-32", (_LOWEST,)),
    ("configs/stage1.py:l64_512", "v5p-32", (_VQGAN, _REMAT, _LOWEST)),
    ("configs/stage1.py:b128_512", "v5p-32", (_VQGAN, _REMAT, _LOWEST)),
    ("configs/stage2.py:l64_512", "v5p-32", (_VQGAN, _REMAT, _LOWEST)),
    ("configs/stage2.py:b128_512", "v5p-32", (_VQGAN, _REMAT, _LOWEST)),
    ("configs/generator.py:b128_512", "v5p-32", (_REMAT, _LOWEST)),
    ("configs/stage2.py:l32", "v4-8", (_REMAT, _ACCUMULATION(4), _LOWEST)),
    ("configs/stage2.py:b64", "v4-8", (_REMAT, _ACCUMULATION(4), _LOWEST)),
    ("configs/single_stage.py:bl64_vq8k", "v4-8", (_REMAT, _ACCUMULATION(4), _LOWEST)),
)
_timed = {(what, slice_name) for what, slice_name, _ in TIMED}
TABLE: tuple[Row, ...] = (
    *TIMED,
    *(
        (what, slice_name, (*options.get(slice_name, ()), _LOWEST))
        for what, options in EVERYWHERE.items()
        for slice_name in ALL_SLICES
        if (what, slice_name) not in _timed
    ),
    *OTHERS,
)


def fits(rows: Sequence[Mapping[str, Any]]) -> str:
    """Memory and what is sent, of each program (line) on each slice (column), as Markdown."""
    slices = [name for name in SLICES if any(row["slice"] == name for row in rows)]
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        name, *changes = row["name"].removeprefix("sample ").split(" ")
        if "flops" in row:
            cell = f"{row['total_bytes'] / 2**30:.1f} GiB"
            cell += f", {row['sent_bytes'] / 1e9:.1f} GB" if row["sent_bytes"] else ""
            cell += "".join(f", `{change}`" for change in changes)
        else:
            cell = row["problems"][0]
        line = lines.setdefault(f"sample {name}" if row["name"].startswith("sample ") else name, {})
        line[row["slice"]] = "; ".join([line[row["slice"]], cell]) if row["slice"] in line else cell
    head = ["| program | " + " | ".join(slices) + " |", "|---" * (1 + len(slices)) + "|"]
    return "\n".join(
        head + [f"| `{name}` | {' | '.join(line.get(s, '') for s in slices)} |" for name, line in lines.items()]
    )


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| program | slice | mesh | batch | memory GiB (arguments + temporaries) | TFLOP | collectives: MB made (number) "
        "| effort | estimate ms | of peak | compile s |",
        "|---|---|---|--:|--:|--:|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        mesh = ", ".join(f"{axis} {size}" for axis, size in row["mesh"].items()) or "one device"
        start = f"| `{row['name']}` | {row['slice']} | {mesh} | {row['batch_size']} | "
        if "flops" not in row:
            lines.append(start + f"{row['problems'][0]} | | | | | | |")
            continue
        collectives = ", ".join(
            f"{kind} {row['collective_bytes'][kind] / 1e6:,.0f} ({row['collective_count'][kind]:.0f})"
            for kind in sorted(row["collective_bytes"])
        )
        estimate = "none | "
        if row["estimated_seconds"] is not None:
            peak = row["flops"] / (row["estimated_seconds"] * slice_chip(row["slice"]).tflops * 1e12)
            estimate = f"{row['estimated_seconds'] * 1e3:.1f} | {peak:.0%}"
        lines.append(
            start + f"{row['total_bytes'] / 2**30:.1f} ({row['argument_bytes'] / 2**30:.1f} + "
            f"{row['temporary_bytes'] / 2**30:.1f}) | {row['flops'] / 1e12:.2f} | {collectives or 'none'} | "
            f"{row['effort']:g} | {estimate} | {row['compile_seconds']:.0f} |"
        )
    return "\n".join(lines)


def _read_rows(path: Path | epath.Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def _write_row(path: Path | epath.Path, row: Mapping[str, Any]) -> None:
    rows = [old for old in _read_rows(path) if (old["name"], old["slice"]) != (row["name"], row["slice"])]
    with new_file(path) as partial:
        partial.write_text(json.dumps([*rows, row], indent=1) + "\n", encoding="utf-8")


def _compile_all(results: Path | epath.Path) -> int:
    """Each program in its own process: the compiler's memory goes back, and if it dies, one row is lost."""
    order = [(row_name(what, options), slice_name) for what, slice_name, options in TABLE]
    done = {(row["name"], row["slice"]) for row in _read_rows(results)}
    for number, (name, (what, slice_name, options)) in enumerate(zip(order, TABLE, strict=True), 1):
        if name in done:
            continue
        print(f"[{number}/{len(TABLE)}] {' on '.join(name)}", flush=True)
        option = "--config" if what.startswith("configs/") else "--sampler"
        arguments = [option, what, "--slice", slice_name, "--results", str(results), *options]
        subprocess.run([sys.executable, "-m", "titok_jax.compile", *arguments])
    rows = {(row["name"], row["slice"]): row for row in _read_rows(results)}
    found = [rows[name] for name in order if name in rows]
    print(table([row for row in found if row["effort"] > -0.5]))
    print("\n" + fits(sorted(found, key=lambda row: row["name"])))
    problems = [f"{' on '.join(name)}: {'; '.join(rows[name]['problems'])}" for name in order if name in rows]
    problems = [line for line in problems if not line.endswith(": ")]
    problems += [f"{' on '.join(name)}: not compiled" for name in order if name not in rows]
    print("\n".join(["", *problems, f"{len(order)} programs, {len(problems)} with problems"]))
    return bool(problems)


def row_name(what: str, options: Sequence[str] = ()) -> str:
    """What the table calls a recipe with the changes among `options`, or a sampler."""
    if not what.startswith("configs/"):
        return f"sample {what}"
    changes = [option.removeprefix("--config.") for option in options if option.startswith("--config.")]
    return " ".join([what.removeprefix("configs/").replace(".py", ""), *changes])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m titok_jax.compile",
        description="Compiles training steps and samplers for TPU slices on a machine without a TPU: memory, operations, "
        "collectives, estimated time.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="FILE.py:VARIANT", help="a recipe; --config.FIELD=VALUE changes it")
    what.add_argument("--sampler", metavar="NAME", help="a published generator")
    what.add_argument("--all", action="store_true", help="everything in the tables of docs/tpu.md; takes hours")
    parser.add_argument("--slice", help=", ".join(SLICES))
    parser.add_argument(
        "--effort",
        type=float,
        default=0.0,
        help="that the compiler makes for speed: 0 as when a program is run; -1 compiles GAN trainings in minutes, and "
        "estimates three to six times the time (default: 0)",
    )
    parser.add_argument("--results", type=as_path, help="JSON file that the row is put into, also gs://")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    args, changes = _parser().parse_known_args(argv)
    if changes and not args.config:
        raise ValueError(f"unknown argument {changes[0]}")
    if args.all:
        if not args.results:
            raise ValueError("--all needs --results FILE, which keeps what is done")
        return _compile_all(args.results)
    if not args.slice:
        raise ValueError("--slice is not set: which slice to compile for")
    slice_chip(args.slice)
    if not -1 <= args.effort <= 1:
        raise ValueError(f"--effort is {args.effort}, expected -1 to 1")
    config = read_config(args.config, changes) if args.config else None
    devices = topology_devices(args.slice)
    import jax

    jax.config.update("jax_exec_time_optimization_effort", args.effort)
    if config is None:
        program = sampler(args.sampler, devices)
    else:
        program = training_step(row_name(args.config, changes), config, devices)
    row = compile_program(program, args.slice)
    if args.results:
        _write_row(args.results, row)
    print(table([row]))
    print("\n".join(f"problem: {problem}" for problem in row["problems"]) or "no problems")
    return bool(row["problems"])


if __name__ == "__main__":
    sys.exit(main())
