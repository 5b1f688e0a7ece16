"""The evaluation: its figures against a second computation, what it refuses, and what it keeps when it is killed.

Most tests replace the feature network with a random projection; test_features.py tests the networks themselves.
"""

import contextlib
import dataclasses
import functools
import json
import math
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import scipy.linalg
import scipy.special
import tiny_models as tiny
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from test_inception import golden_weights

from titok_jax import evaluate, inference, sample
from titok_jax.data.digits import load_digits
from titok_jax.data.transforms import center_crop_adm, center_crop_torchvision, to_uint8_round, to_uint8_truncate
from titok_jax.evaluation import digits, features, image_sources, jobs, metrics, pieces, references, scores, sweep
from titok_jax.inference import decoding, many
from titok_jax.models import MaskgitVQGANConfig, SamplingConfig
from titok_jax.runtime import outputs
from titok_jax.runtime.shards import Shards
from titok_jax.weights import model_files, pretrained

# There are fewer images than features; the metrics handle that.
pytestmark = pytest.mark.filterwarnings("ignore:Matrix is singular")


class Projection:
    """A stand-in for a feature network: the pixels, projected at random."""

    def __init__(self, name="projection", dims=(6, 4, 10)):
        self.name, self._dims, self.batches = name, dims, []
        self.dim, self.spatial_dim, self.num_classes = dims

    def __call__(self, images):
        assert images.dtype == np.uint8
        self.batches.append(len(images))
        flat = images.reshape(len(images), -1) / 255.0
        weights = np.random.default_rng(0).standard_normal((flat.shape[1], sum(self._dims))) / 10
        parts = np.split(np.maximum(flat @ weights, 0).astype(np.float32), np.cumsum(self._dims)[:-1], axis=1)
        return SimpleNamespace(pool=parts[0], spatial=parts[1], logits=parts[2])


@pytest.fixture
def networks(monkeypatch):
    """Stand-ins for both networks."""
    monkeypatch.setattr(features, "load_digits_features", lambda **_: Projection())
    monkeypatch.setattr(features, "load_inception", lambda path, **_: Projection("inception", (7, 4, 10)))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("models") / "generator"))


@pytest.fixture(scope="module")
def pair(model):
    return PAIRS(model)


@pytest.fixture
def loaded_once(monkeypatch, model, pair):
    """Models are read and compiled once for all tests."""
    monkeypatch.setattr(inference, "load_pair", lambda *a, **k: PAIRS(a[0]))
    monkeypatch.setattr(inference, "load_tokenizer", lambda source, **k: PAIRS(source)[0])


