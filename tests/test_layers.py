"""The shared blocks: fast implementations against plain ones, scanned stacks against a Python loop."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from titok_jax import models
from titok_jax.models import layers
from titok_jax.models.generator import GeneratorConfig, PostNormBlock
from titok_jax.runtime import sharding

RNG = np.random.default_rng(0)


def normal(*shape, dtype=np.float32):
    return RNG.standard_normal(shape).astype(dtype)


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

    def run(state, x, scan):
        return layers.run_stack(nnx.merge(graphdef, state), x, scan=scan)

    expected = jax.jit(loop)(stack, x)
    for scan in (True, False):
        for a, b in zip(jax.jit(run, static_argnums=2)(stack, x, scan), expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def kept(function, *arguments) -> list[tuple]:
    """Shapes and dtypes of what the backward pass of a function needs of its forward pass, without its arguments."""
    backward = jax.eval_shape(lambda *arguments: jax.vjp(function, *arguments)[1], *arguments)
    found = [(leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(backward)]
    for leaf in jax.tree.leaves(arguments):
        if (leaf.shape, leaf.dtype.name) in found:
            found.remove((leaf.shape, leaf.dtype.name))
    return found


def post_norm_stack(num_layers=3, dtype=jnp.float32):
    config = GeneratorConfig(hidden_size=16, num_heads=2, intermediate_size=32)
    return layers.make_stack(lambda r: PostNormBlock(config, dtype=dtype, rngs=r), num_layers, nnx.Rngs(0))


@pytest.mark.parametrize("kind", ["pre-norm", "post-norm with dropout"])
def test_what_is_kept_and_the_form_of_a_stack_change_neither_results_nor_gradients(kind):
    make, key = (make_stack, None) if kind == "pre-norm" else (post_norm_stack, jax.random.key(5))
    x, weights = normal(2, 5, 16), normal(2, 5, 16)
    graphdef, params = nnx.split(make(num_layers=2))

    def loss(params, x, remat, scan):
        y, _ = layers.run_stack(nnx.merge(graphdef, params), x, key=key, remat=remat, scan=scan)
        return jnp.sum(y * weights)

    gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=(2, 3))
    expected = gradients(params, x, "none", True)
    for form in (("none", False), ("dots", True), ("dots", False), ("full", True)):
        for a, b in zip(jax.tree.leaves(gradients(params, x, *form)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-6 * max(1.0, float(jnp.abs(b).max())), err_msg=str(form))


def test_a_stack_that_keeps_little_has_forward_derivatives_and_maps():
    x, weights = normal(2, 5, 16), normal(2, 5, 16)
    graphdef, params = nnx.split(make_stack(num_layers=2))

    @jax.jit
    def derivatives(x):
        def loss(x):
            return jnp.sum(layers.run_stack(nnx.merge(graphdef, params), x, remat="dots")[0] * weights)

        return jax.grad(loss)(x), jax.jvp(loss, (x,), (weights,))[1], jax.vmap(jax.grad(loss))(jnp.stack([2 * x, x]))

    slope, forward, rows = derivatives(x)
    np.testing.assert_allclose(forward, jnp.sum(slope * weights), rtol=1e-4)
    np.testing.assert_allclose(rows[1], slope, atol=1e-5)


def test_the_form_of_a_stack_is_that_of_the_platform(monkeypatch):
    graphdef, params = nnx.split(make_stack())
    for scan, platform, unroll in ((None, "cpu", 1), (None, "gpu", 3), (True, "gpu", 1), (False, "cpu", 3)):
        monkeypatch.setattr(layers, "target_platform", lambda platform=platform: platform)
        program = jax.make_jaxpr(lambda x, scan=scan: layers.run_stack(nnx.merge(graphdef, params), x, scan=scan))(
            normal(2, 5, 16)
        )
        (loop,) = [equation for equation in program.eqns if equation.primitive.name == "scan"]
        assert loop.params["unroll"] == unroll


@pytest.mark.parametrize("scan", [True, False])
def test_a_layer_keeps_what_the_policy_says(scan):
    """In numbers of the width 16, for each of the 2 x 5 positions; the hidden width is 32, and there are 2 heads."""
    graphdef, params = nnx.split(make_stack())
    found = {}
    for remat in layers.REMAT:

        def run(params, x, remat=remat):
            return layers.run_stack(nnx.merge(graphdef, params), x, remat=remat, scan=scan)[0]

        sizes = [math.prod(shape) for shape, _ in kept(run, params, normal(2, 5, 16))]
        found[remat] = sum(sizes) / 3 / (2 * 5 * 16)
    assert found["full"] == 1  # its input
    # Its input; query, key and value; what attention gives, before and after its projection; the first layer of the MLP.
    assert found["dots"] == 1 + 3 + 2 + 2
    assert found["none"] > 10


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gelu_and_layer_norm_keep_one_array_each(dtype):
    x = jnp.asarray(normal(4, 16), dtype)
    assert kept(lambda x: layers.gelu(x[:2]), x) == [((2, 16), dtype)]
    graphdef, params = nnx.split(layers.LayerNorm(16, dtype=dtype, rngs=nnx.Rngs(0)))
    assert kept(lambda params, x: nnx.merge(graphdef, params)(x[:2]), params, x) == [((2, 16), dtype)]


def test_gelu_has_the_derivatives_of_its_formula():
    x = jnp.linspace(-6, 6, 101)
    ours, plain = layers.gelu, lambda x: 0.5 * x * (1.0 + jax.lax.erf(x * 0.7071067811865476))
    for _ in range(3):
        ours, plain = (jax.grad(lambda x, f=f: f(x)) for f in (ours, plain))
        np.testing.assert_allclose(jax.vmap(ours)(x), jax.vmap(plain)(x), atol=2e-6)
    bfloat16 = jax.vmap(jax.grad(layers.gelu))(x.astype(jnp.bfloat16))
    exact = jax.vmap(jax.grad(layers.gelu))(x.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(bfloat16, exact.astype(jnp.bfloat16))  # rounded once


def test_other_policies_are_refused():
    with pytest.raises(ValueError, match="remat is True, expected 'none', 'dots' or 'full'"):
        models.abstract(GeneratorConfig(), remat=True)


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


def test_a_layer_runs_on_a_mesh_of_other_axes(monkeypatch):
    """The mesh is another program's: it has an axis fsdp, along which kernels are gathered, and no axis tensor."""
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 1)
    graphdef, params = nnx.split(make_stack())
    mesh = jax.sharding.AbstractMesh((2, 2), ("fsdp", "other"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def run(params, x):
        return layers.run_stack(nnx.merge(graphdef, params), x)[0]

    with jax.sharding.use_abstract_mesh(mesh), sharding.logical_axis_rules((("batch", "fsdp"),)):
        assert jax.eval_shape(run, params, normal(2, 5, 16)).shape == (2, 5, 16)
