"""InceptionV3 against the published evaluator's, which ran in float64 with the same seeded weights."""

import golden_data as gd
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from titok_jax import convert, models
from titok_jax.models import inception
from titok_jax.models.inception import InceptionConfig

# Float32 against float64, through 48 layers: 1e-6 measured for features and logits, 3e-6 for single activations.
TOLERANCE = 1e-5
TABLE = convert.table_for(InceptionConfig())


@pytest.fixture(scope="module")
def golden():
    return gd.load("inception.npz")


def golden_images(size: int) -> np.ndarray:
    """The golden runs' uint8 images. The second is darker, so that the features of the two differ."""
    images = (gd.images(2, size, {256: 50, 64: 51}[size]) * 255).astype(np.uint8)
    images[1] //= 3
    return images


def golden_weights() -> dict[str, np.ndarray]:
    """The golden runs' weights by their published names: with seeded kernels alone the signal would die on its way."""
    shapes = convert.published_shapes(TABLE, models.abstract(InceptionConfig())[1])
    weights = gd.seeded_weights(shapes)
    return {name: array * np.float32(1.5) if name.endswith(".conv.weight") else array for name, array in weights.items()}


@pytest.fixture(scope="module")
def network():
    """(graphdef, parameters)."""
    graphdef, abstract = models.abstract(InceptionConfig())
    return graphdef, convert.from_published(TABLE, abstract, golden_weights(), source="seeded")


def test_names_and_shapes_are_the_published_ones():
    expected = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for name, shape in gd.load_json("shapes/inception_convolutions.json").items():
        expected[f"{name}.conv.weight"] = tuple(shape)
        expected |= {f"{name}.bn.{leaf}": (shape[0],) for leaf in ("weight", "bias", "running_mean", "running_var")}
    assert convert.published_shapes(TABLE, models.abstract(InceptionConfig())[1]) == expected


@pytest.mark.parametrize("size", [256, 64])
def test_every_layer_and_output(golden, network, size):
    graphdef, params = network

    @jax.jit
    def run(params, images):
        net = nnx.merge(graphdef, params)
        return net(images), net.activations(images)

    found, layers = run(params, golden_images(size))
    outputs = dict(zip(("64", "192", "768", "2048"), found, strict=False))
    outputs |= {"logits_unbiased": found.logits_unbiased, "logits": found.logits}
    for name, value in outputs.items():
        gd.compare(golden, f"{size}/{name}", value, TOLERANCE)
    # Pixels of 0 .. 255; at their places, which are float32 here as in the TensorFlow graph: 8e-4.
    resized = gd.nchw(layers["resized"])
    np.testing.assert_allclose(resized[0, :, 7], golden[f"{size}/resized299_row"], atol=2e-3)
    np.testing.assert_allclose(resized[0, :, -6:, -6:], golden[f"{size}/resized299_last_corner"], atol=2e-3)
    if size == 256:
        stored = {name.split("/")[1].split(".")[0] for name in golden if name.startswith("256/")}
        blocks = {name for name in stored if name[0].isupper()}
        assert blocks == layers.keys() - {"resized", "Mixed_6d.branch1x1"}
        for name in blocks:
            gd.compare(golden, f"256/{name}", gd.nchw(layers[name]), TOLERANCE)
        # The first channels of Mixed_6d are those of its first branch.
        spatial = np.asarray(found.spatial).reshape(2, 17, 17, 7)
        channels = int(golden["256/Mixed_6d.stride"][1])
        assert channels > 7
        step = int(golden["256/Mixed_6d.stride"][2])
        np.testing.assert_allclose(spatial[:, ::step, ::step, 0], golden["256/Mixed_6d"][:, 0], atol=TOLERANCE * 5)
        assert found.spatial.shape == (2, 2023)


def test_resize_by_hand():
    """Pixel i at i / 2: the first half way of the old pixels, the last one repeated."""
    x = jnp.asarray(np.array([0.0, 10.0, 30.0], np.float32).reshape(1, 1, 3, 1))
    found = inception.resize(x, 6)
    np.testing.assert_allclose(found[0, 0, :, 0], [0, 5, 10, 20, 30, 30])
    np.testing.assert_array_equal(found[0, :, 0, 0], 0)
    # Three of nine: every third, with no filter.
    np.testing.assert_array_equal(inception.resize(jnp.arange(9.0).reshape(1, 1, 9, 1), 3)[0, 0, :, 0], [0, 3, 6])


def test_averages_leave_the_padding_out():
    x = jnp.ones((1, 4, 4, 1)).at[0, 0, 0].set(5.0)
    average = inception._pool("average", x)[0, :, :, 0]
    np.testing.assert_allclose(average[0], [8 / 4, 10 / 6, 1, 1], rtol=1e-6)
    assert inception._pool("max", -x)[0, 3, 3, 0] == -1  # no padding with 0
