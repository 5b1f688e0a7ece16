"""Placement rules: every large parameter of a published model is sharded along fsdp, unless its size does not divide."""

import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import titok_jax
from titok_jax import models
from titok_jax.models.generator import GeneratorConfig
from titok_jax.models.titok import TRANSFORMER_SIZES, TiTokConfig
from titok_jax.runtime import sharding
from titok_jax.training.optimizer import OptimizerConfig
from titok_jax.training.tasks import stage1

ROOT = pathlib.Path(__file__).parents[1]
MESH = {"data": 1, "fsdp": 4, "tensor": 2}


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("encoder/transformer/attn/qkv/kernel", (24, 1024, 3, 1024), P(None, "fsdp", None, "tensor")),
        ("opt/tokenizer/0/mu/encoder/transformer/attn/proj/kernel", (24, 1024, 1024), P(None, "tensor", "fsdp")),
        ("layers/mlp/fc1/kernel", (24, 768, 3072), P(None, "fsdp", "tensor")),
        ("ema/generator/layers/mlp/fc2/kernel", (24, 3072, 768), P(None, "tensor", "fsdp")),
        ("embeddings/word_embeddings", (5098, 768), P(None, "fsdp")),
        ("convnext/stages/2/dwconv/kernel", (27, 7, 7, 1, 384), P()),
        ("layers/mlp/fc1/bias", (24, 4096), P()),
        ("pixel_decoder/mid/0/conv1/kernel", (3, 3, 512, 512), P()),
        ("layers/mlp/fc1/kernel", (24, 128, 256), P()),  # one layer is small
        ("lm_head/kernel", (768, 4097), P("fsdp", None)),  # 4097 does not divide by 2
        ("encoder/ln_pre/scale", (1024,), P()),  # small
        ("step", (), P()),
    ],
)
def test_rules(path, shape, expected):
    assert sharding.param_spec(path, shape, MESH) == expected


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("params/tokenizer/mlp/fc1/kernel", (24, 1024, 4096), P(None, "fsdp", "tensor")),
        ("opt/tokenizer/0/mu/mlp/fc1/kernel", (24, 1024, 4096), P(None, "fsdp", ("tensor", "data"))),
        ("ema/tokenizer/mlp/fc1/kernel", (24, 1024, 4096), P(None, "fsdp", ("tensor", "data"))),
        ("opt/tokenizer/0/nu/mlp/fc1/bias", (24, 4096), P(None, "data")),
        ("ema/tokenizer/up/0/conv1/kernel", (3, 3, 512, 256), P(None, None, "data", None)),
        ("ema/tokenizer/decoder/positional_embedding", (257, 1023), P()),  # does not divide
        ("opt/tokenizer/0/count", (), P()),
    ],
)
def test_optimizer_states_and_averages_are_sharded_along_data_too(path, shape, expected):
    mesh = jax.sharding.AbstractMesh((4, 2, 2), sharding.AXES)
    leaf = jax.ShapeDtypeStruct(shape, np.float32)
    state = functools.reduce(lambda tree, name: {name: tree}, reversed(path.split("/")), leaf)
    (place,) = jax.tree.leaves(sharding.state_shardings(mesh, state, shard_optimizer=True))
    assert place.spec == expected


@pytest.mark.parametrize(
    "config",
    [
        TiTokConfig(encoder=TRANSFORMER_SIZES["large"], decoder=TRANSFORMER_SIZES["large"]),
        GeneratorConfig(),
        GeneratorConfig(model_type="UViT", num_tokens=128, hidden_size=1024, num_layers=20, intermediate_size=4096),
    ],
)
def test_memory_of_published_models_falls_with_fsdp(config):
    _, params = models.abstract(config)
    mesh = {"data": 1, "fsdp": 8, "tensor": 1}
    total = local = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "pixel_decoder" in name:  # its convolutions are replicated
            continue
        cuts = sum(axis is not None for axis in sharding.param_spec(name, leaf.shape, mesh))
        size = math.prod(leaf.shape)
        total, local = total + size, local + size // (8 if cuts else 1)
    assert local < 1.03 * total / 8  # small parameters are replicated


