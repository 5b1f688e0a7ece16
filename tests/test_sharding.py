"""Placement rules: every large parameter of a published model is cut along fsdp, and nothing that is indivisible is."""

import functools
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import titok_jax
from titok_jax import models, sharding
from titok_jax.models.generator import GeneratorConfig
from titok_jax.models.titok import TRANSFORMER_SIZES, TiTokConfig
from titok_jax.tasks import stage1

MESH = {"data": 1, "fsdp": 4, "tensor": 2}


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("encoder/transformer/attn/qkv/kernel", (24, 1024, 3, 1024), P(None, "fsdp", None, "tensor")),
        ("opt/tokenizer/0/mu/encoder/transformer/attn/proj/kernel", (24, 1024, 1024), P(None, "tensor", "fsdp")),
        ("layers/mlp/fc1/kernel", (24, 768, 3072), P(None, "fsdp", "tensor")),
        ("ema/generator/layers/mlp/fc2/kernel", (24, 3072, 768), P(None, "tensor", "fsdp")),
        ("embeddings/word_embeddings", (5098, 768), P(None, "fsdp")),
        ("pixel_decoder/mid/0/conv1/kernel", (3, 3, 512, 512), P(None, None, None, "fsdp")),
        ("lm_head/kernel", (768, 4097), P("fsdp", None)),  # 4097 does not divide by 2
        ("encoder/ln_pre/scale", (1024,), P()),  # small
        ("step", (), P()),
    ],
)
def test_rules(path, shape, expected):
    assert sharding.param_spec(path, shape, MESH) == expected


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
        cuts = sum(axis is not None for axis in sharding.param_spec(name, leaf.shape, mesh))
        size = math.prod(leaf.shape)
        total, local = total + size, local + size // (8 if cuts else 1)
    assert local < 1.03 * total / 8  # what is small stays whole