@pytest.fixture
def no_weights(monkeypatch):
    """Makes it an error to read weights: a command must refuse before it reads any."""

    def load(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(pretrained, "load", load)


PAIRS = functools.cache(inference.load_pair)


def rgb(split, size=32):
    return np.repeat(load_digits(split, size)[0][..., None], 3, axis=-1)


def frechet(a, b):
    """The published Frechet distance in a few lines. The root can be NaN where features are constant (scipy 1.18), hence the
    offset."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    (mu_a, mu_b), (c_a, c_b) = [x.mean(0) for x in (a, b)], [np.cov(x, rowvar=False) for x in (a, b)]
    root = scipy.linalg.sqrtm(c_a @ c_b)
    if not np.isfinite(root).all():
        offset = 1e-6 * np.eye(len(root))
        root = scipy.linalg.sqrtm((c_a + offset) @ (c_b + offset))
    return np.square(mu_a - mu_b).sum() + np.trace(c_a + c_b - 2 * root.real)


def read(path):
    return json.loads(Path(path).read_text())


def main(*arguments):
    """Runs the command, which must succeed."""
    assert evaluate.main([str(argument) for argument in arguments]) == 0


@pytest.mark.parametrize(
    ("num", "name"), [(50_000, "FID"), (5_000, "FID-5K"), (360, "FID-360"), (1_000, "FID-1K"), (100_000, "FID-100K")]
)
def test_names_say_of_how_many_images(num, name):
    assert scores.metric_name("FID", num) == name


# ---------------------------------------------------------------------------------------------------------------------
# Reconstruction


def pictures_folder(folder, count=7):
    """Fills a folder with smooth pictures of many shapes -> the pictures."""
    rng = np.random.default_rng(0)
    arrays = []
    for index in range(count):
        size = (33 + 9 * index, 90 - 7 * index)
        image = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        (folder / f"class{index % 2}").mkdir(parents=True, exist_ok=True)
        image.save(folder / f"class{index % 2}" / f"{index}.png")
        arrays.append(np.asarray(image))
    return [arrays[i] for i in (*range(0, count, 2), *range(1, count, 2))]  # sorted by path


@pytest.mark.parametrize("kind", ["vq", "vae", "vqgan"])
def test_reconstruction_figures(kind, model, networks, tmp_path, capsys):
    folder = model
    if kind == "vae":
        folder = tiny.save(tmp_path / "vae", tiny.VAE)
    if kind == "vqgan":
        config = MaskgitVQGANConfig(hidden_channels=32, channel_mult=(1, 2, 2), num_res_blocks=1, resolution=32)
        folder = pretrained.save(tmp_path / "vqgan", config, tiny.params(config))
    arrays = pictures_folder(tmp_path / "photos")
    out = tmp_path / "r.json"
    options = ["--model", folder, "--reconstruct", tmp_path / "photos", "--features", "inception", "--json", out]
    main(*options, "--batch-size", 3)
    result = read(out)
    # The library computes the same, all at once.
    tokenizer = inference.load_vqgan(folder) if kind == "vqgan" else inference.load_tokenizer(folder)
    images = np.stack([center_crop_torchvision(array, 32) for array in arrays])
    tokens = tokenizer.encode(images, 0) if kind == "vae" else tokenizer.encode(images)  # a VAE's are drawn, as published
    rebuilt = to_uint8_round(tokenizer.decode(tokens))
    network = Projection("inception", (7, 4, 10))
    real, fake = network(images), network(rebuilt)
    p = scipy.special.softmax(fake.logits.astype(np.float64), -1)
    expected = {
        "rFID-7": frechet(real.pool, fake.pool),
        "IS-7": math.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(0))), -1))),
        "psnr": metrics.psnr(images / 255.0, rebuilt / 255.0).mean(),
        "ssim": metrics.ssim(images / 255.0, rebuilt / 255.0).mean(),
    }
    if kind != "vae":
        expected["codebook_usage"] = len(np.unique(tokens)) / tokenizer.config.codebook_size
    for name, value in expected.items():
        assert result["metrics"][name] == pytest.approx(value, rel=2e-3), name  # single pixels round differently by batch
    assert ("perplexity" in result["metrics"]) == (kind != "vae")
    assert (result.get("latents"), result.get("seed")) == (("sample", 0) if kind == "vae" else (None, None))
    assert (result["crop"], result["num_images"], result["features"]["network"]) == ("torchvision", 7, "inception")
    assert result["sha256"]["tokenizer"] == outputs.sha256(model_files.locate(folder, type(tokenizer.config)).weights)
    assert result["features"]["sha256"] == features.INCEPTION_SHA256
    assert "rFID-7" in capsys.readouterr().out
    assert not (tmp_path / "r.json.shards").exists()
    main(*options, "--num", 3, "--overwrite")
    assert "rFID-3" in read(out)["metrics"]
    options[-1] = tmp_path / "mean.json"
    if kind == "vae":
        main(*options, "--latents", "mean")
        mean = read(tmp_path / "mean.json")
        assert mean["latents"] == "mean"
        assert mean["metrics"]["psnr"] != result["metrics"]["psnr"]
    else:
        assert evaluate.main([*map(str, options), "--latents", "mean"]) == 2
        assert "--latents is for VAEs" in capsys.readouterr().err


def test_lpips(model, networks, loaded_once, tmp_path, monkeypatch):
    def load(folder, mesh):
        assert folder == str(tmp_path)
        return lambda a, b: 3 * np.mean((a - b) ** 2, (1, 2, 3))

    monkeypatch.setattr(features, "load_lpips", load)
    (tmp_path / "vgg16-397923af.pth").write_bytes(b"vgg")
    (tmp_path / "lpips_vgg.safetensors").write_bytes(b"heads")
    main("--model", model, "--reconstruct", "digits:test", "--num", 5, "--lpips", tmp_path, "--json", tmp_path / "r.json")
    result = read(tmp_path / "r.json")
    assert result["lpips_sha256"].keys() == {"vgg16-397923af.pth", "lpips_vgg.safetensors"}
    tokenizer = inference.load_tokenizer(model)
    images = rgb("test")[np.arange(5) * 360 // 5]
    rebuilt = to_uint8_round(tokenizer.decode(tokenizer.encode(images)))
    assert result["metrics"]["lpips"] == pytest.approx(3 * np.mean(((images / 255.0) - rebuilt / 255.0) ** 2), rel=1e-4)
    assert "digits-rFID-5" in result["metrics"]  # digits have their own feature network


# ---------------------------------------------------------------------------------------------------------------------
# Generation


def test_generation_figures_and_references(model, pair, networks, loaded_once, tmp_path):
    """Samples from a model and the same from a file; a reference from a data set and the same, saved and loaded."""
    options = ["--model", model, "--features", "digits"]
    settings = ["--num", 20, "--steps", 3, "--seed", 4, "--batch-size", 8]
    main(*options, *settings, "--reference", "digits:test", "--json", tmp_path / "a.json")
    main(*options, "--reference", "digits:test", "--save-reference", tmp_path / "ref.npz")
    main(*options, *settings, "--reference", tmp_path / "ref.npz", "--json", tmp_path / "b.json")
    assert sample.main([str(a) for a in (*options[:2], *settings, "--out", tmp_path / "samples.npz")]) == 0
    main(
        "--samples",
        tmp_path / "samples.npz",
        *options[2:],
        "--reference",
        tmp_path / "ref.npz",
        "--json",
        tmp_path / "c.json",
    )
    results = [read(tmp_path / f"{name}.json") for name in "abc"]

    tokenizer, generator = pair
    labels = np.arange(20) % 10
    ids = inference.generate(generator, labels, jax.random.key(4), num_steps=3)
    images = to_uint8_truncate(tokenizer.decode(ids))
    network = Projection()
    fake, real = network(images), network(np.stack([center_crop_adm(image, 32) for image in rgb("test")]))
    precision, recall = metrics.precision_recall(real.pool, fake.pool)
    p = scipy.special.softmax(fake.logits.astype(np.float64), -1)
    expected = {
        "digits-FID-20": frechet(real.pool, fake.pool),
        "digits-sFID-20": frechet(real.spatial, fake.spatial),
        "digits-IS-20": math.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(0))), -1))),
        "digits-precision-20": precision,
        "digits-recall-20": recall,
    }
    for result in results:
        found = {name: value for name, value in result["metrics"].items() if name.startswith("digits")}
        assert found == pytest.approx(expected, rel=2e-3)
    assert results[0]["metrics"] == pytest.approx(results[1]["metrics"], rel=1e-12)
    assert results[0]["sampling"]["num_steps"] == 3
    assert (results[0]["seed"], results[0]["num_images"], results[0]["dtype"]) == (4, 20, "float32")
    assert results[0]["reference"] == {
        **{"source": "digits:test", "crop": "adm", "image_size": 32},
        **{"num_images": 360, "network": "projection", "neighbourhoods": 360},
    }
    assert results[1]["reference"]["sha256"] == outputs.sha256(tmp_path / "ref.npz")
    assert results[2]["samples_sha256"] == outputs.sha256(tmp_path / "samples.npz")
    assert {path.name for path in tmp_path.iterdir()} == {*("a.json", "b.json", "c.json", "ref.npz", "samples.npz")}


def test_adm_references(model, networks, tmp_path):
    """FID uses the file's statistics, which cover more images than the file holds; precision and recall use its images."""
    train, few = rgb("train"), rgb("test")[:40]
    network = Projection("inception", (7, 4, 10))
    real = network(train)
    arrays = {"arr_0": few}
    for name, x in (("", real.pool), ("_s", real.spatial)):
        arrays |= {f"mu{name}": x.mean(0), f"sigma{name}": np.cov(x.astype(np.float64), rowvar=False)}
    np.savez(tmp_path / "VIRTUAL.npz", **arrays)
    np.savez(tmp_path / "images.npz", arr_0=few)
    samples = np.roll(rgb("test")[100:150], 1, axis=1)
    np.savez(tmp_path / "samples.npz", samples)
    options = ["--samples", tmp_path / "samples.npz", "--features", "inception", "--json", tmp_path / "a.json"]
    main(*options, "--reference", tmp_path / "VIRTUAL.npz")
    result, fake = read(tmp_path / "a.json"), network(samples)
    precision, recall = metrics.precision_recall(network(few).pool, fake.pool)
    figures = result["metrics"]
    assert figures["FID-50"] == pytest.approx(frechet(real.pool, fake.pool), rel=1e-5)
    assert figures["sFID-50"] == pytest.approx(frechet(real.spatial, fake.spatial), rel=1e-5)
    assert (figures["precision-50"], figures["recall-50"]) == (precision, recall)
    assert (result["reference"]["num_images"], result["reference"]["neighbourhoods"]) == (None, 40)
    main(*options, "--reference", tmp_path / "images.npz", "--overwrite")  # a file without statistics: its images give them
    assert read(tmp_path / "a.json")["metrics"]["FID-50"] == pytest.approx(frechet(network(few).pool, fake.pool), rel=1e-5)


def test_references_of_images_have_the_crop_of_adm(networks, tmp_path):
    arrays = pictures_folder(tmp_path / "photos", 8)
    np.savez(tmp_path / "samples.npz", rgb("test")[:30])
    options = ["--samples", tmp_path / "samples.npz", "--features", "inception", "--json", tmp_path / "a.json"]
    main(*options, "--reference", tmp_path / "photos")
    network, found = Projection("inception", (7, 4, 10)), read(tmp_path / "a.json")["metrics"]["FID-30"]
    fake = network(rgb("test")[:30]).pool
    crops = {crop: network(np.stack([crop(array, 32) for array in arrays])).pool for crop in image_sources.CROPS.values()}
    assert found == pytest.approx(frechet(crops[center_crop_adm], fake), rel=1e-6)
    assert found != pytest.approx(frechet(crops[center_crop_torchvision], fake), rel=1e-4)


def test_the_whole_path_with_inception(tmp_path, monkeypatch, capsys):
    """Seeded weights in the format of the published file. The distance of 2,048 features has its own tests."""
    monkeypatch.delenv("TITOK_JAX_INCEPTION", raising=False)
    images = rgb("test")[:12]
    np.savez(tmp_path / "samples.npz", images[:6])
    np.savez(tmp_path / "adm.npz", images[6:])
    options = ["--samples", tmp_path / "samples.npz", "--reference", tmp_path / "adm.npz", "--json", tmp_path / "a.json"]
    assert evaluate.main([str(option) for option in options]) == 2  # and not another network in its place
    assert "FID needs the weights of InceptionV3, but none are given: download https://" in capsys.readouterr().err

    weights = tmp_path / "inception.safetensors"
    safetensors.numpy.save_file(golden_weights(), weights)
    monkeypatch.setattr(features, "INCEPTION_SHA256", outputs.sha256(weights))
    monkeypatch.setattr(features, "verify_inception", lambda path: None)
    monkeypatch.setenv("TITOK_JAX_INCEPTION", str(weights))
    found = features.load_inception(batch_size=6)(images)
    compared = []

    def distance(a, b):
        assert a.network == b.network == "inception-2015-12-05"
        compared.append((a.mean, b.mean))
        return 0.5 + len(compared)

    monkeypatch.setattr(metrics, "frechet_distance", distance)
    main(*options, "--batch-size", 6)
    result = read(tmp_path / "a.json")
    assert result["features"] == {"network": "inception-2015-12-05", "sha256": outputs.sha256(weights)}
    for (samples, reference), name in zip(compared, ("pool", "spatial"), strict=True):
        expected = getattr(found, name).astype(np.float64)
        for mean, rows in ((samples, expected[:6]), (reference, expected[6:])):
            np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-5, atol=1e-6 * expected.max())
    p = scipy.special.softmax(found.logits[:6].astype(np.float64), -1)
    assert result["metrics"] == {
        "FID-6": 1.5,
        "sFID-6": 2.5,
        "IS-6": pytest.approx(math.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(0))), -1))), rel=1e-5),
        **dict(zip(("precision-6", "recall-6"), metrics.precision_recall(found.pool[6:], found.pool[:6]), strict=True)),
    }
    weights.unlink()  # 96 MB


