"""InceptionV3 against the published evaluator's, which ran in float64 with the same seeded weights."""

import hashlib
import importlib.util
import pathlib

import golden_data as gd
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from titok_jax import models
from titok_jax.evaluation import features
from titok_jax.models import inception
from titok_jax.models.inception import InceptionConfig
from titok_jax.weights import convert
from titok_jax.weights.convert import WeightsError

# Float32 against float64 through 48 layers: 1e-6 measured for features and logits, 3e-6 for single activations.
TOLERANCE = 1e-5
ROOT = pathlib.Path(__file__).parents[1]
TABLE = convert.table_for(InceptionConfig())


@pytest.fixture(scope="module")
def golden():
    return gd.load("inception.npz")


def golden_images(size: int) -> np.ndarray:
    """The golden runs' uint8 images. The second is darker, so that their features differ."""
    images = (gd.images(2, size, {256: 50, 64: 51}[size]) * 255).astype(np.uint8)
    images[1] //= 3
    return images


def golden_weights() -> dict[str, np.ndarray]:
    """The golden runs' weights by published name. With seeded kernels alone, the signal would vanish on its way."""
    shapes = convert.published_shapes(TABLE, models.abstract(InceptionConfig())[1])
    weights = gd.seeded_weights(shapes)
    return {name: array * np.float32(1.5) if name.endswith(".conv.weight") else array for name, array in weights.items()}


def test_names_and_shapes_are_the_published_ones():
    expected = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for name, shape in gd.load_json("shapes/inception_convolutions.json").items():
        expected[f"{name}.conv.weight"] = tuple(shape)
        expected |= {f"{name}.bn.{leaf}": (shape[0],) for leaf in ("weight", "bias", "running_mean", "running_var")}
    assert convert.published_shapes(TABLE, models.abstract(InceptionConfig())[1]) == expected


def test_every_layer_and_output(golden):
    graphdef, abstract = models.abstract(InceptionConfig())
    params = convert.from_published(TABLE, abstract, golden_weights(), source="seeded")

    @jax.jit
    def run(params, images):
        net = nnx.merge(graphdef, params)
        return net(images), net.activations(images)

    found, layers = run(params, golden_images(256))
    outputs = dict(zip(("64", "192", "768", "2048"), found, strict=False))
    outputs |= {"logits_unbiased": found.logits_unbiased, "logits": found.logits}
    for name, value in outputs.items():
        gd.compare(golden, f"256/{name}", value, TOLERANCE)
    gd.compare(golden, "256/resized299", gd.nchw(layers["resized"]), TOLERANCE)
    stored = {name.split("/")[1].split(".")[0] for name in golden if name.startswith("256/")}
    blocks = {name for name in stored if name[0].isupper()}
    assert blocks == layers.keys() - {"resized", "Mixed_6d.branch1x1"}
    for name in blocks:
        gd.compare(golden, f"256/{name}", gd.nchw(layers[name]), TOLERANCE)
    # Channel 0 of Mixed_6d is that of its first branch.
    spatial, step = np.asarray(found.spatial).reshape(2, 17, 17, 7), int(golden["256/Mixed_6d.stride"][2])
    error = spatial[:, ::step, ::step, 0] - golden["256/Mixed_6d"][:, 0]
    gd.within(error, TOLERANCE * golden["256/Mixed_6d.stats"][2], "Mixed_6d")
    assert found.spatial.shape == (2, 2023)


@pytest.mark.parametrize("size", [256, 64])
def test_resize_is_tensorflows(golden, size):
    resized = gd.nchw(inception.resize(jnp.asarray(golden_images(size), jnp.float32), 299))
    # Pixels are 0 ... 255. As in the TensorFlow graph, positions are float32: an error of 8e-4.
    np.testing.assert_allclose(resized[0, :, 7], golden[f"{size}/resized299_row"], atol=3e-3)
    np.testing.assert_allclose(resized[0, :, -6:, -6:], golden[f"{size}/resized299_last_corner"], atol=3e-3)


