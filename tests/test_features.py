"""The feature network of the digits: what it sees, and that its features do not depend on batches or devices."""

import os
import pathlib
import socket
import subprocess
import sys

import golden_data as gd
import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from titok_jax import models
from titok_jax.data.digits import load_digits
from titok_jax.evaluation import features, metrics
from titok_jax.models import DigitsNetConfig, tables
from titok_jax.models.perceptual import VGG_LEVELS, PerceptualConfig
from titok_jax.weights import convert, tensor_files

ROOT = pathlib.Path(__file__).parents[1]
TOOL = ROOT / "tools" / "train_digits_features.py"


def rgb(grey):
    return np.repeat(grey[..., None], 3, axis=-1)


def statistics(network, images):
    return metrics.FeatureStatistics(network.dim, network.name).update(network(images).pool)


@pytest.fixture(scope="module")
def network():
    return features.load_digits_features()


def test_it_reads_held_out_digits_and_its_features_are_not_singular(network):
    grey, labels = load_digits("test", 32)
    found = network(rgb(grey))
    assert (found.pool.shape, found.spatial, found.logits.shape) == ((360, 64), None, (360, 10))
    assert np.mean(found.logits.argmax(1) == labels) > 0.99  # 358 of 360
    assert metrics.InceptionScore().update(found.logits).value > 9.5  # 10 for certainty, equally many of each
    assert np.linalg.eigvalsh(metrics.FeatureStatistics(64).update(found.pool).covariance)[0] > 0.01
    assert features.DIGITS_WEIGHTS.stat().st_size < 300_000


def test_distance_grows_with_what_is_done_to_the_images(network):
    train, test = rgb(load_digits("train", 32)[0]), rgb(load_digits("test", 32)[0])
    reference, rng = statistics(network, train), np.random.default_rng(0)

    def distance(images):
        return metrics.frechet_distance(reference, statistics(network, images))

    noisy = [np.clip(test + rng.normal(0, sigma, test.shape), 0, 255).astype(np.uint8) for sigma in (40, 120)]
    mirrored, meaningless = test[:, :, ::-1], rng.integers(0, 256, test.shape, np.uint8)
    distances = [distance(images) for images in (train, test, *noisy)]
    assert distances == sorted(distances)
    assert distances[0] == pytest.approx(0, abs=1e-6)
    assert distances[1] < 8 < 100 < distance(mirrored) < 500 < distance(meaningless)


def test_features_do_not_depend_on_batches(network):
    images = rgb(load_digits("test", 32)[0])[:100]
    graphdef, abstract = models.abstract(DigitsNetConfig())
    with tensor_files.open_weights(features.DIGITS_WEIGHTS) as (_, tensors):
        params = convert.from_published(convert.table_for(DigitsNetConfig()), abstract, tensors, source="embedded")
    pool, logits = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))(params, images)
    for found in (network(images), features.load_digits_features(batch_size=7)(images)):
        # Float32: the products are summed in another order.
        np.testing.assert_allclose(found.pool, pool, atol=1e-4)
        np.testing.assert_allclose(found.logits, logits, atol=1e-4)
    np.testing.assert_array_equal(network(images[:1]).pool, network(images).pool[:1])


def test_statistics_do_not_depend_on_devices_and_processes(network, tmp_path):
    """Two processes with four devices each; one sees the even images, the other the odd ones."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    code = (
        "import sys, numpy as np, jax\n"
        f"jax.distributed.initialize('localhost:{port}', 2, int(sys.argv[1]))\n"
        "assert (jax.device_count(), jax.local_device_count()) == (8, 4)\n"
        "from titok_jax.evaluation import features, metrics\n"
        "from titok_jax.data.digits import load_digits\n"
        "network = features.load_digits_features(batch_size=50)\n"
        "images = load_digits('test', 32)[0][int(sys.argv[1])::2]\n"
        "found = network(np.repeat(images[..., None], 3, -1))\n"
        "metrics.FeatureStatistics(64, network.name).update(found.pool).save(sys.argv[2])\n"
    )
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    paths = [tmp_path / "0.npz", tmp_path / "1.npz"]
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(i), str(path)], cwd=ROOT, env=environment)
        for i, path in enumerate(paths)
    ]
    assert [process.wait(timeout=900) for process in processes] == [0, 0]
    merged = metrics.FeatureStatistics(64)
    for path in paths:
        merged.merge(metrics.FeatureStatistics.load(path))
    assert (merged.count, merged.network) == (360, "digits")
    alone = statistics(network, rgb(load_digits("test", 32)[0]))
    # Features go up to 20 and are equal to 1e-6 of that.
    np.testing.assert_allclose(merged.mean, alone.mean, atol=1e-5)
    np.testing.assert_allclose(merged.covariance, alone.covariance, atol=1e-4)
    reference = statistics(network, rgb(load_digits("train", 32)[0]))
    distances = [metrics.frechet_distance(reference, found) for found in (alone, merged)]
    assert distances[0] == pytest.approx(distances[1], rel=1e-6)


def test_images_that_it_does_not_take(network):
    images = rgb(load_digits("test", 32)[0])
    with pytest.raises(ValueError, match=r"images are float64 \[360, 32, 32, 3\], expected uint8"):
        network(images / 255)
    with pytest.raises(ValueError, match=r"images are uint8 \[360, 32, 32\]"):
        network(images[..., 0])
    with pytest.raises(ValueError, match=r"images are uint8 \[0, 32, 32, 3\]"):
        network(images[:0])
    with pytest.raises(ValueError, match="images of 16x32 pixels, expected 32x32: the digits network"):
        network(images[:, :16])


def test_training_repeats_itself_and_learns(tool, tmp_path, capsys):
    output = tmp_path / "digits.safetensors"
    assert tool.main([str(output), "--steps", "25"]) == 0
    accuracy = float(capsys.readouterr().out.split('"test": ')[1].split("}")[0])
    assert accuracy > 0.4  # 0.1 by chance
    again = convert.to_published(convert.table_for(DigitsNetConfig()), tool.train(25, seed=0))
    with tensor_files.open_weights(output) as (_, tensors):
        assert tensors.keys() == again.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(tensor, again[name])
    assert tool.main([str(output)]) == 2
    assert "nothing was overwritten" in capsys.readouterr().err


def test_lpips_of_each_image(tmp_path):
    """With the golden runs' weights and images. The heads are not negative, like the real ones."""
    table, (_, abstract) = tables.perceptual_table(), models.abstract(PerceptualConfig("lpips"))
    seeded = {
        name: abs(w) if ".lin" in name else w
        for name, w in gd.seeded_weights(convert.published_shapes(table, abstract)).items()
    }
    vgg = {}
    for name, array in seeded.items():
        if ".net." in name:
            *_, number, leaf = name.split(".")
            vgg[f"features.{number}.{leaf}"] = array
    assert len(vgg) == 2 * sum(map(len, VGG_LEVELS))
    safetensors.numpy.save_file(vgg, tmp_path / "vgg16-397923af.safetensors")
    with pytest.raises(FileNotFoundError, match=r"lpips_vgg\.pth.*set --lpips to the folder"):
        features.load_lpips(tmp_path)
    heads = {name.removeprefix("lpips."): array for name, array in seeded.items() if ".lin" in name}
    safetensors.numpy.save_file(heads, tmp_path / "lpips_vgg.safetensors")
    distances = features.load_lpips(tmp_path)(gd.images(2, 64, 5), gd.images(2, 64, 6))
    assert distances.shape == (2,)
    gd.compare(gd.load("training/convnext_s.npz"), "perceptual64/lpips_abs/value", distances[:, None, None, None], 1e-4)
