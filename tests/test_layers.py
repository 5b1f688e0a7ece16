"""The shared blocks: fast implementations against plain ones, scanned stacks against a Python loop."""

import math

import golden_data
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from titok_jax.models import layers

RNG = np.random.default_rng(0)


def normal(*shape, dtype=np.float32):
    return RNG.standard_normal(shape).astype(dtype)


def test_attention_forms_agree():
    q, k, v = (normal(3, 130, 4, 16) for _ in range(3))
    scores = np.einsum("bqhd,bkhd->bhqk", q.astype(np.float64), k) / 4.0
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)
    for form in (layers.attention_plain, layers.attention_by_image, layers.attention, jax.nn.dot_product_attention):
        np.testing.assert_allclose(jax.jit(form)(q, k, v), expected, atol=6e-6)


def test_attention_gradients_agree():
    q, k, v = (normal(2, 130, 2, 8) for _ in range(3))
    grads = [
        jax.jit(jax.grad(lambda q, k, v, form=form: jnp.sum(form(q, k, v) ** 2), argnums=(0, 1, 2)))(q, k, v)
        for form in (layers.attention_plain, layers.attention_by_image)
    ]
    for a, b in zip(*grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("length", [129, 130])
def test_attention_in_bfloat16_and_its_gradients_are_those_of_float32(length):
    """Tests the implementation that this machine uses. Rounding to 8 bits, also of probabilities, gives errors of 0.3 %. One
    position too many would take 0.5 % of the sum of the outputs. Their values are positive, so that rounding cancels."""
    rng = np.random.default_rng(length)
    q, k, v, weights = (jnp.asarray(rng.standard_normal((2, length, 2, 64)), jnp.bfloat16) for _ in range(4))
    v = jnp.abs(v)

    def outputs(form, *qkv):
        out, backward = jax.vjp(form, *qkv)
        return out, *backward(weights.astype(out.dtype))

    ours = jax.jit(lambda *qkv: outputs(layers.attention, *qkv))(q, k, v)
    with jax.default_matmul_precision("highest"):
        exact = outputs(layers.attention_plain, *(a.astype(jnp.float32) for a in (q, k, v)))
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        assert a.shape == b.shape
        error = np.linalg.norm(np.float32(a) - b) / np.linalg.norm(b)
        golden_data.within(error, 1e-2, f"error {error}")
    np.testing.assert_allclose(np.float64(ours[0]).sum(), np.float64(exact[0]).sum(), rtol=1e-3)


def test_attention_dropout_acts_on_the_probabilities():
    q, k, v = (
        normal(1, 5, 1, 4),
        normal(1, 5, 1, 4),
        np.broadcast_to(np.eye(5, dtype=np.float32)[None, :, None], (1, 5, 1, 5)),
    )
    out = layers.attention_plain(q, k, v, dropout_rate=0.5, key=jax.random.key(0))  # v is the identity: out = weights
    whole = layers.attention_plain(q, k, v)
    kept = np.asarray(out) != 0
    assert 0 < kept.sum() < kept.size
    np.testing.assert_allclose(np.asarray(out)[kept], 2 * np.asarray(whole)[kept], rtol=1e-6)


def test_gelu_is_exact():
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    expected = [0.5 * a * (1 + math.erf(a / math.sqrt(2))) for a in x.astype(np.float64)]
    np.testing.assert_allclose(layers.gelu(jnp.asarray(x)), expected, atol=3e-6)  # a few ulp of 6


def test_group_norm_forms_agree():
    x, scale, bias = 3 * normal(2, 6, 5, 64) + 1, normal(64), normal(64)
    grouped = x.astype(np.float64).reshape(2, 30, 32, 2)
    mean, var = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    expected = ((grouped - mean) / np.sqrt(var + 1e-6)).reshape(x.shape) * scale + bias
    for form in (layers.group_norm_two_pass, layers.group_norm_affine):
        np.testing.assert_allclose(form(jnp.asarray(x), scale, bias, groups=32, epsilon=1e-6), expected, atol=1e-5)


def test_layer_norm_keeps_float32_statistics_in_bfloat16():
    norm = layers.LayerNorm(256, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = jnp.asarray(normal(4, 256) + 20, jnp.bfloat16)
    x64 = np.asarray(x, np.float64)
    expected = (x64 - x64.mean(-1, keepdims=True)) / np.sqrt(x64.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(np.asarray(norm(x), np.float64), expected, atol=0.02)  # one bfloat16 rounding of 3


def test_dropout_keeps_the_mean_and_does_nothing_without_a_key():
    x = jnp.ones((200, 200))
    assert layers.dropout(x, 0.3, None) is x
    y = np.asarray(layers.dropout(x, 0.3, jax.random.key(0)))
    assert abs((y == 0).mean() - 0.3) < 0.01  # 40,000 draws: 4 standard deviations
    np.testing.assert_allclose(y[y != 0], 1 / 0.7, rtol=1e-6)


def make_stack(skip=False, num_layers=3):
    return layers.make_stack(lambda r: layers.PreNormBlock(16, 2, 32, skip=skip, rngs=r), num_layers, nnx.Rngs(0))


def test_a_stack_is_its_layers_in_order_and_they_differ():
    x = normal(2, 5, 16)
    stack = jax.jit(lambda: nnx.split(make_stack())[1])()
    graphdef = nnx.split(nnx.eval_shape(make_stack))[0]
    kernels = stack["attn"]["qkv"]["kernel"][...]
    assert kernels.shape == (3, 16, 3, 16)
    assert not np.allclose(kernels[0], kernels[1])

    def loop(state, x):
        outs = []
        for i in range(3):
            x = nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], state))(x)
            outs.append(x)
        return x, jnp.stack(outs)

    def scan(state, x, remat):
        return layers.run_stack(nnx.merge(graphdef, state), x, remat=remat)

    expected = jax.jit(loop)(stack, x)
    for remat in (False, True):
        for a, b in zip(jax.jit(scan, static_argnums=2)(stack, x, remat), expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_skips_enter_the_layers_in_order():
    graphdef = nnx.split(nnx.eval_shape(lambda: make_stack(skip=True)))[0]
    stack = jax.jit(lambda: nnx.split(make_stack(skip=True))[1])()
    x, skips = normal(2, 5, 16), normal(3, 2, 5, 16)
    y = x
    for i in range(3):
        y = nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], stack))(y, skips[i])
    out, _ = jax.jit(lambda s, x: layers.run_stack(nnx.merge(graphdef, s), x, skips=skips))(stack, x)
    np.testing.assert_allclose(out, y, atol=1e-5)


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="multiple of num_heads"):
        layers.Attention(10, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="groups"):
        layers.GroupNorm(33, epsilon=1e-6, rngs=nnx.Rngs(0))