def test_mesh_sizes():
    devices = jax.devices() * 8
    assert dict(sharding.make_mesh(devices=devices[:1]).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    with pytest.raises(ValueError, match="does not fit 1 devices"):
        sharding.make_mesh(2, 1, 1)
    with pytest.raises(ValueError, match="does not fit 1 devices"):
        sharding.make_mesh(-1, -1, 1)


@dataclasses.dataclass(frozen=True)
class Chip:
    """Stands for a TPU chip, with all that the arrangement of a mesh reads."""

    id: int
    coords: tuple[int, int, int]
    process_index: int
    slice_index: int
    device_kind: str
    platform: str = "tpu"
    core_on_chip: int = 0


PLANES = ("2x2x1", "2x4x1", "4x4x1", "4x8x1", "8x8x1", "8x16x1", "16x16x1")
BOXES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")


def chips(kind: str, shape: str, slices: int = 1) -> list[Chip]:
    """The chips of some slices, in the order of `jax.devices()`: by process. Each process has 2x2 chips."""
    x, y, z = map(int, shape.split("x"))
    found = []
    for index, k, j, i in itertools.product(range(slices), range(z), range(y), range(x)):
        host = ((index * z + k) * (y // 2) + j // 2) * (x // 2) + i // 2
        found.append(Chip(len(found), (i, j, k), host, index, kind))
    return sorted(found, key=lambda chip: (chip.process_index, chip.id))


def powers(largest: int) -> list[int]:
    return [2**i for i in range(largest.bit_length())]


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("TPU v4", BOXES),
        ("TPU v5", BOXES),  # v5p
        ("TPU v5p", BOXES[:3]),  # JAX has a ring of its own for 2x2x2
        ("TPU v5 lite", PLANES),  # v5e
        ("TPU v6 lite", PLANES),
    ],
)
def test_every_pod_has_every_mesh(kind, shapes):
    for shape, slices in itertools.product(shapes, (1, 2, 4)):
        devices = chips(kind, shape, slices)
        size = len(devices) // slices
        for fsdp, tensor in itertools.product(powers(size), powers(size)):
            if size % (fsdp * tensor):
                continue
            mesh = sharding.make_mesh(-1, fsdp, tensor, devices=devices)
            assert mesh.devices.shape == (len(devices) // (fsdp * tensor), fsdp, tensor)
            assert set(mesh.devices.flat) == set(devices)
            owners = [{chip.slice_index for chip in group.flat} for group in mesh.devices]
            assert all(len(owner) == 1 for owner in owners), "fsdp or tensor crosses slices"
            blocks = sharding.process_blocks(mesh)
            assert blocks.keys() == {chip.process_index for chip in devices}
            assert sorted(itertools.chain(*set(blocks.values()))) == list(range(len(devices) // tensor))


def test_a_mesh_that_jax_makes_keeps_its_order():
    """An axis is split only where it must be, so a run keeps the order of devices that it began with."""
    devices = chips("TPU v5", "4x4x4")
    for sizes in ((64, 1, 1), (16, 4, 1), (4, 16, 1), (1, 64, 1), (4, 4, 4)):
        theirs = jax.make_mesh(sizes, sharding.AXES, devices=devices)
        assert (sharding.make_mesh(*sizes, devices=devices).devices == theirs.devices).all()


def test_a_mesh_across_slices_is_checked():
    devices = chips("TPU v5 lite", "4x4x1", 2)
    assert sharding.make_mesh(fsdp=16, dcn_data=2, devices=devices).shape["data"] == 2
    with pytest.raises(ValueError, match="fsdp=32, tensor=1 does not fit 2 TPU slices of 16 devices: data must be a"):
        sharding.make_mesh(fsdp=32, devices=devices)
    with pytest.raises(ValueError, match=r"dcn_data=4 does not fit the devices, which belong to 2 TPU slice\(s\)"):
        sharding.make_mesh(dcn_data=4, devices=devices)
    with pytest.raises(ValueError, match=r"dcn_data=2 does not fit the devices, which belong to 1 TPU slice\(s\)"):
        sharding.make_mesh(dcn_data=2)


def test_batch_size_is_checked():
    mesh = sharding.make_mesh()
    sharding.check_batch_size(mesh, 12, 4)
    with pytest.raises(ValueError, match="multiple of 5"):
        sharding.check_batch_size(mesh, 12, 5)


def test_a_function_on_a_mesh_is_traced_with_the_mesh_set():
    def on_a_mesh(x):
        return x + (not jax.sharding.get_abstract_mesh().empty)

    assert sharding.jit_on(sharding.make_mesh(), on_a_mesh)(0) == 1
    assert sharding.jit_on(None, on_a_mesh)(0) == 0


@pytest.mark.parametrize(
    ("shape", "processes", "blocks"),
    [  # each device's process, in the order of the mesh; each process's blocks
        ((4, 1, 1), [0, 0, 1, 1], [(0, 1), (2, 3)]),
        ((2, 2, 1), [1, 1, 0, 0], [(2, 3), (0, 1)]),
        ((2, 1, 2), [0, 0, 1, 1], [(0,), (1,)]),
        ((1, 1, 4), [0, 0, 1, 1], [(0,), (0,)]),
        ((1, 2, 4), [0, 0, 1, 1, 2, 2, 3, 3], [(0,), (0,), (1,), (1,)]),
        ((2, 1, 2), [0, 1, 0, 1], [(0, 1), (0, 1)]),
        ((4, 1, 1), [0, 1, 0, 1], [(0, 2), (1, 3)]),
    ],
)
def test_a_process_reads_the_blocks_of_its_devices(monkeypatch, shape, processes, blocks):
    devices = np.array([types.SimpleNamespace(process_index=process) for process in processes]).reshape(shape)
    mesh = types.SimpleNamespace(devices=devices, shape=dict(zip(sharding.AXES, shape, strict=True)))
    for process, own in enumerate(blocks):
        monkeypatch.setattr(sharding.jax, "process_index", lambda process=process: process)
        assert sharding.batch_part(mesh) == {"blocks": own, "num_blocks": shape[0] * shape[1]}


def test_processes_that_share_some_of_their_rows_are_refused():
    devices = np.array([types.SimpleNamespace(process_index=process) for process in (0, 0, 1, 1, 2, 2)]).reshape(2, 1, 3)
    mesh = types.SimpleNamespace(devices=devices, shape={"data": 2, "fsdp": 1, "tensor": 3})
    with pytest.raises(ValueError, match="3 processes would share their rows of a batch in part"):
        sharding.batch_part(mesh)


def test_a_batch_is_put_whole_on_one_device():
    batch = {"label": np.arange(4, dtype=np.int32)}
    placed = sharding.put_batch(sharding.make_mesh(), batch)
    np.testing.assert_array_equal(placed["label"], batch["label"])


def python_on_eight_devices(*arguments: str, **env: str) -> subprocess.CompletedProcess:
    """Runs Python on 8 simulated devices, with the modules of tests."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_NUM_CPU_DEVICES": "8", **env}
    run = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return run


ON_EIGHT_DEVICES = """
import json
import jax, numpy as np, titok_jax
import on_meshes
from titok_jax.runtime import sharding
results, jit_on = [], sharding.jit_on
sharding.SMALLEST_SHARDED = 2**15  # the digits' kernels are small
for shape in ((2, 2, 2), (1, 8, 1)):
    tokenizer, generator = titok_jax.load_pair("digits", mesh=sharding.make_mesh(*shape))
    kernel = generator.params["layers"]["mlp"]["fc1"]["kernel"]
    assert kernel.shape == (4, 128, 512), kernel.shape
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(4, 128 // shape[1], 512 // shape[2])}
    found = []
    def recorded(mesh, function, **static):
        real = jit_on(mesh, function, **static)
        def call(*arguments, **options):
            result = real(*arguments, **options)
            with sharding.on_mesh(sharding.make_mesh(*shape)):
                text = real.__wrapped__.lower(*arguments, **options).compile().as_text()
            batch = result[0] if isinstance(result, tuple) else result
            parts = {part.data.shape[0] for part in batch.addressable_shards}
            found.append([on_meshes.collectives(text), [len(batch), *parts]])
            return result
        return call
    sharding.jit_on = recorded
    labels = np.arange(56) % 10
    ids = np.asarray(titok_jax.generate(generator, labels, jax.random.key(0, impl="threefry2x32"), num_steps=3))
    images = np.asarray(tokenizer.decode(ids))
    again = np.asarray(tokenizer.encode(images))
    results.append({"shape": shape, "ids": ids.tolist(), "again": again.tolist(), "found": found,
                    "images": images.mean((1, 2, 3)).tolist()})
print(json.dumps(results))
"""


def test_a_pretrained_model_is_read_onto_its_shards_and_gives_the_same():
    """Generation, decoding and encoding. A device computes its own images and receives no others, except for token ids."""
    tokenizer, generator = titok_jax.load_pair("digits")
    ids = titok_jax.generate(generator, np.arange(56) % 10, jax.random.key(0, impl="threefry2x32"), num_steps=3)
    images = np.asarray(tokenizer.decode(ids))
    again = np.asarray(tokenizer.encode(images))
    for result in json.loads(python_on_eight_devices("-c", ON_EIGHT_DEVICES).stdout):
        np.testing.assert_array_equal(result["ids"], ids)
        np.testing.assert_allclose(result["images"], images.mean((1, 2, 3)), rtol=1e-4)
        assert np.mean(result["again"] == again) > 0.99  # the nearest code may differ where two are about equally near
        data, fsdp, _ = result["shape"]
        own = 56 // (data * fsdp)
        # Generation has its unconditional half too.
        for (sent, batch), twins in zip(result["found"], (2, 1, 1), strict=True):
            assert batch == [56, own]
            assert "all-gather" in sent
            assert not rows_of_others(sent, twins * own, 7), sent


def rows_of_others(sent: dict, rows: int, prime: int) -> list:
    """Arrays that devices exchange and that hold more rows of a batch than a device's own `rows`, except for token ids
    (integers). Only sizes of the batch are multiples of `prime`."""
    return [
        (kind, shape)
        for kind, arrays in sent.items()
        for dtype, shape in arrays
        if dtype.startswith(("f", "bf")) and any(size % prime == 0 and size > rows for size in shape)
    ]


LARGE = TRANSFORMER_SIZES["large"]
STAGE_1_L32 = TiTokConfig(encoder=LARGE, decoder=LARGE, is_legacy=True, finetune_decoder=False)
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-4,
    schedule="constant",
    warmup_steps=1,
    beta1=0.9,
    beta2=0.99,
    weight_decay=1e-4,
    max_grad_norm=1.0,
)


@pytest.mark.parametrize("fsdp", [2, 8, 64])
def test_memory_of_stage1_training_falls_with_fsdp(fsdp):
    """Bytes of L-32's parameters, optimizer and averages on one device, from the shapes of the shards."""
    task = stage1.make_task(STAGE_1_L32, stage1.LossConfig(), optimizer=OPTIMIZER, num_steps=10, vqgan=None)
    state = jax.eval_shape(task.begin, jax.random.key(0))
    mesh = jax.sharding.AbstractMesh((1, fsdp, 1), sharding.AXES)
    for part in ("params", "opt", "ema"):
        shards = sharding.state_shardings(mesh, state[part])
        total = local = 0
        for leaf, place in zip(jax.tree.leaves(state[part]), jax.tree.leaves(shards), strict=True):
            total += leaf.size * leaf.dtype.itemsize
            local += math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        assert total > 2e9 * (2 if part == "opt" else 1), part
        # Biases, normalisations and embeddings, 0.25 % of all, are replicated.
        assert local < total / fsdp + 0.0025 * total, part


def test_memory_of_stage1_training_falls_with_data():
    """The same for a sharded optimizer under data parallelism: parameters are whole, two thirds of the state are not."""
    task = stage1.make_task(STAGE_1_L32, stage1.LossConfig(), optimizer=OPTIMIZER, num_steps=10, vqgan=None)
    state, mesh = jax.eval_shape(task.begin, jax.random.key(0)), jax.sharding.AbstractMesh((16, 1, 1), sharding.AXES)
    local = {True: 0, False: 0}
    for shard_optimizer in local:
        shards = sharding.state_shardings(mesh, state, shard_optimizer=shard_optimizer)
        for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(shards), strict=True):
            local[shard_optimizer] += math.prod(place.shard_shape(leaf.shape)) * 4
    assert local[False] > 9.7e9
    assert local[True] < local[False] * (1 / 4 + 3 / 4 / 16 + 0.002)


INIT_ON_EIGHT_DEVICES = """
import json, sys
import jax
import test_sharding
from titok_jax.runtime import sharding
from titok_jax.training.tasks import stage1
task = stage1.make_task(
    test_sharding.STAGE_1_L32, stage1.LossConfig(), optimizer=test_sharding.OPTIMIZER, num_steps=10, vqgan=None
)
state, mesh = jax.eval_shape(task.begin, jax.random.key(0)), sharding.make_mesh(1, 8, 1)
begin = jax.jit(task.begin, out_shardings=sharding.state_shardings(mesh, state))
compiled = begin.lower(jax.random.key(0)).compile()
memory = compiled.memory_analysis()
total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
print(json.dumps([total, memory.output_size_in_bytes, memory.temp_size_in_bytes, compiled.as_text().count("all-")]))
"""


def test_the_first_state_is_made_on_its_shards():
    """The first state of stage 1 of L-32, as `train` makes it. Of 8 devices, each needs memory only for its own shards, even
    while the state is made, and no device sends anything."""
    run = python_on_eight_devices("-c", INIT_ON_EIGHT_DEVICES)
    total, kept, temporary, sent = json.loads(run.stdout)
    assert total > 9e9
    assert kept < total / 8 + 0.002 * total  # biases, normalisations and embeddings are replicated
    assert temporary < 0.02 * total  # a few times an eighth of the largest parameter's random numbers
    assert not sent


NAMES = ("maskgit_vqgan", "stage1", "stage2", "single_stage", "generator")
TASKS = pytest.mark.parametrize("task", NAMES)
# The mesh with all axes always runs; meshes along a single axis are marked `long`.
MESHES = pytest.mark.parametrize(
    "meshes",
    [
        pytest.param(("1,1,1", "2,2,2"), id="all"),
        pytest.param(("1,1,1", "8,1,1", "1,8,1"), id="one", marks=pytest.mark.long),
    ],
)


@functools.cache
def on_meshes(task: str, meshes: tuple[str, ...]) -> dict:
    """{mesh: losses, collectives and placement of a task}, see on_meshes.py."""
    return json.loads(python_on_eight_devices(str(ROOT / "tests/on_meshes.py"), task, *meshes).stdout)


@TASKS
@MESHES
def test_every_task_gives_the_same_on_every_mesh(task, meshes):
    """Losses, gradient norms, GAN terms, LeCam's averages and the usage of codes refer to the global batch."""
    found = on_meshes(task, meshes)
    for mesh in meshes[1:]:
        for step, (one, other) in enumerate(zip(found["1,1,1"]["metrics"], found[mesh]["metrics"], strict=True)):
            assert one.keys() == other.keys()
            for name, value in one.items():
                if value is None:
                    assert other[name] is None
                else:
                    # The discriminator's logits have both signs, so their mean is small beside them. In float32, after
                    # LeakyReLUs and one step of Adam, 1.3e-5 is seen. In float64 (below) the same agrees to 1e-12.
                    atol = 3e-5 if name.endswith("gan_loss") or name.startswith("logits_") else 3e-7
                    np.testing.assert_allclose(other[name], value, 5e-5, atol, err_msg=f"{name}, step {step}, mesh {mesh}")


IN_FLOAT64 = "import sys, in_float64, on_meshes; on_meshes.STEPS, on_meshes.BATCH = 3, 4; on_meshes.main(*sys.argv[1:])"


@pytest.mark.parametrize(
    "task", [pytest.param(name, marks=() if name in ("single_stage", "generator") else pytest.mark.long) for name in NAMES]
)
def test_updates_are_the_same_on_every_mesh_in_float64(task):
    """Compares all that three steps log, and the state after them: parameters, moments, averages. In float32, Adam makes
    full steps of gradients that are rounding noise. In float64 this noise is far below its epsilon."""
    found = json.loads(python_on_eight_devices("-c", IN_FLOAT64, task, "1,1,1", "2,2,2").stdout)
    assert_same_in_float64(found["1,1,1"], found["2,2,2"])


@pytest.mark.long
def test_accumulated_gradients_are_those_of_the_batch_on_a_mesh():
    code, found = IN_FLOAT64.replace("BATCH = 3, 4", "BATCH, on_meshes.PARTS = 3, 8, {}"), {}
    for mesh, parts in (("1,1,1", 1), ("2,2,2", 2)):
        found |= json.loads(python_on_eight_devices("-c", code.format(parts), "single_stage", mesh).stdout)
    assert_same_in_float64(found["1,1,1"], found["2,2,2"])


def assert_same_in_float64(one: dict, other: dict) -> None:
    # Metrics agree to 1e-12, arrays to 4e-13 of their largest value. A wrongly decayed parameter would be off by 1e-7.
    for step, (metrics, others) in enumerate(zip(one["metrics"], other["metrics"], strict=True)):
        assert metrics.keys() == others.keys()
        for name, value in metrics.items():
            if value is None:
                assert others[name] is None
            else:
                np.testing.assert_allclose(others[name], value, 1e-10, 1e-12, err_msg=f"{name}, step {step}")
    assert one["state"].keys() == other["state"].keys()
    for name, (dtype, largest, *products) in one["state"].items():
        assert dtype in ("float64", "int32"), name
        # Gradients that should be 0, as for a bias before a normalisation, are 1e-18 here.
        np.testing.assert_allclose(other["state"][name][2:], products, 0, 1e-10 * largest + 1e-16, err_msg=name)


@pytest.mark.parametrize(
    "task",
    [pytest.param(name, marks=() if name in ("maskgit_vqgan", "generator") else pytest.mark.long) for name in NAMES],
)
def test_a_sharded_optimizer_gives_the_same_bits(task):
    """Three steps on a (4, 2, 1) mesh with and without; the gradient of the VQGAN is clipped. Of their two states, every
    array is compared. The compiler's flags are those of a user: without optimisation it rounds differently in pieces of an
    array."""
    code = "import sys, on_meshes; on_meshes.print_differences_of_a_sharded_optimizer(*sys.argv[1:])"
    found = json.loads(python_on_eight_devices("-c", code, task, "4,2,1", XLA_FLAGS="").stdout)
    assert found["sharded"] >= 10
    assert found["different"] == []
    assert (max(found["grad_norm"]) > OPTIMIZER.max_grad_norm) == (task == "maskgit_vqgan")


ACCUMULATION = """
import json
import jax, jax.numpy as jnp, numpy as np
from titok_jax.compiler.hlo import program_cost
from titok_jax.runtime import sharding
from titok_jax.training.accumulation import accumulate, map_parts
draw = np.random.default_rng(0).standard_normal
params, scale = {"kernel": draw((24, 40)), "bias": draw(40)}, draw(40)
rows, mesh = draw((64, 24)), sharding.make_mesh(8, 1, 1)
def apply(params, rows):
    return jnp.tanh(rows @ params["kernel"] + params["bias"])
def added(parts, params, scale, rows):
    def loss(params, rows):
        out = apply(params, rows) * scale
        return jnp.mean(out**2), ({"loss": jnp.mean(out**2)}, {"out": out})
    return accumulate(loss, params, rows, parts)
def mapped(parts, params, scale, rows):
    def loss(params):
        out = map_parts(apply, params, rows, parts) * scale
        return jnp.mean(out**2), ({"loss": jnp.mean(out**2)}, {"out": out})
    grads, (metrics, outputs) = jax.grad(loss, has_aux=True)(params)
    return grads, metrics, outputs
found = []
for function in (added, mapped):
    expected = jax.jit(function, static_argnums=0)(1, params, scale, rows)
    for parts in (1, 2, 4):
        places = sharding.replicated(mesh), sharding.replicated(mesh), sharding.batch_sharding(mesh)
        with sharding.on_mesh(mesh):
            compiled = jax.jit(lambda *a: function(parts, *a), in_shardings=places).lower(params, scale, rows).compile()
            result = compiled(params, scale, rows)
        # Sums of 24 products of size 1, in another order: a few units in the last place of the largest.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), result, expected)
        cost = program_cost(compiled.as_text())
        found.append([function.__name__, parts, cost.bytes, cost.count.get("all-reduce")])
print(json.dumps(found))
"""


def test_devices_send_as_much_for_any_number_of_accumulated_parts():
    found = json.loads(python_on_eight_devices("-c", ACCUMULATION).stdout)
    gradient = 4 * (24 * 40 + 40)
    for name, parts, sent, _ in found:
        assert set(sent) == {"all-reduce"}, (name, parts)
        assert gradient <= sent["all-reduce"] <= gradient + 16, (name, parts)  # and the loss


BATCH = 40  # as in on_meshes.py


@TASKS
@MESHES
def test_devices_send_what_the_docstring_says(task, meshes):
    for mesh, found in on_meshes(task, meshes).items():
        data, fsdp, tensor = map(int, mesh.split(","))
        sent = found["collectives"]
        gathered = [shape for dtype, shape in sent.get("all-gather", ()) if dtype.startswith(("f", "bf"))]
        rows = BATCH // (data * fsdp)
        assert not rows_of_others(sent, rows, 5), (mesh, sent)
        if mesh == "1,1,1":
            assert not sent
        elif fsdp == tensor == 1:
            assert set(sent) == {"all-reduce"}
        elif data == tensor == 1:
            # Only parameters are gathered, those of a stack one layer at a time.
            sharded = {
                name: shape[1:] if any(stack in name for stack in ("transformer/", "layers/", "stages/")) else shape
                for name, (shape, shard) in (found["placed"]["in"] | found["placed"]["frozen"]).items()
                if not name.startswith(("opt/", "ema/")) and shape != shard
            }
            sizes = set(map(math.prod, sharded.values()))
            assert gathered
            assert {math.prod(shape) for shape in gathered} <= sizes
        else:
            # Devices add partial sums over attention heads and MLP columns. Convolutions are not sharded along tensor.
            assert any(rows in shape for _, shape in sent["all-reduce"]) == (task != "maskgit_vqgan")
            if task == "generator":  # no loss gathers the logits [rows, 8, 64]; only their sums are exchanged
                assert [rows, 8] in [shape for _, shape in sent["all-reduce"]]
                assert not any(shape[:2] == [rows, 8] and shape[2] > 2 for shape in gathered)


@pytest.mark.parametrize("mesh", [pytest.param("1,8,1", marks=pytest.mark.long), "2,2,2"])
def test_the_forms_that_are_for_tpus_do_not_gather_the_batch(mesh):
    """Stage 2 has every kind of network: transformers, both decoders' convolutions, discriminator, ConvNeXt and VGG."""
    code = "import sys, on_meshes; on_meshes.print_collectives_of_tpu_forms(*sys.argv[1:])"
    sent = json.loads(python_on_eight_devices("-c", code, "stage2", mesh).stdout)[mesh]
    data, fsdp, _ = map(int, mesh.split(","))
    assert sent
    assert not rows_of_others(sent, BATCH // (data * fsdp), 5), mesh


@TASKS
@MESHES
def test_the_optimizer_and_the_average_are_sharded_as_their_parameters(task, meshes):
    for mesh, found in on_meshes(task, meshes).items():
        axes = dict(zip(sharding.AXES, map(int, mesh.split(",")), strict=True))
        count = 0
        for side in ("in", "out"):
            placed = found["placed"][side]
            for name, (shape, shard) in placed.items():
                if name.startswith("params/"):
                    _, network, path = name.split("/", 2)
                    copies = [n for n in placed if n.startswith(("opt/", "ema/")) and n.endswith("/" + path)]
                    copies = [n for n in copies if n.split("/")[1] == network]
                    assert len(copies) >= (2 if network == "discriminator" else 1)
                    assert all(placed[copy] == [shape, shard] for copy in copies), name
                    count += shape != shard
        if task == "maskgit_vqgan":  # has convolutions only
            assert count == 0
        else:
            assert (count >= 10) == (axes["fsdp"] * axes["tensor"] > 1)