def test_neighbourhoods_are_spread_over_a_large_reference(tmp_path, monkeypatch):
    monkeypatch.setattr(references, "MOST_NEIGHBOURHOODS", 5)
    shards = Shards(tmp_path / "s", {}, 13, 4)
    pool = np.random.default_rng(0).random((13, 3)).astype(np.float32)
    for number in range(4):
        shards.write(number, pool=pool[shards.items(number)])
    reference = references.make_reference(shards, "n", {})
    np.testing.assert_array_equal(reference.neighbourhoods, pool[[0, 3, 6, 9, 12]])
    np.testing.assert_allclose(reference.pool.covariance, np.cov(pool.astype(np.float64), rowvar=False))
    assert reference.spatial is None


def test_images_in_a_file_are_read_in_any_order(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (9, 5, 5, 3), np.uint8)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", images, labels=np.repeat([1, 2, 3], 3))
        found = image_sources.NpzImages(tmp_path / "a.npz")
        assert (len(found), found.size, found.sorted_by_class) == (9, 5, True)
        for items in (slice(0, 4), slice(7, 9), slice(2, 3)):
            np.testing.assert_array_equal(found.read(items), images[items])
    np.savez(tmp_path / "b.npz", images, labels=np.arange(9) % 3)
    assert not image_sources.NpzImages(tmp_path / "b.npz").sorted_by_class
    assert not image_sources.NpzImages(tmp_path / "b.npz").sorted_by_class


