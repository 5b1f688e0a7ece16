"""The discriminator against the published PyTorch code with the same seeded weights: every layer, logits and gradients."""

import functools

import golden_data
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_data import abstract_model, compare, images, load, load_json, nchw, published_shapes, seeded_model

from titok_jax.models import tables
from titok_jax.models.discriminator import (
    DiscriminatorConfig,
    NLayerDiscriminator,
    adaptive_max_pool,
    blur_convolution,
    blur_downsample,
    blur_shifted,
)
from titok_jax.weights import convert

TABLE = tables.discriminator_table()
TOLERANCE = 2e-5  # up to 3.8e-6 measured, for the logits
# Where a normalisation follows a convolution, the gradient of its bias is a sum over the image that nearly cancels: 1.3e-5
# measured.
GRADIENT_TOLERANCE = 5e-5
# At 256 pixels one of the 262,144 pooling windows has two maxima 4e-9 apart, and rounding decides which gets the gradient.
TIE = {"size": 256, "image": 1, "rows": slice(104, 168), "columns": slice(144, 216)}  # the pixels that window sees
TIE_TOLERANCE = 1e-3  # for parameters before the pooling: 1.8e-4 measured


@pytest.fixture(scope="module")
def golden():
    return load("training/discriminator.npz")


@pytest.fixture(scope="module")
def model():
    return seeded_model(lambda: NLayerDiscriminator(DiscriminatorConfig(), rngs=nnx.Rngs(0)), TABLE)


def layers(discriminator, x):
    """All intermediates by their golden names, one layer after the other."""

    def activation(x):
        return jnp.where(x >= 0, x, 0.1 * x)

    out = {}
    out["block_in"] = x = activation(discriminator.block_in(x))
    for i in range(len(discriminator.blocks)):
        stage = discriminator.blocks[str(i)]
        out[f"blocks.{i}.conv"] = conv = stage.conv(x)
        out[f"blocks.{i}.blur"] = blur_downsample(conv)
        out[f"blocks.{i}"] = x = stage(x)
    out["pool"] = x = adaptive_max_pool(x, discriminator.config.logits_size)
    out["to_logits.0"] = x = discriminator.to_logits_0(x)
    return out | {"logits": discriminator.to_logits_2(activation(x))}


@pytest.mark.parametrize(("size", "batch"), [(64, 2), (80, 1), (256, 2)])
def test_every_layer_and_gradient(golden, model, size, batch):
    """Pooling windows are one element used four times (size 64), overlapping (80), and 2 x 2 (256)."""
    graphdef, params = model

    def objective(params, x):
        logits = nnx.merge(graphdef, params)(x)
        return jnp.vdot(logits, jnp.linspace(-1.0, 1.0, logits.size).reshape(logits.shape)), logits

    @jax.jit
    def run(params, x):
        (_, logits), gradients = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(params, x)
        return layers(nnx.merge(graphdef, params), x), logits, gradients

    blocks, logits, (gradients, input_gradient) = run(params, images(batch, size, 40))
    for name, value in blocks.items():
        compare(golden, f"{size}/{name}", nchw(value), TOLERANCE)
    compare(golden, f"{size}/logits", nchw(logits), TOLERANCE)

    input_gradient = nchw(input_gradient)
    if size == TIE["size"]:
        # Outside the window's receptive field nothing depends on the tie. Inside, the published values stand in for ours,
        # so that the rest is compared as strictly as elsewhere.
        published, step = golden["256/grad_input"], int(golden["256/grad_input.stride"][-1])
        input_gradient = input_gradient.copy()
        box = np.index_exp[TIE["image"], :, TIE["rows"], TIE["columns"]]
        ours = input_gradient[:, :, ::step, ::step]
        inside = np.zeros((batch, 3, size, size), bool)
        inside[box] = True
        input_gradient[:, :, ::step, ::step] = np.where(inside[:, :, ::step, ::step], published, ours)
        error = np.abs(ours - published).max() / golden["256/grad_input.stats"][2]
        golden_data.within(error, 0.05, f"inside the receptive field of the tie: {error}")
    compare(golden, f"{size}/grad_input", input_gradient, TOLERANCE)

    gradients = convert.to_published(TABLE, gradients)
    stored = {name.removeprefix(f"{size}/grad/") for name in golden if name.startswith(f"{size}/grad/")}
    # The files hold no gradients of the large kernels.
    assert stored == {name for name, gradient in gradients.items() if gradient.ndim == 1 or name == "block_in.0.weight"}
    # This gradient sums the cotangent's 256 or 512 elements of up to 1. It is zero up to rounding (3e-4 in the published
    # run).
    np.testing.assert_allclose(gradients["to_logits.2.bias"], golden[f"{size}/grad/to_logits.2.bias"], atol=2e-3)
    for name in stored - {"to_logits.2.bias"}:
        tied = size == TIE["size"] and not name.startswith("to_logits")
        compare(golden, f"{size}/grad/{name}", gradients[name], TIE_TOLERANCE if tied else GRADIENT_TOLERANCE)


