"""Compiling for slices: reading costs from a program, the mesh's collectives, and one small step by the TPU compiler."""

import importlib
import importlib.util
import json
import math
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from configs import common
from titok_jax import compile as compiling
from titok_jax.compiler import hlo, slices, tables
from titok_jax.models.attention import attention_rows
from titok_jax.runtime import chips
from titok_jax.training import flops
from titok_jax.training.build import build_task
from titok_jax.training.settings import parse_settings
from titok_jax.weights import known_models

ROOT = pathlib.Path(__file__).parents[1]

# A shortened program in the TPU compiler's format: a loop of 24 rounds holds a fusion, two collectives and an inner loop
# that counts in twos. A branch follows.
HLO = """
HloModule jit_step, is_scheduled=true

%fused (p: bf16[8,4]) -> bf16[8,4] {
  %p = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %inner = bf16[8,4]{1,0} add(%p, %p), backend_config={"window_config":{"estimated_cycles":"999"}}
  ROOT %scattered = f32[2,4]{1,0} reduce-scatter(%inner), dimensions={0}
}

%inner_condition (q: (u32[], bf16[8,4])) -> pred[] {
  %q = (u32[], bf16[8,4]) parameter(0)
  %i = u32[] get-tuple-element(%q), index=0
  %limit = u32[] constant(8)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%inner_body (r: (u32[], bf16[8,4])) -> (u32[], bf16[8,4]) {
  %r = (u32[], bf16[8,4]) parameter(0)
  %j = u32[] get-tuple-element(%r), index=0
  %two = u32[] constant(2)
  %next = u32[] add(%j, %two)
  %x = bf16[8,4] get-tuple-element(%r), index=1
  %sent = (bf16[8,4]{1,0}, bf16[8,4]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=3
  %received = bf16[8,4]{1,0} collective-permute-done(%sent)
  ROOT %both = (u32[], bf16[8,4]) tuple(%next, %received)
}

%condition (s: (s32[], bf16[8,4])) -> pred[] {
  %s = (s32[], bf16[8,4]) parameter(0)
  %k = s32[] get-tuple-element(%s), index=0
  %many = s32[] constant(24)
  ROOT %fewer = pred[] compare(%k, %many), direction=LT
}

%body (t: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %t = (s32[], bf16[8,4]) parameter(0)
  %l = s32[] get-tuple-element(%t), index=0
  %one = s32[] constant(1)
  %more = s32[] add(%l, %one)
  %y = bf16[8,4] get-tuple-element(%t), index=1
  %f = bf16[8,4]{1,0} fusion(%y), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"100"}}
  %whole = bf16[16,4]{1,0} all-gather(%f), channel_id=1, dimensions={0}
  %tuple = (u32[], bf16[8,4]) tuple(%l, %f)
  %loop = (u32[], bf16[8,4]) while(%tuple), condition=%inner_condition, body=%inner_body
  ROOT %result = (s32[], bf16[8,4]) tuple(%more, %f)
}

%cheap (u: f32[]) -> f32[] {
  ROOT %a = f32[] add(%u, %u), backend_config={"window_config":{"estimated_cycles":"1"}}
}

%dear (v: f32[]) -> f32[] {
  ROOT %b = f32[] multiply(%v, %v), backend_config={"window_config":{"estimated_cycles":"50"}}
}

ENTRY %main (w: bf16[8,4]) -> f32[] {
  %w = bf16[8,4]{1,0} parameter(0)
  %tuple.1 = (s32[], bf16[8,4]) tuple(%w, %w)
  %layers = (s32[], /*index=1*/bf16[8,4]{1,0:T(8,128)(2,1)}) while(%tuple.1), condition=%condition, body=%body
  %sum = (f32[10]{0}, f32[]) all-reduce(%w, %w), channel_id=9, to_apply=%cheap
  %kernel = bf16[8,4]{1,0} custom-call(%w), custom_call_target="tpu_custom_call", backend_config={KERNEL}
  ROOT %branch = f32[] conditional(%w, %w, %w), branch_computations={%cheap, %dear}
}
"""


# 1,500 cycles of a v5e at its peak, 1,000 exponentials in each of its lanes, and 15 cycles of its memory.
KERNEL = '"cost_estimate":{"flops":"197000000","transcendentals":"1024000","bytes_accessed":"8190","x":"0"}'