def test_mesh_sizes():
    devices = jax.devices() * 8
    assert dict(sharding.make_mesh(devices=devices[:1]).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    with pytest.raises(ValueError, match="does not fit 1 devices"):
        sharding.make_mesh(2, 1, 1)
    with pytest.raises(ValueError, match="does not fit 1 devices"):
        sharding.make_mesh(-1, -1, 1)


def test_batch_size_is_checked():
    mesh = sharding.make_mesh()
    sharding.check_batch_size(mesh, 12, 4)
    with pytest.raises(ValueError, match="multiple of 5"):
        sharding.check_batch_size(mesh, 12, 5)


def test_a_batch_is_put_whole_on_one_device():
    batch = {"label": np.arange(4, dtype=np.int32)}
    placed = sharding.put_batch(sharding.make_mesh(), batch)
    np.testing.assert_array_equal(placed["label"], batch["label"])


ON_EIGHT_DEVICES = """
import jax, numpy as np, titok_jax
from titok_jax import sharding
mesh = sharding.make_mesh(2, 2, 2)
tokenizer, generator = titok_jax.load_pair("digits", mesh=mesh)
kernel = generator.params["layers"]["mlp"]["fc1"]["kernel"]
assert kernel.shape == (4, 128, 512), kernel.shape
assert {shard.data.shape for shard in kernel.addressable_shards} == {(4, 64, 256)}
ids = titok_jax.generate(generator, np.arange(8), jax.random.key(0))
images = np.asarray(tokenizer.decode(np.asarray(ids)))
assert np.isfinite(images).all()
print(np.asarray(generator.logits(np.full((2, 8), 128), [3, 10])).astype(np.float64).sum())
"""


def test_a_pretrained_model_is_read_onto_its_shards_and_gives_the_same():
    root = str(pathlib.Path(__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": root, "JAX_NUM_CPU_DEVICES": "8"}
    run = subprocess.run([sys.executable, "-c", ON_EIGHT_DEVICES], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    expected = np.asarray(titok_jax.load_generator("digits").logits(np.full((2, 8), 128), [3, 10])).astype(np.float64).sum()
    np.testing.assert_allclose(float(run.stdout), expected, rtol=1e-4)


LARGE = TRANSFORMER_SIZES["large"]
STAGE_1_L32 = TiTokConfig(encoder=LARGE, decoder=LARGE, is_legacy=True, finetune_decoder=False)
OPTIMIZER = {
    "learning_rate": 1e-4,
    "schedule": "constant",
    "warmup_steps": 1,
    "beta1": 0.9,
    "beta2": 0.99,
    "weight_decay": 1e-4,
    "max_grad_norm": 1.0,
}


@pytest.mark.parametrize("fsdp", [2, 8, 64])
def test_memory_of_stage1_training_falls_with_fsdp(fsdp):
    """Parameters, optimizer and averages of L-32: bytes on one device, by the shapes of the shards."""
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
        # What is small, 0.08 % of all, stays whole.
        assert local < total / fsdp + 0.0008 * total, part


# Compiled without optimisation, which takes half as long and changes nothing between devices.
FAST = {"XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"}


@functools.cache
def on_meshes(task: str, *meshes: str) -> dict:
    """{mesh: losses, collectives and placement of a task}: see on_meshes.py."""
    root = pathlib.Path(__file__).parents[1]
    env = {**os.environ, **FAST, "PYTHONPATH": str(root), "JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, root / "tests/on_meshes.py", task, *meshes]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


EVERY_MESH = ("1,1,1", "8,1,1", "1,8,1", "2,2,2")
CASES = [
    ("generator", EVERY_MESH),
    ("stage1", EVERY_MESH),
    ("stage2", ("1,1,1", "2,2,2")),  # single_stage: test_train.py
    pytest.param("single_stage", EVERY_MESH, marks=pytest.mark.soak),
    pytest.param("stage2", EVERY_MESH, marks=pytest.mark.soak),
]


@pytest.mark.parametrize(("task", "meshes"), CASES)
def test_every_task_gives_the_same_on_every_mesh(task, meshes):
    """Losses, gradient norms, GAN terms, LeCam's averages and the usage of codes, which are of the global batch."""
    found = on_meshes(task, *meshes)
    for mesh in meshes[1:]:
        for step, (one, other) in enumerate(zip(found["1,1,1"]["metrics"], found[mesh]["metrics"], strict=True)):
            assert one.keys() == other.keys()
            for name, value in one.items():
                if value is None:
                    assert other[name] is None
                else:
                    # The first two steps have the same parameters, as the first has the learning rate 0. Later Adam has
                    # made full steps of gradients that are rounding noise.
                    rtol = 2e-5 if step < 2 else 2e-3
                    np.testing.assert_allclose(other[name], value, rtol, 1e-7, err_msg=f"{name}, step {step}, mesh {mesh}")


BATCH = 40  # as in on_meshes.py; no other size in these models is a multiple of 5


@pytest.mark.parametrize(("task", "meshes"), CASES)
def test_devices_send_what_the_docstring_says(task, meshes):
    for mesh, found in on_meshes(task, *meshes).items():
        data, fsdp, tensor = map(int, mesh.split(","))
        sent = found["collectives"]
        # No device gets rows of the batch that another has, but for token ids.
        gathered = [shape for dtype, shape in sent.get("all-gather", ()) if dtype.startswith(("f", "bf"))]
        rows = BATCH // (data * fsdp)
        assert not any(size % 5 == 0 and size > rows for shape in gathered for size in shape), (mesh, gathered)
        if mesh == "1,1,1":
            assert not sent
        elif fsdp == tensor == 1:
            assert set(sent) == {"all-reduce"}
        elif data == tensor == 1:
            # Parameters alone are gathered, those of a stack one layer at a time.
            sizes = {
                math.prod(shape[1:] if "transformer/" in name or "layers/" in name else shape)
                for name, (shape, shard) in found["placed"]["in"].items()
                if name.startswith("params/") and shape != shard
            }
            assert gathered
            assert {math.prod(shape) for shape in gathered} <= sizes
        else:
            # Partial sums of attention heads and of MLP columns, and the batch's gradients.
            assert any(rows in shape for _, shape in sent["all-reduce"])


@pytest.mark.parametrize(("task", "meshes"), CASES)
def test_the_optimizer_and_the_average_are_cut_as_their_parameters(task, meshes):
    for mesh, found in on_meshes(task, *meshes).items():
        axes = dict(zip(sharding.AXES, map(int, mesh.split(",")), strict=True))
        cut = 0
        for side in ("in", "out"):
            placed = found["placed"][side]
            for name, (shape, shard) in placed.items():
                if name.startswith("params/"):
                    _, network, path = name.split("/", 2)
                    copies = [n for n in placed if n.startswith(("opt/", "ema/")) and n.endswith("/" + path)]
                    copies = [n for n in copies if n.split("/")[1] == network]
                    assert len(copies) >= (2 if network == "discriminator" else 1)
                    assert all(placed[copy] == [shape, shard] for copy in copies), name
                    cut += shape != shard
        assert (cut >= 10) == (axes["fsdp"] * axes["tensor"] > 1)