def test_samples_sorted_by_class_are_noted(networks, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scores, "ADM_SPLIT", 10)
    np.savez(tmp_path / "s.npz", arr_0=rgb("test")[:20], labels=np.repeat([0, 1], 10))
    main("--samples", tmp_path / "s.npz", "--reference", "digits:test", "--json", tmp_path / "s.json")
    assert "note: the samples are sorted by class" in capsys.readouterr().out
    assert len(read(tmp_path / "s.json")["notes"]) == 1


def test_a_killed_evaluation_goes_on(model, networks, loaded_once, tmp_path, monkeypatch):
    arguments = ["--model", model, "--reference", "digits:test", "--num", 30, "--steps", 3, "--batch-size", 8]
    main(*arguments, "--json", tmp_path / "whole.json")
    write, written = Shards.write, []

    def dies(self, number, **arrays):
        if len(written) == 47:  # 45 pieces of the reference, 4 of the samples
            raise KeyboardInterrupt
        written.append((self.folder.name, number))
        write(self, number, **arrays)

    monkeypatch.setattr(Shards, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        main(*arguments, "--json", tmp_path / "killed.json")
    assert not (tmp_path / "killed.json").exists()
    before, calls = list(written), []

    def counts(self, number, **arrays):
        calls.append((self.folder.name, number))
        write(self, number, **arrays)

    monkeypatch.setattr(Shards, "write", counts)
    main(*arguments, "--json", tmp_path / "killed.json")
    assert before[-2:] + calls == [("generated", number) for number in range(4)]
    assert read(tmp_path / "killed.json") == read(tmp_path / "whole.json")
    assert not (tmp_path / "killed.json.shards").exists()


def test_processes_share_an_evaluation(model, networks, loaded_once, tmp_path, monkeypatch):
    """Three processes, here threads, give the figures of one process, to the last bit."""
    arguments = ["--model", model, "--reference", "digits:test", "--num", 30, "--steps", 3, "--batch-size", 8, "--json"]
    main(*arguments, tmp_path / "one.json")
    process, barrier, made = threading.local(), threading.Barrier(3), {}
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "process_index", lambda: process.index)
    monkeypatch.setattr(Shards, "wait", lambda self, event: barrier.wait(300))
    lock = jobs.lock_run

    def lock_run(place, *, process_index, process_count, temporary):
        return contextlib.nullcontext() if process_index else lock(place, temporary=temporary)

    monkeypatch.setattr(jobs, "lock_run", lock_run)
    write = Shards.write

    def counts(self, number, **arrays):
        made.setdefault((self.folder.name, number), []).append(process.index)
        write(self, number, **arrays)

    monkeypatch.setattr(Shards, "write", counts)

    def start(index):
        process.index = index
        return evaluate.main([str(argument) for argument in (*arguments, tmp_path / "three.json")])

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(start, range(3))) == [0, 0, 0]
    assert made == {("reference", n): [n % 3] for n in range(45)} | {("generated", n): [n % 3] for n in range(4)}
    assert read(tmp_path / "three.json") == read(tmp_path / "one.json")
    assert not (tmp_path / "three.json.shards").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Sweeps