def test_a_kernels_time_is_that_of_its_operations_and_exponentials_or_of_its_bytes():
    def cycles(text, chip):
        return hlo.program_cost(HLO.replace("KERNEL", text), chip).cycles - hlo.program_cost(HLO).cycles

    v5e, v5p = chips.CHIPS["v5e"], chips.CHIPS["v5p"]
    assert cycles(KERNEL, v5e) == pytest.approx(1500 + 2 * 1000)
    assert cycles(KERNEL, v5p) == pytest.approx(1.75e9 * 197e6 / 459e12 + 2 * 500)  # two cores
    assert cycles(KERNEL.replace('"8190"', '"8190000"'), v5e) == pytest.approx(15_000)
    assert cycles(KERNEL + ',"window_config":{"estimated_cycles":"7"}', v5e) == 7
    assert cycles("", v5e) == 0


def test_a_programs_cost_counts_loops_as_often_as_they_go_round():
    cost = hlo.program_cost(HLO)
    assert cost.cycles == 24 * 100 + 50
    assert cost.count == {"reduce-scatter": 24, "all-gather": 24, "collective-permute": 24 * 4, "all-reduce": 1}
    assert cost.bytes == {
        "reduce-scatter": 24 * 2 * 4 * 4,
        "all-gather": 24 * 16 * 4 * 2,
        "collective-permute": 24 * 4 * 8 * 4 * 2,
        "all-reduce": 44,
    }
    assert cost.sent == sum(cost.bytes.values()) + 44
    assert cost.unknown_loops == 0
    assert hlo.program_cost(HLO.replace("%next = u32[] add", "%next = u32[] multiply")).unknown_loops == 1
    # The compiler writes this number where it has no estimate. Inside a fusion it does not matter.
    none = str(2**63 - 1)
    assert math.isinf(hlo.program_cost(HLO.replace('"100"', f'"{none}"')).cycles)
    assert hlo.program_cost(HLO.replace('"999"', f'"{none}"')).cycles == cost.cycles


