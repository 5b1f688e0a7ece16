"""Placement rules: every large parameter of a published model is cut along fsdp, and nothing that is indivisible is."""

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