def test_a_sweep_is_continued_and_drawn(model, networks, loaded_once, tmp_path, capsys, monkeypatch):
    out = tmp_path / "sweep.json"
    options = ["--model", model, "--num", 20, "--steps", 3, "--json", out]
    generated = []
    monkeypatch.setattr(
        pieces,
        "sample",
        lambda *a, **k: generated.append((k["sampling"].guidance_scale, k["sampling"].temperature)) or many.sample(*a, **k),
    )
    main(*options, "--guidance-scale", "0,3", "--temperature", "2,1")
    assert generated == [(0, 2), (0, 1), (3, 2), (3, 1)]
    result = read(out)
    places = [(p["sampling"]["temperature"], p["sampling"]["guidance_scale"]) for p in result["points"]]
    assert places == [(1, 0), (1, 3), (2, 0), (2, 3)]
    assert [p["sampling"]["guidance_schedule"] for p in result["points"]] == ["linear"] * 4
    # A separate evaluation gives the same figures as a point of the sweep.
    main(*options[:-1], tmp_path / "one.json", "--reference", "digits:train", "--guidance-scale", "3", "--temperature", "2")
    assert read(tmp_path / "one.json")["metrics"] == pytest.approx(result["points"][3]["metrics"], rel=1e-9)
    # When points are added, the existing ones are kept.
    generated.clear()
    main(*options, "--guidance-scale", "0,3,1.5", "--temperature", "2,1")
    assert generated == [(1.5, 2), (1.5, 1)]
    points = read(out)["points"]
    assert [points[i] for i in (0, 2, 3, 5)] == result["points"]
    picture = np.asarray(Image.open(tmp_path / "sweep.png").convert("RGB"))
    assert picture.shape[1] > 720  # the table beside the curve
    blue = (np.abs(picture[:, :720].astype(int) - (0, 114, 178)).max(-1) < 40).sum()
    assert blue > 100
    # Other settings are another sweep.
    before = out.read_bytes()
    assert evaluate.main([str(a) for a in (*options, "--seed", 1, "--guidance-scale", "0,3")]) == 2
    assert "sweep.json is a sweep with other settings (seed: 0 there, 1 now)" in capsys.readouterr().err
    assert out.read_bytes() == before
    generated.clear()
    main(*options, "--seed", 1, "--guidance-scale", "0,3", "--overwrite")
    assert len(read(out)["points"]) == len(generated) == 2
    assert not (tmp_path / "sweep.json.shards").exists()