def test_flops_are_those_of_matmuls_and_convolutions():
    @jax.checkpoint
    def layer(x, kernel):
        return jnp.tanh(x @ kernel), None

    def function(x, kernels, image, filters):
        x, _ = jax.lax.scan(layer, x, kernels)
        y = jax.lax.conv_general_dilated(image, filters, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        z = jax.lax.cond(x[0, 0] > 0, lambda: x @ x.T, lambda: jnp.zeros((3, 3)))
        return x.sum() + y.sum() + z.sum()

    shapes = ((3, 5), (7, 5, 5), (2, 8, 8, 4), (3, 3, 4, 6))
    jaxpr = jax.make_jaxpr(function)(*(jnp.zeros(shape) for shape in shapes)).jaxpr
    convolution = 2 * (2 * 4 * 4 * 6) * (3 * 3 * 4)
    assert flops.matmul_flops(jaxpr) == 7 * 2 * 3 * 5 * 5 + convolution + 2 * 3 * 3 * 5
    # A kernel counts for each program of its grid, and what is split over devices for each device.
    assert flops.matmul_flops(
        jax.make_jaxpr(lambda x: attention_rows(x, 2))(jnp.zeros((6, 33, 3, 256), "bfloat16")).jaxpr
    ) == (6 * 2 * 2 * 2 * 33 * 33 * 128)
    mesh = jax.sharding.AbstractMesh((4,), ("data",))
    split = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"))
    assert flops.matmul_flops(jax.make_jaxpr(split)(jnp.zeros((12, 5))).jaxpr) == 4 * 2 * 3 * 3 * 5
    # Each layer runs forward twice (checkpoint), and backward it has two products.
    only = jax.make_jaxpr(jax.grad(lambda k: jax.lax.scan(layer, jnp.ones((3, 5)), k)[0].sum()))(jnp.zeros((7, 5, 5))).jaxpr
    assert flops.matmul_flops(only) == 7 * 4 * 2 * 3 * 5 * 5


_STEPS = """
import json
import jax
jax.config.update("jax_num_cpu_devices", 8)
from titok_jax.compiler import hlo
from titok_jax.compiler import programs
from titok_jax.compiler import tables
from titok_jax import compile as compiling
from titok_jax.runtime import chips, sharding
from titok_jax.training.settings import parse_settings
from configs import generator

def look(**mesh):
    config = generator.get_config("smoke")
    config.model.update(hidden_size=256, num_heads=4, intermediate_size=1024, dropout=0.0, attn_dropout=0.0)
    config.model.update(num_tokens=8, codebook_size=4096)
    config.tokenizer, config.data.source.name = "", "tokens"
    config.mesh.update(mesh)
    program = programs.training_step("step", parse_settings(config, abstract=True), jax.devices())
    with sharding.on_mesh(program.mesh):
        compiled = program.function.trace(*program.args).lower().compile()
    cost = hlo.program_cost(compiled.as_text())
    problems = programs.find_problems(program, cost, 0, chips.CHIPS["v5e"])
    return cost.bytes, problems, compiled.memory_analysis().argument_size_in_bytes, sum(
        x.size for x in jax.tree.leaves(program.args[0]["params"]))

found = {
    "data": look(data=8, shard_optimizer=False),
    "sharded": look(data=8),
    "fsdp": look(data=1, fsdp=8),
}
sharding.hint, sharding.hint_gathered = lambda x, *names: x, lambda params, dtype: params
print(json.dumps(found | {"free": look(data=1, fsdp=8)}))
"""


def test_collectives_are_those_of_the_mesh():
    done = subprocess.run([sys.executable, "-c", _STEPS], cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    exchanged, problems, copied, parameters = found["data"]
    assert problems == []
    assert exchanged["all-reduce"] == pytest.approx(4 * parameters, rel=0.05)  # the gradients in float32, no more
    assert exchanged.get("all-gather", 0) < 0.01 * exchanged["all-reduce"]
    exchanged, problems, less, _ = found["sharded"]
    assert problems == []
    assert exchanged["all-reduce"] == pytest.approx(4 * parameters, rel=0.05)
    assert exchanged["all-gather"] == pytest.approx(4 * parameters, rel=0.05)  # the new parameters in float32, no more
    assert less < (1 / 4 + 3 / 4 / 8 + 0.05) * copied
    exchanged, problems, sharded, _ = found["fsdp"]
    assert problems == []
    embedding = (4096 + 11) * 256  # its rows are exchanged
    assert exchanged["all-gather"] > 0.95 * 4 * (parameters - embedding)  # every kernel, at least once
    assert sharded < 0.25 * copied
    # Left alone, the partitioner would gather the batch; the check reports it.
    assert any("the whole batch is exchanged" in problem for problem in found["free"][1])


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed: pip install libtpu"
)
def test_a_small_step_compiles_for_a_tpu_slice(tmp_path):
    results = tmp_path / "rows.json"
    command = [sys.executable, "-m", "titok_jax.compile", "--config", "configs/generator.py:smoke", "--slice", "v5e-4"]
    done = subprocess.run([*command, "--results", results], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(results.read_text())
    assert row["problems"] == []
    assert row["mesh"] == {"data": 4}
    task = build_task(
        parse_settings(importlib.import_module("configs.generator").get_config("smoke"), abstract=True), abstract=True
    )
    state = jax.eval_shape(task.init, jax.random.key(0))
    parameters = sum(x.size for x in jax.tree.leaves(state["params"]))
    # Computation is in float32, but the TPU compiler multiplies in bfloat16 and sums most gradients over devices in it.
    assert 2 * parameters <= row["collective_bytes"]["all-reduce"] <= 4 * parameters
    memory = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state, task.frozen)))
    assert row["argument_bytes"] == pytest.approx(memory, rel=0.05)
    assert row["unknown_loops"] == 0
    assert 0 < row["estimated_seconds"] < 0.1


