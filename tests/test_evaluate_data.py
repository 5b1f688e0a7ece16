"""The images that `evaluate` is given: folders and other data as samples, damaged pictures, no features, nothing at all."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_evaluate import Projection

from titok_jax import evaluate, inference, pretokenize, reconstruct, sample
from titok_jax.data import records, sources
from titok_jax.data.digits import load_digits
from titok_jax.evaluation import features

pytestmark = pytest.mark.filterwarnings("ignore:Matrix is singular")


@pytest.fixture(autouse=True)
def networks(monkeypatch, pair):
    """Stand-ins for the feature networks, and the model is compiled once."""
    monkeypatch.setattr(features, "load_digits_features", lambda **_: Projection("digits"))
    monkeypatch.setattr(features, "load_inception", lambda path, **_: Projection("inception", (7, 4, 10)))
    monkeypatch.setattr(inference, "load_image_model", lambda *a, **k: pair[0])


IMAGES = np.repeat(load_digits("held_out", 32)[0][:12, ..., None], 3, axis=-1)


def folder(path, images=IMAGES, broken=()):
    """A folder as `sample` writes it."""
    path.mkdir()
    for index, image in enumerate(images):
        file = path / f"{index:06d}_{index % 10}.png"
        Image.fromarray(image).save(file)
        if index in broken:
            file.write_bytes(file.read_bytes()[:100])
    Image.new("RGB", (300, 200)).save(path / "grid.png")
    return path


def run(capsys, *arguments, status=0) -> str:
    """Runs the command and returns its output, or its error."""
    assert evaluate.main([str(argument) for argument in arguments]) == status
    captured = capsys.readouterr()
    return captured.err[captured.err.find("error: ") :] if status else captured.out


def read(path):
    return json.loads(Path(path).read_text())


def test_quality_without_features(model, tmp_path, monkeypatch, capsys):
    arguments = ["--model", model, "--reconstruct", "digits:held_out", "--num", 8, "--json"]
    run(capsys, *arguments, tmp_path / "all.json")
    monkeypatch.setattr(features, "load_digits_features", None)
    monkeypatch.setattr(features, "load_inception", None)
    out = run(capsys, *arguments, tmp_path / "none.json", "--features", "none")
    found, whole = (read(tmp_path / f"{name}.json") for name in ("none", "all"))
    assert found["metrics"].keys() == {"psnr", "ssim", "codebook_usage", "perplexity", "entropy_bits"}
    assert found["metrics"].items() <= whole["metrics"].items()
    assert found["features"] == {"network": "none", "sha256": None}
    assert "FID" not in out
    assert "psnr" in out


def test_samples_are_a_folder_or_any_data(tmp_path, capsys):
    samples = folder(tmp_path / "samples")
    np.savez(tmp_path / "samples.npz", IMAGES)
    with records.image_writer(tmp_path / "samples.array_record") as write:
        for path in sorted(samples.glob("0*.png")):
            write(path.read_bytes(), -1)
    found = []
    for given in (samples, tmp_path / "samples.npz", f"array_record:{tmp_path}/samples.array_record"):
        options = ["--features", "digits", "--json", tmp_path / "a.json", "--overwrite"]
        run(capsys, "--samples", given, "--reference", tmp_path / "samples.npz", *options)
        found.append(read(tmp_path / "a.json"))
        assert found[-1]["num_images"] == 12
    assert found[0]["metrics"] == found[1]["metrics"] == found[2]["metrics"]
    assert found[0]["samples"] == str(samples)
    assert found[0]["samples_digest"] != found[2]["samples_digest"]


def test_samples_are_compared_as_they_are(tmp_path, capsys):
    samples = folder(tmp_path / "samples")
    arguments = ["--samples", samples, "--reference", "digits:train"]
    Image.new("RGB", (32, 33)).save(samples / "000020_1.png")
    assert re.search(
        r"000020_1\.png: 32x33 pixels, expected squares of one size, 32x32: samples", run(capsys, *arguments, status=2)
    )
    Image.new("RGB", (32, 32)).save(samples / "000020_1.png")
    (samples / "000021_1.jpg").write_bytes(b"no image")
    assert re.search(
        r"000021_1\.jpg: cannot read these 8 bytes .*; --skip-unreadable leaves such images out and counts them",
        run(capsys, *arguments, status=2),
    )
    assert "no such folder" in run(capsys, "--samples", tmp_path / "no", "--reference", "digits:train", status=2)


@pytest.mark.parametrize("what", ["--reconstruct", "--samples", "--reference"])
def test_unreadable_images_are_named_or_left_out_and_counted(what, model, tmp_path, capsys):
    good, bad = [index for index in range(12) if index not in (3, 7)], folder(tmp_path / "bad", broken=(3, 7))
    (bad / "grid.png").unlink()
    (folder(tmp_path / "good", IMAGES[good]) / "grid.png").unlink()
    others = {
        "--reconstruct": ["--model", model, "--features", "digits"],
        "--samples": ["--reference", "digits:train", "--features", "digits"],
        "--reference": ["--samples", tmp_path / "s.npz", "--features", "digits"],
    }[what]
    np.savez(tmp_path / "s.npz", IMAGES)
    error = run(capsys, what, bad, *others, status=2)
    assert re.match(
        r"error: .*/bad/00000[37]_[37]\.png: cannot read these 100 bytes .*; --skip-unreadable leaves such", error
    )
    out = run(capsys, what, bad, *others, "--skip-unreadable", "--json", tmp_path / "bad.json")
    lines = out[out.index("left out: ") :].splitlines()
    assert lines[0] == "left out: 2 images that cannot be read; 10 remain"
    assert [re.search(r"(\d+)_\d\.png: cannot read", line)[1] for line in lines[1:3]] == ["000003", "000007"]
    run(capsys, what, tmp_path / "good", *others, "--json", tmp_path / "good.json")
    found, expected = read(tmp_path / "bad.json"), read(tmp_path / "good.json")
    assert found["metrics"] == expected["metrics"]
    if what == "--reference":
        assert (found["reference"]["num_images"], found["reference"]["left_out"]) == (10, 2)
    else:
        assert (found["num_images"], len(found["left_out"])) == (10, 2)
    out = run(capsys, what, tmp_path / "good", *others, "--skip-unreadable")
    assert "left out: 0 images that cannot be read; 10 remain" in out


def test_a_saved_reference_chooses_its_network(tmp_path, capsys):
    np.savez(tmp_path / "s.npz", IMAGES)
    saved = tmp_path / "r.npz"
    run(capsys, "--model", "digits", "--reference", "digits:train", "--num", 40, "--save-reference", saved)
    run(capsys, "--samples", tmp_path / "s.npz", "--reference", saved, "--json", tmp_path / "a.json")
    assert read(tmp_path / "a.json")["features"]["network"] == "digits"
    error = run(capsys, "--samples", tmp_path / "s.npz", "--reference", saved, "--features", "inception", status=2)
    assert "r.npz holds features of digits, but this evaluation is in those of inception" in error


def test_held_out_is_a_split_of_the_digits():
    names = ("held_out", "test")
    (a, labels_a), (b, labels_b) = map(load_digits, names)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(labels_a, labels_b)
    assert sources.parse_source("digits:held_out") == {"name": "digits", "split": "held_out"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reference", "digits:train", "--features", "none"], "--features none goes with --reconstruct"),
        (["--features", "none"], "--features none goes with --reconstruct"),
        (
            ["--samples", "{images}", "--reference", "{images}", "--skip-unreadable"],
            "--skip-unreadable is for the images of DATA",
        ),
        (["--skip-unreadable"], "--skip-unreadable is for the images of DATA"),
        (["--reconstruct", "{broken}", "--skip-unreadable"], r"none of the 2 images can be read, the first: .*/broken/0000"),
        (
            ["--reconstruct", "array_record:{tokens}", "--features", "none"],
            r"tokens\.array_record, record 0: tokens, expected an",
        ),
        (
            ["--reconstruct", "digits:validation"],
            r"digits has no split 'validation'; it has train, held_out \(also called test",
        ),
        # nothing at all
        (["--reconstruct", "{empty}"], "empty: no images in this folder or below"),
        (["--samples", "{empty}", "--reference", "digits:train"], "empty: no images in this folder or below"),
        (["--reconstruct", "array_record:{none}"], r"data source array_record: no examples \(paths .*none\.array_record\)"),
        (["--samples", "{zero}", "--reference", "digits:train"], r"zero\.npz: arr_0 is \[0, 32, 32, 3\], no image at all"),
        (["--reference", "{zero}"], r"zero\.npz: arr_0 is \[0, 32, 32, 3\], no image at all"),
        (["--reconstruct", "digits:test", "--num", "0"], "--num is 0, expected a whole number from 1"),
    ],
)
def test_what_is_refused(arguments, message, model, tmp_path, capsys):
    places = {"empty": tmp_path / "empty", "images": tmp_path / "images.npz", "zero": tmp_path / "zero.npz"}
    places["empty"].mkdir()
    places["broken"] = folder(tmp_path / "broken", IMAGES[:2], (0, 1))
    (places["broken"] / "grid.png").unlink()
    np.savez(places["images"], IMAGES)
    np.savez(places["zero"], IMAGES[:0])
    for name, rows in (("tokens", 3), ("none", 0)):
        places[name] = tmp_path / f"{name}.array_record"
        with records.token_writer(places[name]) as write:
            for _ in range(rows):
                write(np.arange(4), 0)
    arguments = [argument.format(**places) for argument in arguments]
    assert re.match(f"error: .*{message}", run(capsys, "--model", model, *arguments, status=2))


def test_no_command_works_on_nothing(model, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with records.image_writer(tmp_path / "none.array_record"):
        pass
    out = ["--out", str(tmp_path / "out")]
    for command, arguments, message in (
        (sample, ["--num", "0", *out], "--num is 0, expected a whole number from 1"),
        (sample, ["--labels", "", *out], "--labels is '', expected numbers like 3,1,4, or all"),
        (reconstruct, [str(tmp_path / "empty"), *out], "empty: no images in this folder or below"),
        (reconstruct, ["--num", "0", *out], "--num is 0, expected a whole number from 1"),
        (pretokenize, [str(tmp_path / "empty"), *out], "empty: no images in this folder or below"),
        (pretokenize, [f"array_record:{tmp_path}/none.array_record", *out], "no examples"),
    ):
        assert command.main(["--model", model, *arguments]) == 2
        assert re.match(f"error: .*{message}", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


NO_SWEEPS = ["[]", "[1]", '{"points": 5}', '{"points": [1]}', '{"points": [{}]}', "[" * 100_000, "\udcff"]


@pytest.mark.parametrize("text", NO_SWEEPS)
def test_a_file_that_is_no_sweep(text, model, tmp_path, capsys):
    (tmp_path / "a.json").write_bytes(text.encode(errors="surrogateescape"))
    arguments = ["--model", model, "--reference", "digits:train", "--num", 10, "--guidance-scale", "0,1"]
    error = run(capsys, *arguments, "--json", tmp_path / "a.json", status=2)
    assert "a.json is not a sweep; choose another file or add --overwrite" in error
