"""The discriminator against the published PyTorch code with the same seeded weights: every layer, logits and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
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
# Where float32 does not determine a decision, it does not determine the gradient either: which of two elements is the
# largest of a pooling window, on which side of 0 the input of a LeakyReLU is. Such values are of the order of 1; on three
# kinds of CPUs they, and the differences of two, are off from float64 by 2e-7 on average, and by more than 1.5e-6 in 4 of a
# million cases. Whatever is nearer is a near-tie.
NEAR = 1.5e-6
# What near-ties can change is allowed to differ. It must be few pixels: less than FEW may be open to more than OPEN of the
# largest gradient.
OPEN, FEW = 1e-3, 0.3


@pytest.fixture(scope="module")
def golden():
    return load("training/discriminator.npz")


@pytest.fixture(scope="module")
def model():
    return seeded_model(lambda: NLayerDiscriminator(DiscriminatorConfig(), rngs=nnx.Rngs(0)), TABLE)


def activation(x, near):
    """LeakyReLU; what is nearer to 0 than `near` counts as if it were just on the other side."""
    other_side = jnp.where(x >= 0, -near, near)
    x = x + jax.lax.stop_gradient(jnp.where(jnp.abs(x) < near, other_side - x, 0.0))
    return jnp.where(x >= 0, x, 0.1 * x)


def pool(x, size, near):
    """`adaptive_max_pool`; it takes the second largest of a window, if the largest is less than `near` above it."""

    def windows(x):
        """[B, H, W, C] -> [B, size, size, C, 4], row by row. A window of fewer elements has some of them twice."""
        for axis in (2, 1):
            n = x.shape[axis]
            starts, ends = np.arange(size) * n // size, -(-np.arange(1, size + 1) * n // size)
            assert (ends - starts).max() <= 2
            x = x.take(np.stack([starts, ends - 1], 1), axis=axis)
        return x.transpose(0, 1, 3, 5, 2, 4).reshape(x.shape[0], size, size, x.shape[-1], 4)

    positions = windows(np.arange(x.shape[1] * x.shape[2]).reshape(1, *x.shape[1:3], 1))
    x = windows(x)
    first = jnp.argmax(x, -1, keepdims=True)
    others = jnp.where(positions == jnp.take_along_axis(jnp.asarray(positions), first, -1), -jnp.inf, x)
    second = jnp.argmax(others, -1, keepdims=True)
    chosen = jnp.where(x.max(-1, keepdims=True) - others.max(-1, keepdims=True) < near, second, first)
    return jnp.take_along_axis(x, chosen, -1)[..., 0]


def layers(discriminator, x, near):
    """All intermediates by their golden names, one layer after the other. Near-ties are decided the other way."""
    out = {}
    out["block_in"] = x = activation(discriminator.block_in(x), near)
    for i in range(len(discriminator.blocks)):
        stage = discriminator.blocks[str(i)]
        out[f"blocks.{i}.conv"] = x = stage.conv(x)
        out[f"blocks.{i}.blur"] = x = blur_downsample(x)
        out[f"blocks.{i}"] = x = activation(stage.norm(x), near)
    out["pool"] = x = pool(x, discriminator.config.logits_size, near)
    out["to_logits.0"] = x = discriminator.to_logits_0(x)
    return out | {"logits": discriminator.to_logits_2(activation(x, near))}


def stored(gradients):
    """The gradients that the files hold, by their names in the model. They have none of the large kernels."""
    flat = convert.flatten(gradients)
    return {path: flat[path] for path in flat if flat[path].ndim == 1 or path == "block_in/kernel"}


@pytest.mark.parametrize(("size", "batch"), [(64, 2), (80, 1), (256, 2)])
def test_every_layer_and_gradient(golden, model, size, batch):
    """Pooling windows are one element used four times (size 64), overlapping (80), and 2 x 2 (256)."""
    graphdef, params = model
    x = images(batch, size, 40)

    @functools.partial(jax.jit, static_argnums=0)
    def run(outputs, params, x, *args):
        """-> what `outputs` gives for a discriminator and images, and the gradients of the logits' objective."""

        def objective(params, x):
            out = outputs(nnx.merge(graphdef, params), x, *args)
            return jnp.vdot(out["logits"], jnp.linspace(-1.0, 1.0, out["logits"].size).reshape(out["logits"].shape)), out

        gradients, out = jax.grad(objective, (0, 1), has_aux=True)(params, x)
        return out, stored(gradients[0]), gradients[1]

    out, gradients, input_gradient = run(lambda discriminator, x: {"logits": discriminator(x)}, params, x)
    blocks, *one_way = run(layers, params, x, 0.0)
    _, *other_way = run(layers, params, x, NEAR)
    for name, value in (blocks | out).items():
        compare(golden, f"{size}/{name}", nchw(value), TOLERANCE)
    compare(golden, f"{size}/logits", nchw(blocks["logits"]), TOLERANCE)

    # What near-ties can change, where several of them meet and each may be decided in either way: twice as much as all of
    # them together do nearby, or in an array of parameters.
    effects, effect = jax.tree.map(lambda one, other: 2 * np.abs(one - other), one_way, other_way)
    effect = scipy.ndimage.maximum_filter(nchw(effect), (1, 3, 17, 17))
    share = (effect > OPEN * np.abs(input_gradient).max()).mean()
    assert share < FEW, f"near-ties change the gradient of {share:.1%} of the pixels"
    compare(golden, f"{size}/grad_input", nchw(input_gradient), TOLERANCE, effect)

    gradients, effects = (convert.to_published(TABLE, convert.unflatten(flat)) for flat in (gradients, effects))
    assert gradients.keys() == {name.removeprefix(f"{size}/grad/") for name in golden if name.startswith(f"{size}/grad/")}
    # This gradient sums the cotangent's 256 or 512 elements of up to 1. It is zero up to rounding (3e-4 in the published
    # run).
    np.testing.assert_allclose(gradients.pop("to_logits.2.bias"), golden[f"{size}/grad/to_logits.2.bias"], atol=2e-3)
    for name, gradient in gradients.items():
        compare(golden, f"{size}/grad/{name}", gradient, GRADIENT_TOLERANCE, effects[name].max())


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