def settings_of(*arguments):
    (settings,) = sweep.settings_grid(evaluate._parser().parse_args(arguments), tiny.GENERATOR)
    return settings


def test_without_guidance_only_the_conditional_half_runs():
    """Counts the labels of each forward pass."""
    passes = []

    def logits(ids, labels):
        jax.debug.callback(lambda labels: passes.append(np.asarray(labels).tolist()), labels)
        return jnp.zeros((*ids.shape, 16)) + labels[:, None, None]

    def count(settings):
        passes.clear()
        keys = jax.random.split(jax.random.key(0), 3)
        options = {"num_tokens": 8, "codebook_size": 16, "num_classes": 10, "noise": decoding.noise_from_keys(keys)}
        options |= dataclasses.asdict(settings)
        decoding.parallel_decode(logits, jnp.array([3, 1, 4]), **options).ids.block_until_ready()
        jax.effects_barrier()
        return list(passes)

    both = [3, 10, 1, 10, 4, 10]
    assert count(settings_of("--steps", "4", "--guidance-scale", "2.5")) == [[3, 1, 4], both, both, both]  # "linear"
    assert count(settings_of("--steps", "4", "--guidance-scale", "0")) == [[3, 1, 4]] * 4


# ---------------------------------------------------------------------------------------------------------------------
# The digits


class FakeTokenizer:
    """Encodes an image as its index among all digits, and decodes it 10 % darker."""

    config, mesh = SimpleNamespace(image_size=32, has_tokens=True, codebook_size=4000), None

    def __init__(self):
        self.images = np.concatenate([rgb("train"), rgb("test")])
        self._place = {image.tobytes(): i for i, image in reversed(list(enumerate(self.images)))}

    def encode(self, images, key=None, first_index=0):
        return np.array([[self._place[image.tobytes()]] for image in images], np.int32)

    def decode(self, tokens):
        return (0.9 / 255 * self.images[np.asarray(tokens)[:, 0]]).astype(np.float32)


