"""Both generators against the published PyTorch code: seeded weights, every stage, names and shapes."""

import json

import golden_data as gd
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from titok_jax import models
from titok_jax.models.generator import GeneratorConfig, with_class
from titok_jax.weights import config_files, convert

TOLERANCE = 1e-5  # relative to the largest magnitude; the published code in float32 is within 1e-6 of itself in float64
NAMES = ["tiny_vit_generator", "tiny_uvit_generator"]


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    config = GeneratorConfig.from_published(gd.load_json(f"tiny/{request.param}.config.json"))
    graphdef, abstract = models.abstract(config)
    params = gd.seeded_params(convert.table_for(config), abstract)
    return request.param, config, graphdef, params, gd.load(f"tiny/{request.param}.npz")


def layers(stack):
    graphdef, stacked = nnx.split(stack)
    for i in range(jax.tree.leaves(stacked)[0].shape[0]):
        yield nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], stacked))


def vit_intermediates(model, ids, labels):
    tokens = with_class(ids[:1], labels[:1], model.config)
    x = model.embeddings(tokens)
    out = {"embeddings_sum": model.embeddings.sum(tokens), "embeddings": x}
    for i, block in enumerate(layers(model.layers)):
        if i == 0:
            out["encoder.layer.0.attention.self"] = block.attn.heads(x)
            out["encoder.layer.0.attention"] = block.attention(x)
        x = out[f"encoder.layer.{i}"] = block(x)
    return out


def uvit_intermediates(model, ids, labels):
    tokens = with_class(ids[:1], labels[:1], model.config)
    out = {"embeddings": model.embeddings[...][tokens]}
    x = out["embeddings_plus_pos"] = model.embed(tokens)
    skips = []
    for i, block in enumerate(layers(model.in_blocks)):
        if i == 0:
            attn = out["in_blocks.0.attn"] = block.attn(block.norm1(x))
            out["in_blocks.0.mlp"] = block.mlp(block.norm2(x + attn))
        x = out[f"in_blocks.{i}"] = block(x)
        skips.append(x)
    x = out["mid_block"] = model.mid_block(x)
    for i, block in enumerate(layers(model.out_blocks)):
        skip = skips.pop()
        out[f"out_blocks.{i}.skip_linear"] = block.skip_linear(jnp.concatenate([x, skip], -1))
        x = out[f"out_blocks.{i}"] = block(x, skip)
    out["norm"] = model.norm(x)
    return out


@pytest.mark.parametrize("drop", [0, 1])
def test_every_stage_equals_the_published_code(case, drop):
    name, config, graphdef, params, golden = case
    ids = golden["ids"].astype(np.int32)
    labels = np.full(2, config.num_classes) if drop else golden["labels"].astype(np.int32)

    @jax.jit
    def run(params, ids, labels):
        model = nnx.merge(graphdef, params)
        stages = (vit_intermediates if config.model_type == "ViT" else uvit_intermediates)(model, ids, labels)
        return stages | {"logits": model.logits(ids, labels)}

    ours = run(params, ids, labels)
    errors = {key: gd.compare(golden, f"drop{drop}.{key}", value, TOLERANCE) for key, value in ours.items()}
    stored = {k.split(".", 1)[1] for k in golden if k.startswith(f"drop{drop}.")}
    assert {k for k in stored if not k.endswith((".stride", ".shape", ".stats"))} == set(ours)
    print(f"{name} drop{drop}: largest error {max(errors.values()):.1e}")


def test_names_and_shapes_are_the_published_ones(case):
    name, config, _, params, _ = case
    table = convert.table_for(config)
    assert convert.published_shapes(table, params) == gd.published_shapes(f"tiny/{name}.shapes.json")
    for n, array in convert.to_published(table, params).items():
        np.testing.assert_array_equal(array, gd.seeded_array(n, array.shape), err_msg=n)


def test_dropout_acts_only_with_a_key(case):
    _, config, graphdef, params, golden = case
    ids, labels = golden["ids"].astype(np.int32), golden["labels"].astype(np.int32)
    run = jax.jit(lambda params, key: nnx.merge(graphdef, params).logits(ids, labels, key=key))
    plain, one, two = run(params, None), run(params, jax.random.key(1)), run(params, jax.random.key(2))
    same = [bool(jnp.allclose(plain, x, atol=1e-6)) for x in (one, two)] + [bool(jnp.allclose(one, two, atol=1e-6))]
    # The published U-ViT ignores its dropout settings.
    assert same == [config.model_type == "UViT"] * 3
    np.testing.assert_array_equal(one, run(params, jax.random.key(1)))


def test_remat_and_bfloat16_change_no_result_beyond_rounding(case):
    _, config, _, params, golden = case
    ids, labels = golden["ids"].astype(np.int32), golden["labels"].astype(np.int32)
    weights = np.random.default_rng(0).standard_normal((2, config.num_tokens, config.codebook_size)).astype(np.float32)

    def value_and_grad(**options):
        graphdef, _ = models.abstract(config, **options)
        return jax.jit(jax.value_and_grad(lambda p: jnp.sum(nnx.merge(graphdef, p).logits(ids, labels) * weights)))(
            jax.tree.map(jnp.asarray, params)
        )

    (plain, plain_grads), (remat, remat_grads) = value_and_grad(), value_and_grad(remat="dots", scan_layers=False)
    np.testing.assert_allclose(plain, remat, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(plain_grads), jax.tree.leaves(remat_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(1e-6, float(jnp.abs(a).max())))
    bf16, bf16_grads = value_and_grad(dtype=jnp.bfloat16)
    assert bf16.dtype == jnp.float32
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(bf16_grads))
    np.testing.assert_allclose(bf16, plain, rtol=0.1, atol=5.0)  # 8 bits of mantissa, a sum of 1024 signed products


@pytest.mark.parametrize(
    "path", sorted(p.name for p in (gd.GOLDEN / "configs").glob("generator_*") if "resolved" not in p.name)
)
def test_published_configurations_are_read(path):
    published = gd.load_json(f"configs/{path}")
    resolved = config_files.resolve_interpolations(published, source=path)
    assert resolved == gd.load_json(f"configs/{path.removesuffix('.json')}.resolved.json")
    config = GeneratorConfig.from_published(resolved)
    assert config.num_tokens == resolved["model"]["vq_model"]["num_latent_tokens"]
    assert GeneratorConfig.from_published(json.loads(json.dumps(config.to_published()))) == config
