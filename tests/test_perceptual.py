"""The perceptual networks against torchvision's ConvNeXt-S and LPIPS in float32 with the same seeded weights."""

import types

import golden_data as gd
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from titok_jax import models
from titok_jax.models import perceptual
from titok_jax.models.perceptual import PerceptualConfig
from titok_jax.weights import convert

# 36 blocks of LayerNorm and matmuls, or 13 convolutions, with sums in another order than torch's.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def golden():
    return gd.load("training/convnext_s.npz")


def seeded(name: str, *, bare_names: bool = False, absolute_heads: bool = False):
    """(graphdef, parameters) of a perceptual network with the golden runs' weights.

    bare_names: seed by torchvision's names, without the prefix "convnext.".
    absolute_heads: take absolute values of LPIPS' seeded heads. These are signed, so its terms cancel; real heads are not
    negative.
    """
    config = PerceptualConfig(name)
    graphdef, abstract = models.abstract(config)
    table = convert.table_for(config)
    shapes = convert.published_shapes(table, abstract)
    weights = {n: gd.seeded_array(n.removeprefix("convnext.") if bare_names else n, s) for n, s in shapes.items()}
    if absolute_heads:
        weights = {n: abs(w) if ".lin" in n else w for n, w in weights.items()}
    return graphdef, jax.tree.map(jnp.asarray, convert.from_published(table, abstract, weights, source="seeded"))


def pair():
    """The golden runs' images and the images with which they were compared."""
    images = gd.images(2, 256, 5)
    return images, (0.7 * images + 0.3 * gd.images(2, 256, 6)).astype(np.float32)


def test_names_and_shapes_are_torchvisions():
    config, info = PerceptualConfig("lpips-convnext_s-1.0-0.1"), gd.load_json("training/convnext_s.json")
    shapes = convert.published_shapes(convert.table_for(config), models.abstract(config)[1])
    expected = {"convnext." + name: tuple(shape) for name, shape in info["convnext_parameters"].items()}
    constants = ("imagenet_mean", "imagenet_std", "lpips.scaling_layer.shift", "lpips.scaling_layer.scale")
    expected |= {name: tuple(shape) for name, shape in info["lpips_parameters"].items() if name not in constants}
    assert shapes == expected


def test_convnext_block_by_block(golden):
    graphdef, params = seeded("convnext_s", bare_names=True)

    @jax.jit
    def run(params, images):
        net = nnx.merge(graphdef, params).convnext
        x = (images - np.float32(perceptual.IMAGENET_MEAN)) / np.float32(perceptual.IMAGENET_STD)
        return net.features(x), net(images)

    features, logits = run(params, gd.images(2, 224, 5))
    for stage, x in zip((1, 3, 7), (features[0], features[1], features[3]), strict=True):
        gd.compare(golden, f"convnext/features.{stage}", gd.nchw(x), TOLERANCE)
    gd.compare(golden, "convnext/logits", logits, TOLERANCE)


@pytest.mark.parametrize("size", [64, 256, 320])
def test_resize_is_torchs_antialiased_bilinear(golden, size):
    x = gd.nchw(jax.jit(perceptual.resize, static_argnums=1)(gd.images(1, size, 7), 224))
    case = f"resize/{size}_224_"
    # Both sum pixels in [0, 1] with float32 weights, and torch computes the weights in float32 too: 7e-6.
    np.testing.assert_allclose(x[:, :, :8, :8], golden[case + "corner"], atol=2e-5)
    np.testing.assert_allclose(x[:, :, -8:, -8:], golden[case + "last_corner"], atol=2e-5)
    np.testing.assert_allclose(x[0, :, 5], golden[case + "row5"], atol=2e-5)


def test_lpips_features_and_terms(golden):
    graphdef, params = seeded("lpips")
    images, target = pair()

    @jax.jit
    def run(params, images, target):
        net = nnx.merge(graphdef, params).lpips
        return net.features(images), net.terms(images, target)

    features, terms = run(params, images, target)
    for level, x in enumerate(features):
        gd.compare(golden, f"lpips/features{level}", gd.nchw(x), TOLERANCE)
        # These are differences of nearly equal unit vectors: 1e-5 relative to the vectors.
        gd.compare(golden, f"lpips/layer{level}", np.asarray(terms[level])[:, None], 1e-4)