def test_figures_of_a_model_that_copies(tmp_path, monkeypatch):
    """The figures expose a generator that repeats a few training digits, some under a wrong label."""
    train, labels = load_digits("train")
    test, _ = load_digits("test")
    tokenizer = FakeTokenizer()
    calls = []

    def generate(wanted, key, *, first_index, sampling):
        calls.append((first_index, sampling.num_steps))
        places = first_index + np.arange(len(wanted))
        given = np.where(places % 50 < 10, (wanted + 1) % 10, wanted)  # a fifth of each class is of the next class
        ids = np.array([np.flatnonzero(labels == label)[1] for label in given])  # always the same digit of a class
        return ids[:, None].astype(np.int32)

    generator = SimpleNamespace(config=tiny.GENERATOR, mesh=None, generate=generate)
    work = jobs.Work(tmp_path / "work", batch_size=64, image_size=32, quiet=True)
    options = {"num": 150, "seed": 0, "settings": SamplingConfig(num_steps=3), "identity": {}}
    result = digits.evaluate_digits(tokenizer, generator, Projection(), work, **options)
    assert calls == [(0, 3), (64, 3), (128, 3)]
    assert result["generated_accuracy"] == pytest.approx(0.8)
    assert result["generation"] == {"num_images": 150, "distinct_tokens": 10, "seen_tokens": 1.0}
    assert result["real_accuracy"] > 0.97
    assert result["reconstructed_accuracy"] == pytest.approx(result["real_accuracy"], abs=0.02)
    error = np.square((test - np.round(0.9 * test)) / 255.0).mean((1, 2))
    held_out = result["reconstruction"]["held_out"]
    assert held_out["psnr"] == pytest.approx(np.mean(-10 * np.log10(error)), abs=1e-3)
    assert 0.9 < held_out["ssim"] < 1
    assert held_out["codebook_usage"] == pytest.approx(360 / 4000, abs=2 / 4000)
    assert result["reconstruction"]["training"]["perplexity"] == pytest.approx(1437, rel=0.01)
    distances = result["distance_to_nearest_training_digit"]
    vectors = [x.reshape(len(x), -1) / 255.0 for x in (test, train)]
    nearest = NearestNeighbors(n_neighbors=1).fit(vectors[1]).kneighbors(vectors[0])[0] / math.sqrt(1024)
    assert distances["held_out"]["median"] == pytest.approx(np.median(nearest))
    assert distances["held_out"]["percentile_5"] == pytest.approx(np.percentile(nearest, 5))
    assert distances["generated"]["median"] < 0.75 * distances["held_out"]["median"]  # copies, 10 % darker
    # In feature space, real held-out digits are near the training digits; ten digits copied over and over are not.
    network, figures = Projection(), result["against_training_digits"]
    real, real_held_out = network(rgb("train")).pool, network(rgb("test")).pool
    copies = network(
        to_uint8_truncate(
            tokenizer.decode(np.concatenate([generate(np.arange(150) % 10, 0, first_index=0, sampling=SamplingConfig())]))
        )
    ).pool
    assert figures["held_out"]["digits-FID-360"] == pytest.approx(frechet(real_held_out, real), rel=1e-5)
    assert figures["generated"]["digits-FID-150"] == pytest.approx(frechet(copies, real), rel=1e-5)
    assert figures["generated"]["digits-FID-150"] > 5 * figures["held_out"]["digits-FID-360"]
    assert figures["generated"]["digits-recall-150"] < 0.2 < figures["held_out"]["digits-recall-360"]
    decoded = network(np.round(0.9 * rgb("test")).astype(np.uint8)).pool
    assert held_out["digits-rFID-360"] == pytest.approx(frechet(real_held_out, decoded), rel=1e-2)