def test_names_and_shapes_are_the_published_ones(golden):
    config = DiscriminatorConfig()
    _, params = abstract_model(lambda: NLayerDiscriminator(config, rngs=nnx.Rngs(0)))
    buffers = tables.discriminator_buffers(config.num_stages)
    found = convert.published_shapes(TABLE, params) | {name: array.shape for name, array in buffers.items()}
    assert found == published_shapes("shapes/discriminator.json")
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == load_json("shapes/discriminator.json")["num_params"]
    for array in buffers.values():
        np.testing.assert_array_equal(array[0, 0], golden["blur_kernel"])


def test_published_weights_come_back(model):
    graphdef, params = model
    through = nnx.to_pure_dict(nnx.split(nnx.merge(graphdef, params))[1])
    assert jax.tree.structure(through) == jax.tree.structure(params)
    weights = convert.to_published(TABLE, through)
    again = convert.from_published(TABLE, params, weights, source="test")
    jax.tree.map(np.testing.assert_array_equal, again, params)
    with pytest.raises(convert.WeightsError, match=r"missing: to_logits\.2\.bias"):
        convert.from_published(TABLE, params, {n: w for n, w in weights.items() if n != "to_logits.2.bias"}, source="test")


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (5, 1)])
def test_blur_is_the_depthwise_convolution(golden, size):
    x = np.random.default_rng(0).standard_normal((2, *size, 3)).astype(np.float32)
    kernel = jnp.asarray(golden["blur_kernel"])[:, :, None, None].repeat(3, axis=3)
    padding = [(1, 1) if n % 2 == 0 else (1, 2) for n in size]  # the published "same" padding puts the odd zero last
    dims = ("NHWC", "HWIO", "NHWC")
    want = jax.lax.conv_general_dilated(x, kernel, (2, 2), padding, dimension_numbers=dims, feature_group_count=3)
    for form in (blur_shifted, blur_convolution):
        np.testing.assert_allclose(form(x), want, atol=1e-6)
        gradients = (jax.grad(lambda x, f=f: jnp.sum(jnp.sin(f(x))))(x) for f in (form, blur_downsample))
        np.testing.assert_allclose(*gradients, atol=1e-6)
    # In bfloat16 the taps are exact, so the forms differ by the rounding of the sum at most.
    low = jnp.asarray(x, jnp.bfloat16)
    one, other = (np.asarray(form(low), np.float32) for form in (blur_shifted, blur_convolution))
    np.testing.assert_allclose(one, other, atol=2**-8 * np.abs(one).max())


def pool_by_loops(x, size):
    """The definition, window by window: the values, and torch's gradient of x for a cotangent of 1, 2, 3, ..."""
    b, h, w, c = x.shape
    out, where = np.zeros((b, size, size, c), x.dtype), np.zeros_like(x)
    for n, i, j, k in np.ndindex(b, size, size, c):
        r0, r1 = i * h // size, -(-(i + 1) * h // size)
        c0, c1 = j * w // size, -(-(j + 1) * w // size)
        window = x[n, r0:r1, c0:c1, k]
        out[n, i, j, k] = window.max()
        row, column = np.unravel_index(window.argmax(), window.shape)  # the first maximum, row by row
        where[n, r0 + row, c0 + column, k] += 1 + i * size + j
    return out, where


@pytest.mark.parametrize("shape", [(8, 8), (2, 2), (5, 7), (12, 4), (9, 3)])
def test_pooling_and_its_gradient_with_ties(shape):
    """The input has few distinct values, so that most windows have several maxima."""
    x = np.random.default_rng(1).integers(0, 3, (2, *shape, 2)).astype(np.float32)
    weights = np.broadcast_to(1 + np.arange(16.0, dtype=np.float32).reshape(4, 4, 1), (2, 4, 4, 2))
    want, want_gradient = pool_by_loops(x, 4)
    pool = functools.partial(adaptive_max_pool, size=4)
    got, pullback = jax.jit(lambda x: jax.vjp(pool, x))(x)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(pullback(jnp.asarray(weights))[0], want_gradient)


def test_pooling_does_not_hide_nan():
    x = jnp.ones((1, 4, 4, 1)).at[0, 1, 2, 0].set(jnp.nan)
    pooled = adaptive_max_pool(x, 2)[0, :, :, 0]
    np.testing.assert_array_equal(jnp.isnan(pooled), [[False, True], [False, False]])


def test_a_small_one_for_small_images():
    config = DiscriminatorConfig(hidden_channels=32, num_stages=2, logits_size=8)
    graphdef, params = seeded_model(lambda: NLayerDiscriminator(config, rngs=nnx.Rngs(0)), TABLE)

    @jax.jit
    @jax.grad
    def gradient(params, x):
        logits = nnx.merge(graphdef, params)(x)
        assert logits.shape == (2, 8, 8, 1)
        return jnp.square(logits).sum()

    for path, leaf in convert.flatten(gradient(params, images(2, 32, 0))).items():
        assert np.abs(leaf).max() > 0, f"{path} has no gradient"
    with pytest.raises(ValueError, match="num_stages"):
        NLayerDiscriminator(DiscriminatorConfig(num_stages=0), rngs=nnx.Rngs(0))
