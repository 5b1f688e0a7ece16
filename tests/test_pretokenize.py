"""Pretokenizing: every image once and in order, whatever was killed; the published crops and formats."""

import itertools
import json
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
from PIL import Image

from titok_jax import inference, pretokenize
from titok_jax.data import token_shards
from titok_jax.data.sources import make_source
from titok_jax.data.transforms import center_crop_adm, random_resize_crop_flip, ten_crop
from titok_jax.models import MaskgitVQGANConfig
from titok_jax.weights import pretrained


@pytest.fixture(scope="module")
def tokenizer():
    """A stand-in: any change of a picture changes its tokens, which is not so for a model with random weights."""

    def encode(images):
        assert images.dtype == np.uint8
        return (images.reshape(len(images), 8, -1).astype(np.int64) * np.arange(1, 385)).sum(-1) % 50_000

    return SimpleNamespace(config=tiny_models.TOKENIZER, encode_all=lambda images, batch_size: encode(images), encode=encode)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(7):
        path = folder / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40 + i, 50, 3), np.uint8)).save(path)
    return folder


def settings(**changes):
    base = {
        "data": "photos",
        "model": "tiny",
        "crops": "flip",
        "passes": 1,
        "seed": 0,
        "shards": 3,
        "format": "array_record",
    }
    return base | changes


def read(folder):
    pattern = next(str(folder / f"*.{s}") for s in ("array_record", "jsonl") if list(folder.glob(f"*.{s}")))
    source = make_source({"name": "tokens", "paths": pattern})
    return [(source[i]["tokens"].tolist(), int(source[i]["label"])) for i in range(len(source))]


@pytest.mark.parametrize("crops", ["center", "flip", "ten"])
def test_records_are_the_tokens_of_the_published_crops(tokenizer, photos, tmp_path, crops):
    source = make_source({"name": "folder", "path": str(photos)})
    assert token_shards.pretokenize(tokenizer, source, tmp_path, settings=settings(crops=crops), batch_size=4) == (3, 0)
    expected = []
    for i in range(len(source)):
        image = source[i]["image"]
        center = center_crop_adm(image, 32)
        pictures = {"center": [center], "flip": [center, center[:, ::-1]], "ten": ten_crop(image, 32)}[crops]
        expected += [(t, int(source[i]["label"])) for t in np.asarray(tokenizer.encode(np.stack(pictures))).tolist()]
    assert read(tmp_path) == expected


def test_random_crops_are_those_of_the_published_augmentation(tokenizer, photos, tmp_path):
    """Computes the crops a second way: Pillow's resize, a window and mirroring, drawn by (seed, pass, image)."""
    photos = make_source({"name": "folder", "path": str(photos)})
    wide = [photos[i] for i in range(len(photos))]
    source = wide + [example | {"image": np.ascontiguousarray(example["image"].swapaxes(0, 1))} for example in wide]  # tall
    options = settings(crops="random", passes=2, seed=4)
    token_shards.pretokenize(tokenizer, source, tmp_path, settings=options, batch_size=4)
    expected, mirrored, places = [], 0, set()
    for epoch, index in itertools.product(range(2), range(len(source))):
        picture = Image.fromarray(source[index]["image"])
        short = min(picture.size)
        resized = picture.resize([int(32 * side / short) for side in picture.size], Image.Resampling.BICUBIC)
        draws = np.random.default_rng([4, epoch, index])
        top, left = (int(draws.integers(side - 32 + 1)) for side in (resized.height, resized.width))
        crop = resized.crop((left, top, left + 32, top + 32))
        if flip := draws.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        mirrored, places = mirrored + flip, places | {(top, left)}
        # Training augments with this function. test_data.py compares its crop in the middle with torchvision's.
        draws = np.random.default_rng([4, epoch, index])
        augmented = random_resize_crop_flip(source[index]["image"], draws, resize_shorter_edge=32, crop_size=32)
        np.testing.assert_array_equal(np.asarray(crop), augmented)
        expected.append((tokenizer.encode(np.asarray(crop)[None])[0].tolist(), int(source[index]["label"])))
    assert 7 < mirrored < 21  # of 28
    assert len(places) > 8
    assert read(tmp_path) == expected


def test_form_shards_processes_and_batches_do_not_change_the_records(tokenizer, photos, tmp_path):
    source = make_source({"name": "folder", "path": str(photos)})
    random = settings(crops="random", passes=2)
    token_shards.pretokenize(tokenizer, source, tmp_path / "a", settings=random, batch_size=4)
    other = random | {"shards": 5, "format": "jsonl"}
    for process in (1, 0):
        options = {"settings": other, "process_index": process, "process_count": 2, "batch_size": 3}
        token_shards.pretokenize(tokenizer, source, tmp_path / "b", **options)
    assert read(tmp_path / "a") == read(tmp_path / "b")
    assert len(read(tmp_path / "a")) == 14
    first, second = read(tmp_path / "a")[:7], read(tmp_path / "a")[7:]
    assert first != second  # every pass has new draws
    line = json.loads((tmp_path / "b" / "tokens-00000-of-00005.jsonl").read_text().splitlines()[0])
    assert set(line) == {"class_id", "tokens"}