def test_evaluate_writes_every_setting(model, networks, loaded_once, tmp_path, capsys):
    out = tmp_path / "digits.json"
    arguments = ["--model", model, "--num", "20", "--steps", "3", "--seed", "4", "--batch-size", "256", "--json", str(out)]
    assert evaluate.main(arguments) == 0
    assert "generated digits" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert {"real_accuracy", "reconstructed_accuracy", "generated_accuracy"} <= result.keys()
    assert result["sampling"] == {
        "num_steps": 3,
        "guidance_scale": 3.0,
        "guidance_schedule": "linear",
        "guidance_scale_pow": 3.0,
        "temperature": 2.0,
        "softmax_temperature_annealing": True,
    }
    assert (result["seed"], result["generation"]["num_images"], result["versions"]["jax"]) == (4, 20, jax.__version__)
    assert result["sha256"].keys() == {"generator", "tokenizer"}
    before = out.read_bytes()
    assert evaluate.main(arguments) == 2
    assert "digits.json exists and nothing was overwritten" in capsys.readouterr().err
    assert out.read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num", "15"], r"--num is 15, expected a multiple of 10"),
        (["--model", "{letters}"], r"is a model of 26 classes of 32x32 pixels, not of digits; say what to measure"),
        (["--model", "nothing"], r"unknown model 'nothing'"),
        (["--steps", "0"], r"--steps is 0"),
        (["--batch-size", "0"], r"--batch-size is 0"),
        (["--guidance-scale", "nan"], r"--guidance-scale is nan"),
        (["--json", "{tmp}/no/a.json"], r"no is not an existing folder"),
        (["--json", "{there}"], r"exists and nothing was overwritten"),
        (["--guidance-scale", "0,1"], r"a grid of settings needs --json FILE"),
        (["--guidance-scale", "0,1", "--json", "{tmp}/a.png"], r"picture of a sweep would have the same name"),
        (["--guidance-scale", "0,1", "--json", "{there}"], r"there.json is not a sweep; choose another file"),
        (["--reconstruct", "digits:test", "--reference", "{adm}"], r"--reconstruct takes no --reference: rFID .* cannot be"),
        (["--reconstruct", "digits:test", "--steps", "3"], r"--reconstruct goes without --steps"),
        (["--reconstruct", "digits:test", "--num", "361"], r"361 images asked for, but the data set has 360"),
        (["--reconstruct", "{tmp}/none"], r"none: no such folder"),
        (["--reconstruct", "digits:test", "--model", "{stage_1}"], r"stage 1 model"),
        (["--lpips", "{tmp}"], r"--lpips goes with --reconstruct"),
        (["--samples", "{samples}"], r"--samples needs --reference"),
        (
            ["--samples", "{samples}", "--reference", "{adm}", "--seed", "0", "--steps", "3"],
            r"--samples goes without --steps",
        ),
        (["--samples", "{floats}", "--reference", "{adm}"], r"arr_0 is float32 \[4, 32, 32, 3\], expected uint8"),
        (
            ["--samples", "{there}", "--reference", "{adm}"],
            r"there.json is no .npz file that can be read: File",
        ),
        (["--samples", "{small}", "--reference", "{adm}"], r"adm.npz is of images of 32x32 pixels, those .* have 16x16"),
        (["--reference", "{small}"], r"small.npz is of images of 16x16 pixels, those to compare with it have 32x32"),
        (
            ["--reference", "{other}"],
            r"holds features of another, but this evaluation is in those of inception: .* --features",
        ),
        (["--reference", "{there}"], r"there.json.*: no such folder"),
        (["--reference", "{tmp}/VIRTUAL.npz"], r"--reference .*/VIRTUAL.npz: no such file; docs/evaluation.md says where"),
        (["--reference", "{broken}"], r"broken.npz is no .npz file that can be read"),
        (["--reference", "{misfit}"], r"misfit.npz: mu has 5 features, those of inception are 7"),
        (["--save-reference", "{tmp}/r.npz"], r"--save-reference needs --reference DATA"),
        (["--save-reference", "{tmp}/r.npz", "--reference", "{adm}"], r"--save-reference needs --reference DATA"),
    ],
)
def test_evaluate_refuses(arguments, message, model, networks, tmp_path, capsys, no_weights, monkeypatch):
    places = {name: tmp_path / f"{name}.npz" for name in ("adm", "samples", "floats", "small", "other", "broken", "misfit")}
    images = rgb("test")[:4]
    for name in ("adm", "samples"):
        np.savez(places[name], images)
    np.savez(places["floats"], images.astype(np.float32))
    np.savez(places["small"], images[:, ::2, ::2])
    np.savez(places["misfit"], arr_0=images, mu=np.zeros(5), sigma=np.eye(5))
    stats = metrics.FeatureStatistics(7, "another").update(np.random.default_rng(0).random((9, 7)))
    other = references.Reference(stats, None, np.zeros((9, 7), np.float32), {"image_size": 32})
    other.save(places["other"], replace=False)
    places["broken"].write_bytes(b"PK\x03\x04 half")
    places["there"] = tmp_path / "there.json"
    places["there"].write_text("{}")
    places["letters"] = tiny.save(tmp_path / "letters", dataclasses.replace(tiny.GENERATOR, num_classes=26))
    places["stage_1"] = tiny.save(tmp_path / "stage_1", tiny.STAGE_1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    arguments = [argument.format(tmp=tmp_path, **places) for argument in arguments]
    defaults = ["--model", model, "--features", "inception", "--num", "20"]
    if "--samples" in arguments or "--num" in arguments:
        defaults = defaults[:-2]
    assert evaluate.main([*defaults, *arguments]) == 2
    err = capsys.readouterr().err
    assert re.match(f"error: .*{message}", err[err.index("error:") :], re.DOTALL), err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