def test_resize_by_hand():
    """Pixel i samples position i / 2: every other new pixel is halfway between old ones, and the last one is repeated."""
    x = jnp.asarray(np.array([0.0, 10.0, 30.0], np.float32).reshape(1, 1, 3, 1))
    found = inception.resize(x, 6)
    np.testing.assert_allclose(found[0, 0, :, 0], [0, 5, 10, 20, 30, 30])
    np.testing.assert_array_equal(found[0, :, 0, 0], 0)
    # From nine pixels to three: every third one, with no filter.
    np.testing.assert_array_equal(inception.resize(jnp.arange(9.0).reshape(1, 1, 9, 1), 3)[0, 0, :, 0], [0, 3, 6])


def test_averages_leave_the_padding_out():
    x = jnp.ones((1, 4, 4, 1)).at[0, 0, 0].set(5.0)
    average = inception._pool("average", x)[0, :, :, 0]
    np.testing.assert_allclose(average[0], [8 / 4, 10 / 6, 1, 1], rtol=1e-6)
    assert inception._pool("max", -x)[0, 3, 3, 0] == -1  # the padding is not 0


@pytest.fixture
def published_file(tmp_path):
    """The golden weights in place of the published file. The file is safetensors, whatever its name."""
    path = tmp_path / "published.pth"
    safetensors.numpy.save_file(golden_weights(), path)
    yield path
    for file in tmp_path.iterdir():  # 96 MB each
        file.unlink()


def test_published_file_is_verified_converted_and_used(golden, published_file, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("convert_weights", ROOT / "tools" / "convert_weights.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    converted = tmp_path / "inception.safetensors"

    # Another network with the same shapes.
    with pytest.raises(WeightsError, match=r"not the InceptionV3 of FID: its SHA-256 is .* expected 6726825d0af5f7"):
        features.load_inception(published_file)
    assert tool.main([str(published_file), str(converted)]) == 2
    assert "not the InceptionV3 of FID" in capsys.readouterr().err
    assert not converted.exists()

    with open(published_file, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    monkeypatch.setattr(features, "INCEPTION_SHA256", digest)
    monkeypatch.setattr(features, "CONVERTED_FROM_PUBLISHED", {"source_sha256": digest})
    assert tool.main([str(published_file), str(tmp_path / "half.safetensors"), "--dtype", "float16"]) == 2
    assert "in float32 only" in capsys.readouterr().err
    assert tool.main([str(published_file), str(converted)]) == 0
    assert "472 tensors" in capsys.readouterr().out

    monkeypatch.setenv("TITOK_JAX_INCEPTION", str(converted))
    network = features.load_inception(batch_size=2)
    found = network(golden_images(64))
    gd.compare(golden, "64/2048", found.pool, TOLERANCE)
    gd.compare(golden, "64/logits_unbiased", found.logits, TOLERANCE)
    assert (found.pool.shape, found.spatial.shape, found.logits.shape) == tuple(
        (2, size) for size in (network.dim, network.spatial_dim, network.num_classes)
    )
    assert network.name == "inception-2015-12-05"

    # One bit of one tensor is flipped.
    data = bytearray(converted.read_bytes())
    data[-100] ^= 1
    converted.write_bytes(data)
    with pytest.raises(WeightsError, match="is not what was written"):
        features.load_inception()
    # Another program would convert the same tensors without a note of their origin.
    safetensors.numpy.save_file(golden_weights(), converted, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"its SHA-256 is .* and it does not say that it was converted"):
        features.load_inception()


def test_absent_weights(tmp_path, monkeypatch):
    monkeypatch.delenv("TITOK_JAX_INCEPTION", raising=False)
    with pytest.raises(
        FileNotFoundError, match=r"none are given: download https://github\.com/.*6726825d\.pth .*--inception"
    ):
        features.load_inception()
    with pytest.raises(FileNotFoundError, match=r"absent\.pth is not a file: download .* TITOK_JAX_INCEPTION"):
        features.load_inception(tmp_path / "absent.pth")
    monkeypatch.setenv("TITOK_JAX_INCEPTION", str(tmp_path / "other.pth"))
    with pytest.raises(FileNotFoundError, match=r"other\.pth is not a file"):
        features.load_inception()