def test_a_crash_loses_and_doubles_nothing(tokenizer, photos, tmp_path):
    source = make_source({"name": "folder", "path": str(photos)})
    token_shards.pretokenize(tokenizer, source, tmp_path / "straight", settings=settings(), batch_size=4)
    calls = []

    class Failing:
        config = tokenizer.config

        @staticmethod
        def encode_all(images, batch_size):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return tokenizer.encode(images)

    with pytest.raises(KeyboardInterrupt):
        token_shards.pretokenize(Failing, source, tmp_path / "killed", settings=settings(), batch_size=4)
    done = sorted(p.name for p in (tmp_path / "killed").glob("*.array_record"))
    assert done == ["tokens-00000-of-00003.array_record"]
    result = token_shards.pretokenize(tokenizer, source, tmp_path / "killed", settings=settings(), batch_size=4)
    assert result == (2, 1)
    assert read(tmp_path / "killed") == read(tmp_path / "straight")
    with pytest.raises(ValueError, match=r"crops: 'flip' there, 'ten' now"):
        token_shards.pretokenize(tokenizer, source, tmp_path / "killed", settings=settings(crops="ten"))


def test_the_command_goes_on_after_sigkill(tmp_path):
    command = [sys.executable, "-m", "titok_jax.pretokenize", "digits:train", "--shards", "30", "--batch-size", "8"]
    process = subprocess.Popen([*command, "--out", str(tmp_path / "killed")], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 900
    while len(list((tmp_path / "killed").glob("*.array_record"))) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(list((tmp_path / "killed").glob("*.array_record"))) < 30
    for name in ("killed", "straight"):
        subprocess.run([*command, "--out", str(tmp_path / name)], check=True, capture_output=True)
    assert read(tmp_path / "killed") == read(tmp_path / "straight")
    assert len(read(tmp_path / "killed")) == 1437  # digits are not mirrored


def test_other_weights_are_no_continuation(tmp_path, capsys):
    folder = tiny_models.save(tmp_path / "model", tiny_models.TOKENIZER)
    command = ["digits:test", "--model", str(folder), "--shards", "2", "--out", str(tmp_path / "out")]
    assert pretokenize.main(command) == 0
    (tmp_path / "out/tokens-00001-of-00002.array_record").unlink()
    capsys.readouterr()
    pretrained.save(folder, tiny_models.TOKENIZER, tiny_models.params(tiny_models.TOKENIZER, 1), overwrite=True)
    assert pretokenize.main(command) == 2
    assert re.search(r"begun with other settings \(weights: '\w{64}' there, '\w{64}' now\)", capsys.readouterr().err)
    assert not (tmp_path / "out/tokens-00001-of-00002.array_record").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere"),
        (["tfds:imagenet2012"], "expected tfds:NAME:SPLIT"),
        (["digits:validation"], "no split 'validation'"),
        (["digits:test", "--skip-damaged"], "--skip-damaged is for webdataset:FILES, not for digits:test"),
        (["parquet:none-*.parquet"], "none-*.parquet: no such file, and no file matches it"),
        (["digits:test", "--shards", "0"], "--shards is 0"),
        (["digits:test", "--shards", "999"], "more than the 360 images"),
        (["digits:test", "--passes", "2"], "the same in every pass"),
        (["digits:test", "--model", "titok_xxl"], "unknown model"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, tmp_path, capsys):
    assert pretokenize.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_vae_is_refused(tmp_path, capsys):
    folder = tiny_models.save(tmp_path / "vae", tiny_models.VAE)
    assert pretokenize.main(["digits:test", "--model", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "VAE" in capsys.readouterr().err


def test_the_codes_of_a_vqgan(photos, tmp_path):
    """Row by row, as the published scripts/pretokenization.py writes them."""
    config = MaskgitVQGANConfig(
        hidden_channels=32, channel_mult=(1, 1), num_res_blocks=1, z_channels=8, codebook_size=16, resolution=32
    )
    folder = pretrained.save(tmp_path / "vqgan", config, tiny_models.params(config))
    arguments = [
        str(photos),
        "--model",
        str(folder),
        "--crops",
        "center",
        "--format",
        "jsonl",
        "--out",
        str(tmp_path / "codes"),
    ]
    assert pretokenize.main(arguments) == 0
    lines = [json.loads(line) for line in (tmp_path / "codes" / "tokens-00000-of-00001.jsonl").read_text().splitlines()]
    source = make_source({"name": "folder", "path": str(photos)})
    images = np.stack([center_crop_adm(source[i]["image"], 32) for i in range(len(source))])
    codes = np.asarray(inference.load_vqgan(folder).encode(images))
    assert [line["tokens"] for line in lines] == codes.reshape(len(images), -1).tolist()
    assert len(lines[0]["tokens"]) == 256
    assert json.loads((tmp_path / "codes" / "pretokenize.json").read_text())["precision"] == "highest"


@pytest.mark.parametrize("text", ["[]", "{", "7", '{"weights": 3}', "[" * 100_000, "\udcff"])
def test_a_manifest_of_another_program_is_refused(text, tmp_path):
    path = tmp_path / token_shards.MANIFEST
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(
        ValueError, match=r"/pretokenize\.json: expected the settings of pretokenize, found .+; choose"
    ) as error:
        token_shards.pretokenize(None, [], tmp_path, settings={})
    assert "\n" not in str(error.value)