_ALL_SLICES = """
from titok_jax.compiler import slices
from titok_jax.runtime import sharding
for name in slices.SLICES:
    devices = slices.topology_devices(name)
    mesh = sharding.make_mesh(fsdp=2, devices=devices)
    print(name, len(devices), len({getattr(device, "slice_index", 0) for device in devices}), mesh.shape["data"])
    assert {device.device_kind for device in devices} <= set(slices.slice_chip(name).device_kinds), devices[0].device_kind
"""


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed: pip install libtpu"
)
def test_every_slice_can_be_described():
    """Its name counts what Google counts, and each has a mesh that splits its axes."""
    done = subprocess.run([sys.executable, "-c", _ALL_SLICES], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, *numbers in map(str.split, done.stdout.splitlines()):
        chips, number, data = map(int, numbers)
        counted = int(name.rpartition("-")[2]) // (2 if slices.slice_chip(name).topology in ("v4", "v5p") else 1)
        assert (chips, number) == (counted * number, 2 if name.startswith("2x") else 1)
        assert data == chips // 2
    assert name == [*slices.SLICES][-1]


_KERNELS = """
import sys
from titok_jax.compiler import hlo, slices
name, *shapes = sys.argv[1:]
devices = slices.topology_devices(name)
import jax, jax.numpy as jnp
from titok_jax.models.attention import attention
from titok_jax.runtime import sharding

mesh = sharding.make_mesh(tensor=2, devices=devices)
place = jax.sharding.NamedSharding(mesh, jax.P(("data", "fsdp")))
rows = 4 * mesh.shape["data"]
for length, num_heads, width in (map(int, shape.split(",")) for shape in shapes):
    def loss(x, kernel):
        qkv = jnp.einsum("bld,dce->blce", x, kernel)
        return jnp.square(attention(qkv, num_heads).astype(jnp.float32)).sum()

    x = jax.ShapeDtypeStruct((rows, length, width), jnp.bfloat16, sharding=place)
    along_heads = jax.sharding.NamedSharding(mesh, jax.P(None, None, "tensor"))
    kernel = jax.ShapeDtypeStruct((width, 3, width), jnp.bfloat16, sharding=along_heads)
    with sharding.on_mesh(mesh):
        text = jax.jit(jax.grad(loss, (0, 1))).trace(x, kernel).lower(lowering_platforms=("tpu",)).compile().as_text()
    cost = hlo.program_cost(text, slices.slice_chip(name))
    copied = sum("copy(" in line and f"{length},{width // 2}]" in line for line in text.splitlines())
    print(length, text.count('custom_call_target="tpu_custom_call"'), cost.cycles > hlo.program_cost(text).cycles, copied)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed: pip install libtpu"
)
@pytest.mark.parametrize("name", ["v4-8", "v5e-4", "v5p-32", "v6e-64"])
def test_the_kernel_of_attention_compiles_for_every_chip(name):
    """Forward and backward, with half of the heads on each device: a short sequence of narrow heads, usual ones, and the
    longest. The compiler copies no query, key or value into another layout."""
    shapes = ("65,16,768", "289,16,1024", "321,12,768", "1153,12,768")
    done = subprocess.run([sys.executable, "-c", _KERNELS, name, *shapes], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [f"{shape.split(',')[0]} 2 True 0" for shape in shapes]


def test_everything_is_compiled_once_each_in_its_own_process(tmp_path, monkeypatch, capsys):
    results, calls = tmp_path / "rows.json", []
    row = {"mesh": {"data": 16}, "batch_size": 8, "effort": -0.3, "problems": []}
    figures = (
        "argument_bytes",
        "temporary_bytes",
        "total_bytes",
        "flops",
        "estimated_seconds",
        "compile_seconds",
        "sent_bytes",
    )
    row |= dict.fromkeys(figures, 2**30) | {"collective_bytes": {"all-reduce": 5e6}, "collective_count": {"all-reduce": 3}}
    results.write_text(json.dumps([row | {"name": "stage1:l32", "slice": "v5e-16"}]))

    def run(command):
        calls.append(command[3:])
        if "--config" in command:  # the other dies
            options = dict(zip(command[3::2], command[4::2], strict=False))
            name = tables.row_name(options["--config"], command[9:])
            named = {"name": name, "slice": options["--slice"], "estimated_seconds": None}
            compiling._write_row(results, row | named | {"problems": ["too large"], "effort": 0})

    programs = (
        ("configs/stage1.py:l32", "v5e-16", ()),
        ("configs/stage1.py:l32", "v6e-64", ("--config.remat=True", "--effort=-0.5")),
        ("titok_l32", "v4-32", ()),
    )
    monkeypatch.setattr(compiling, "TABLE", programs)
    monkeypatch.setattr(compiling.subprocess, "run", run)
    assert compiling.main(["--all", "--results", str(results)]) == 1
    assert calls == [
        ["--config", programs[1][0], "--slice", "v6e-64", "--results", str(results), "--config.remat=True", "--effort=-0.5"],
        ["--sampler", "titok_l32", "--slice", "v4-32", "--results", str(results)],
    ]
    printed = capsys.readouterr().out
    assert "| `stage1:l32` | v5e-16 | data 16 | 8 | 1.0 (1.0 + 1.0) | 0.00 | all-reduce 5 (3) | -0.3 |" in printed
    assert (
        "| `stage1:l32 remat=True` | v6e-64 | data 16 | 8 | 1.0 (1.0 + 1.0) | 0.00 | all-reduce 5 (3) | 0 | none |  | "
        in printed
    )
    assert "stage1:l32 remat=True on v6e-64: too large\nsample titok_l32 on v4-32: not compiled\n" in printed
    assert len(json.loads(results.read_text())) == 2


def test_a_slice_has_gclouds_name_too():
    names = ("v5litepod-16", "v5e-16", "2xv5litepod-256", "v5p-128")
    assert [slices.named_slice(name) for name in names] == ["v5e-16", "v5e-16", "2xv5e-256", "v5p-128"]


def test_the_table_has_every_recipe_on_every_slice():
    two_stage = list(common.TWO_STAGE)
    variants = {"stage1": two_stage, "stage2": two_stage} | {
        name: list(importlib.import_module(f"configs.{name}").VARIANTS)
        for name in ("maskgit_vqgan", "single_stage", "generator")
    }
    recipes = [f"configs/{name}.py:{v}" for name, found in variants.items() for v in found if not v.startswith("smoke")]
    large = [recipe for recipe in recipes if "512" in recipe]
    samplers = [name for kind, name in known_models.known_configs() if kind == "generator"]
    compiled = {(what, slice_name) for what, slice_name, _ in tables.TABLE}
    assert len(recipes) == 23
    assert len(samplers) == 3
    for slice_name in ("v4-32", "v5e-16", "v5p-32", "v6e-64", "v6e-256"):
        assert [what for what in {*recipes, *samplers} - {*large} if (what, slice_name) not in compiled] == []
    assert [what for what in large if (what, "v5p-32") not in compiled] == []
    names = [(tables.row_name(what, options), slice_name) for what, slice_name, options in tables.TABLE]
    assert len(set(names)) == len(names)


def test_what_fits_where_is_one_line_per_program():
    row = {"total_bytes": 2**31, "sent_bytes": 1.26e9, "flops": 1}
    found = tables.fits(
        [
            row | {"name": "stage1:l32", "slice": "v6e-64"},
            row | {"name": "stage1:l32 remat=True mesh.fsdp=16", "slice": "v4-8"},
            row | {"name": "stage1:l32 remat=True", "slice": "v4-8"},
            row | {"name": "sample titok_l32", "slice": "v6e-64", "sent_bytes": 0},
            {"name": "stage2:l32", "slice": "v4-8", "problems": ["does not fit"]},
        ]
    )
    assert found.splitlines() == [
        "| program | v4-8 | v6e-64 |",
        "|---|---|---|",
        "| `stage1:l32` | 2.0 GiB, 1.3 GB, `remat=True`, `mesh.fsdp=16`; 2.0 GiB, 1.3 GB, `remat=True` | 2.0 GiB, 1.3 GB |",
        "| `sample titok_l32` |  | 2.0 GiB |",
        "| `stage2:l32` | does not fit |  |",
    ]


def test_wrong_arguments_end_with_one_line(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    for arguments, message in [
        (("--config", "x.py", "--slice", "v5e-15"), "--slice is 'v5e-15', expected one of v4-8"),
        (("--config", "x.py"), "--slice is not set"),
        (("--sampler", "titok_l32", "--config.mesh.fsdp=2"), "unknown argument --config.mesh.fsdp=2"),
        (("--sampler", "titok_l32", "--slice", "v5e-16", "--effort", "2"), "--effort is 2, expected a number from -1 to 1"),
        (("--all",), "--all needs --results"),
        (
            ("--config", "configs/stage1.py:l33", "--slice", "v5e-16"),
            "--config configs/stage1.py:l33: variant 'l33', expected one of ['l32', ",
        ),
    ]:
        assert compiling.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {message}")
        assert error.count("\n") == 1


def test_a_step_is_compiled_for_the_platform_of_the_mesh():
    """Where a model chooses by platform, it must choose what the slice would run, not what this machine would run."""
    from jax.sharding import AbstractMesh

    from titok_jax.runtime.sharding import target_platform

    assert target_platform() == jax.default_backend()
    device = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device)):
        assert target_platform() == "tpu"