def value_and_gradient(graphdef, params):
    """The value of each image, and the gradient of their mean with respect to the reconstructions."""

    def distance(reconstructions, params, images):
        value = nnx.merge(graphdef, params)(images, reconstructions)
        return value.mean(), value

    images, target = pair()
    (_, value), grad = jax.jit(jax.value_and_grad(distance, has_aux=True))(target, params, images)
    return value, gd.nchw(grad)


def test_convnext_distance_and_its_gradient(golden):
    value, grad = value_and_gradient(*seeded("convnext_s"))
    gd.compare(golden, "perceptual/convnext_s/value", value, 1e-4)
    gd.compare(golden, "perceptual/convnext_s/grad_target", grad, 1e-4)


@pytest.mark.parametrize("case", ["lpips_abs", "lpips", pytest.param("lpips-convnext_s-1.0-0.1", marks=pytest.mark.long)])
def test_lpips_and_the_weighted_distance_with_their_gradients(golden, case):
    """LPIPS with heads that are not negative, like the real ones, and with signed ones, as in the weighted distance."""
    name = case.removesuffix("_abs")
    value, grad = value_and_gradient(*seeded(name, absolute_heads=case == "lpips_abs"))
    # With signed heads the terms cancel to a tenth of their size: 3e-6 is seen.
    gd.compare(golden, f"perceptual/{case}/value", value[:, None, None, None], 3e-5)
    # The gradient passes 13 ReLUs and 4 max poolings. Where two arguments nearly tie, rounding decides its way, and all
    # pixels in that receptive field differ. So the test compares most elements, and the length of the difference.
    entry = f"perceptual/{case}/grad_target"
    got, want = grad[tuple(slice(None, None, int(step)) for step in golden[entry + ".stride"])], golden[entry]
    assert got.shape == want.shape
    gd.within(np.quantile(np.abs(got - want), 0.9), 5e-5 * np.abs(want).max(), f"{case}: nine of ten elements")
    gd.within(np.linalg.norm(got - want), 5e-3 * np.linalg.norm(want), f"{case}: length of the difference")
    # Mean and deviation of all elements, stored or not, average such differences out: 2e-6 is seen.
    found = np.array([grad.mean(dtype=np.float64), grad.std(dtype=np.float64)])
    np.testing.assert_allclose(found, golden[entry + ".stats"][:2], atol=2e-5 * found[1])


def test_depthwise_forms_agree():
    rng = np.random.default_rng(0)
    x, kernel, w = (rng.standard_normal(s).astype(np.float32) for s in ((2, 9, 6, 4), (7, 7, 1, 4), (2, 9, 6, 4)))
    results = []
    for form in (perceptual.depthwise_conv_plain, perceptual.depthwise_conv_shifted):
        results.append(jax.jit(jax.value_and_grad(lambda x, k, form=form: jnp.sum(form(x, k) * w), (0, 1)))(x, kernel))
    # The kernel's gradient sums 108 products, the other results 49.
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_unit_vectors_have_a_gradient_where_all_activations_are_0():
    x = jnp.zeros((1, 2, 2, 3)).at[0, 0, 0].set(jnp.array([3.0, 0.0, 4.0]))
    np.testing.assert_allclose(perceptual._unit(x)[0, 0, 0], [0.6, 0.0, 0.8], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: perceptual._unit(x).sum())(x)).all()


@pytest.mark.parametrize("name", ["convnext_b", "lpips-convnext_s", "lpips-convnext_s-1.0-x", "lpips-convnext_s-0-0"])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(ValueError, match="perceptual network"):
        PerceptualConfig(name)


def test_the_weighted_distance_is_the_weighted_mean():
    lpips, distance = np.array([0.3, 0.5]), 0.2
    stand_in = types.SimpleNamespace(
        config=PerceptualConfig("lpips-convnext_s-2-0.5"),
        lpips=lambda images, others: lpips,
        convnext=lambda images: np.sqrt(distance) if images.max() else 0.0,
    )
    value = perceptual.PerceptualLoss.__call__(
        stand_in, np.ones((2, 4, 4, 3), np.float32), np.zeros((2, 4, 4, 3), np.float32)
    )
    np.testing.assert_allclose(value, (2 * lpips + 0.5 * distance) / 2.5, rtol=1e-6)
