"""The commands: what they write, what they refuse, and that they refuse it before they do any work."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_models as tiny
from PIL import Image

from titok_jax import compile as compiling
from titok_jax import evaluate, inference, parity, reconstruct, sample, train
from titok_jax.data.transforms import center_crop_torchvision, to_uint8_truncate
from titok_jax.evaluation import metrics
from titok_jax.inference import many
from titok_jax.models import MaskgitVQGANConfig
from titok_jax.runtime import command
from titok_jax.training import recipes
from titok_jax.weights import pretrained, published_models

ROOT = Path(__file__).parents[1]
COMMANDS = {"sample": sample, "reconstruct": reconstruct, "evaluate": evaluate}


@pytest.fixture
def no_weights(monkeypatch):
    """Makes it an error to read weights: a command must refuse before it reads any."""

    def load(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(pretrained, "load", load)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def png(path, size=(40, 30), mode="RGB", seed=0):
    """Writes a smooth random picture."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode).save(path)
    return path


def run(*arguments, **options):
    """Runs a command in its own process."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, **options)


# --------------------------------------------------------------------------------------------------------------------
# What they share


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples(name, capsys):
    with pytest.raises(SystemExit) as exit_:
        COMMANDS[name].main(["--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    assert text.split("examples:")[1].count(f"python -m titok_jax.{name}") >= 3


def test_commands_do_not_import_jax_before_they_must():
    code = f"import sys, {', '.join('titok_jax.' + name for name in COMMANDS)}; sys.exit('jax' in sys.modules)"
    assert run("-c", code).returncode == 0


def test_a_process_ends_with_one_line_and_status_2(tmp_path):
    result = run("-m", "titok_jax.sample", "--model", "digitz", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    known = ", ".join(published_models.names("generator"))
    assert result.stderr == (
        "error: unknown model 'digitz': it is no file or folder here, not hf://owner/name, and none of "
        f"{known}; did you mean digits?\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nothing"], r"unknown model 'nothing': .*digits"),
        (["--model", "{empty}"], r"is not a model folder: it holds no config.json"),
        (["--model", "{alone}"], r"holds no sub-folder tokenizer: name the tokenizer"),
        (["--tokenizer", "nothing"], r"unknown model 'nothing'"),
        (["--model", "{alone}", "--tokenizer", "{vae}"], r"the tokenizer is a VAE"),
        (["--model", "{alone}", "--tokenizer", "{stage_1}"], r"stage 1 model"),
        (["--labels", "3,10"], r"--labels: 10 is out of range; this model has the labels 0 to 9"),
        (["--labels=-1"], r"--labels: -1 is out of range"),
        (["--labels", "3,four"], r"--labels is '3,four', expected numbers like 3,1,4, or all"),
        (["--labels", ""], r"--labels is ''"),
        (["--labels", "3,1,4", "--num", "2"], r"--num is 2, but --labels names 3 classes"),
        (["--temperature", "nan"], r"--temperature is nan"),
        (["--guidance-scale", "inf"], r"--guidance-scale is inf"),
        (
            ["--guidance-schedule", "cosine"],
            r"--guidance-schedule is 'cosine', expected one of constant, linear, power-cosine",
        ),
        (["--seed", "-1"], r"--seed is -1"),
        (["--out", "{tmp}/a.jpg"], r"a.jpg: unknown ending .jpg; expected .png, .npz, or a folder"),
        (["--out", "{tmp}/no/a.png"], r"cannot write .*/no/a.png: .*/no is not an existing folder"),
        (["--out", "{file}/a.png"], r"cannot write .*: .* is not an existing folder"),
        (["--out", "{file}"], r"exists and nothing was overwritten; .* --overwrite"),
        (["--out", "{tmp}/a.png", "--num", "2000"], r"2000 images are too many for one picture"),
        (["--out", "{empty}/../photos"], r"photos exists and nothing was overwritten"),
        (["--out", "{empty}/../photos", "--overwrite"], r"photos holds files of other origin \(cat.png\)"),
    ],
)
def test_sample_refuses(arguments, message, model, tmp_path, capsys, no_weights):
    places = {"tmp": tmp_path, "file": tmp_path / "existing.png", "empty": tmp_path / "empty"}
    places["empty"].mkdir()
    places["file"].write_bytes(b"precious")
    png(tmp_path / "photos" / "cat.png")
    for name, config in (("alone", tiny.GENERATOR), ("vae", tiny.VAE), ("stage_1", tiny.STAGE_1)):
        places[name] = tiny.save(tmp_path / name, config, tokenizer=None)
    before = files(tmp_path)
    arguments = [argument.format(**places) for argument in arguments]
    defaults = ["--model", model, "--out", str(tmp_path / "out.png")]  # of two such options the later one counts
    assert sample.main([*defaults, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.match("error: .*" + message, err, re.DOTALL), err
    assert files(tmp_path) == before


def test_reconstruct_with_a_vqgan(tmp_path, capsys):
    config = MaskgitVQGANConfig(hidden_channels=32, channel_mult=(1, 2, 2), num_res_blocks=1, resolution=32)
    model = pretrained.save(tmp_path / "vqgan", config, tiny.params(config))
    png(tmp_path / "photos" / "cat.png")
    (tmp_path / "photos" / "notes.pdf").write_bytes(b"%PDF-1.4")  # Pillow knows the extension, but it is no image
    assert reconstruct.main(["--model", str(model), str(tmp_path / "photos"), "--out", str(tmp_path / "out")]) == 0
    assert "32x32 pixels to 64 tokens of 1024 codes" in capsys.readouterr().out
    ((name, codes),) = json.loads((tmp_path / "out" / "tokens.json").read_text()).items()
    assert name.endswith("cat.png")
    vqgan = inference.load_vqgan(model)
    image = center_crop_torchvision(np.asarray(Image.open(tmp_path / "photos" / "cat.png")), 32)
    np.testing.assert_array_equal(codes, vqgan.encode(image[None])[0])
    decoded = np.uint8(255 * np.asarray(vqgan.decode(np.asarray(codes)[None]))[0])
    # The image is given twice, and compared with two reconstructions of it.
    cat = str(tmp_path / "photos" / "cat.png")
    for name, array in (("one", decoded), ("two", 255 - decoded)):
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    arguments = ["--model", str(model), cat, cat]
    arguments += [a for name in ("one", "two") for a in ("--reconstruction", str(tmp_path / f"{name}.png"))]
    assert parity.main(arguments) == 1
    rows = [line for line in capsys.readouterr().out.splitlines() if "given reconstruction" in line]
    assert [row.split()[-1] for row in rows] == ["pass", "FAIL"]
    assert parity.main([*arguments[:3], "--reference", str(clone(tmp_path))]) == 2
    assert "of the published code only TiTok is run" in capsys.readouterr().err


def clone(folder):
    (folder / "clone" / "modeling").mkdir(parents=True)
    (folder / "clone" / "modeling" / "titok.py").write_text("")
    return folder / "clone"


def test_no_more_digits_than_there_are(tmp_path, capsys):
    assert reconstruct.main(["--num", "361", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "error: --num is 361, but there are 360 held-out digits\n"


@pytest.mark.parametrize(
    "arguments", [[train, "--workdir", "run"], [compiling, "--slice", "v5e-16"]], ids=["train", "compile"]
)
def test_what_is_wrong_with_a_configuration_is_one_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "notes.txt").write_text("Not Python.")
    command, *others = arguments
    l32 = "configs/stage1.py:l32"
    for config, changes, message in [
        (
            "configs/none.py:l32",
            [],
            "--config configs/none.py:l32: configs/none.py does not exist; expected FILE.py:VARIANT",
        ),
        ("configs:l32", [], "--config configs:l32: configs is a folder; expected"),
        ("notes.txt", [], "--config notes.txt: notes.txt is not Python; expected"),
        (
            "configs/stage1.py:huge",
            [],
            "--config configs/stage1.py:huge: variant 'huge', expected one of ['l32', 'b64', 's128',",
        ),
        ("configs/digits.py:huge", [], "--config configs/digits.py:huge: variant 'huge', expected one of ['tokenizer', "),
        (l32, ["--config.some.field=1"], f"--config.some.field=1: {l32} has no field some.field\n"),
        (
            l32,
            ["--config.num_steps.much=1"],
            f"--config.num_steps.much=1: {l32} has no field num_steps.much; did you mean --config.num_steps?",
        ),
        (
            l32,
            ["--config.data.batchsize=64"],
            f"--config.data.batchsize=64: {l32} has no field data.batchsize; did you mean --config.data.batch_size?",
        ),
        (
            l32,
            ["--config.data.batch_size=abc"],
            "--config.data.batch_size=abc: invalid literal for int() with base 10: 'abc'",
        ),
        (l32, ["--config.data.batch_size", "1.5"], "--config.data.batch_size=1.5: invalid literal for int() with base 10"),
        (l32, ["--config.ema_ramp=maybe"], "--config.ema_ramp=maybe: "),
        (l32, ["--config.mesh=5"], "--config.mesh=5: Failed to parse '5' as a ConfigDict"),
        (l32, ["--config.num_steps"], "Missing value for flag --config.num_steps"),
        (l32, ["--steps=5"], "unknown argument --steps=5: expected --config.FIELD=VALUE; did you mean --config.num_steps?"),
        (
            l32,
            ["--confg.seed=5"],
            "unknown argument --confg.seed=5: expected --config.FIELD=VALUE; did you mean --config.seed?",
        ),
        (
            l32,
            ["--config.learning_rate=1"],
            f"--config.learning_rate=1: {l32} has no field learning_rate; did you mean --config.optimizer.learning_rate?",
        ),
        (l32, ["--config.optimzer.beta2=1"], f"--config.optimzer.beta2=1: {l32} has no field optimzer.beta2; did you mean "),
        ("stage_1:l32", [], "--config stage_1:l32: stage_1 does not exist; expected FILE.py:VARIANT"),
        (l32, ["5"], "unknown argument 5"),
    ]:
        assert command.main(["--config", config, *others, *changes]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {message}"), error
        assert error.count("\n") == 1, error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["configs", "notes.txt"]


def test_a_configuration_is_read_with_its_changes(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)
    changes = [
        "--config.num_steps",
        "7",
        "--config.data.source.paths='x y'",
        "--config.log_grad_norms",
        "--noconfig.ema_ramp",
    ]
    config = recipes.read_config("configs/stage1.py:b64", [*changes, "--config.mesh.data=-1", "--config.num_steps=8"])
    assert (config.num_steps, config.data.source.paths, config.log_grad_norms, config.ema_ramp) == (8, "'x y'", True, False)
    assert config.model.num_latent_tokens == 64
    assert config.is_locked


def test_recipes_are_read_from_anywhere(tmp_path, monkeypatch):
    """With or without a common.py beside them, from any folder, whatever other module is called configs."""
    theirs = tmp_path / "elsewhere/configs"
    theirs.mkdir(parents=True)
    shutil.copy(ROOT / "configs/generator.py", theirs)
    (tmp_path / "work/configs").mkdir(parents=True)
    (tmp_path / "work/configs/__init__.py").write_text("")
    (tmp_path / "work/configs/common.py").write_text("raise AssertionError('another project')")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.syspath_prepend(tmp_path / "work")
    foreign = types.ModuleType("configs")
    monkeypatch.setitem(sys.modules, "configs", foreign)
    for file in (f"{theirs}/generator.py:smoke", "../elsewhere/configs/generator.py:smoke", "generator:smoke"):
        assert recipes.read_config(file, ["--config.num_steps=7"]).num_steps == 7
    text = (ROOT / "configs/common.py").read_text().replace("config.seed = 42", "config.seed = 43")
    (theirs / "common.py").write_text(text)
    assert recipes.read_config(f"{theirs}/generator.py:smoke", []).seed == 43
    assert recipes.read_config("generator:smoke", []).seed == 42
    assert sys.modules["configs"] is foreign


def test_bugs_keep_their_traceback():
    @command.command
    def main(argv):
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        main([])


# --------------------------------------------------------------------------------------------------------------------
# sample


def test_the_same_samples_as_npz_and_as_folder(model, pair, tmp_path, capsys):
    arguments = ["--model", model, "--labels", "3,1", "--num", "7", "--seed", "5", "--steps", "3"]
    assert sample.main([*arguments, "--out", f"{tmp_path}/a.npz", "--batch-size", "3"]) == 0
    assert sample.main([*arguments, "--out", f"{tmp_path}/folder"]) == 0
    out = capsys.readouterr().out
    assert f"wrote {tmp_path}/a.npz" in out
    assert f"wrote {tmp_path}/folder" in out
    with np.load(tmp_path / "a.npz") as file:
        assert sorted(file.files) == ["arr_0", "labels"]
        images, labels = file["arr_0"], file["labels"]
    assert images.dtype == np.uint8
    assert labels.tolist() == [3, 1, 3, 1, 3, 1, 3]
    names = [f"{index:06d}_{label}.png" for index, label in enumerate(labels)]
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [*names, "grid.png"]
    # The library gives the same images in one call. In batches of another size, sums may round differently.
    tokenizer, generator = pair
    ids = inference.generate(generator, labels, jax.random.key(5), num_steps=3)
    expected = to_uint8_truncate(tokenizer.decode(ids)).astype(int)
    np.testing.assert_array_equal(expected, [np.asarray(Image.open(tmp_path / "folder" / name)) for name in names])
    assert np.abs(expected - images).max() <= 1
    assert len({image.tobytes() for image in images}) == 7
    # With --overwrite and fewer images, none of the old images stay.
    assert sample.main([*arguments, "--num", "2", "--out", f"{tmp_path}/folder", "--overwrite"]) == 0
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["000000_3.png", "000001_1.png", "grid.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "folder"]


def test_batches_share_one_program_and_do_not_change_images(pair):
    tokenizer, generator = pair
    labels = many.balanced_labels(range(10), 7)
    ((_, ids, images),) = many.sample(tokenizer, generator, labels, 0, batch_size=7, num_steps=3)
    compiled = generator._compiled["sample"]._cache_size()
    parts = list(many.sample(tokenizer, generator, labels, 0, batch_size=3, num_steps=3))
    assert generator._compiled["sample"]._cache_size() == compiled + 1
    assert [where for where, _, _ in parts] == [slice(0, 3), slice(3, 6), slice(6, 7)]
    np.testing.assert_array_equal(np.concatenate([part for _, part, _ in parts]), ids)
    difference = np.concatenate([part for _, _, part in parts]).astype(int) - images
    assert np.abs(difference).max() <= 1  # rounding


def test_a_picture_with_one_row_per_class(model, tmp_path):
    out = tmp_path / "samples.png"
    assert sample.main(["--model", model, "--num", "20", "--steps", "3", "--batch-size", "7", "--out", str(out)]) == 0
    picture = np.asarray(Image.open(out))
    # Ten rows of two 64-pixel images, with labels on the left.
    assert picture.shape[0] > 10 * 64
    assert 2 * 64 < picture.shape[1] < 4 * 64
    assert [path.name for path in tmp_path.iterdir()] == ["samples.png"]


TWO_DEVICES = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
from titok_jax import sample
from titok_jax.inference import many
truncate = many.to_uint8_truncate
many.to_uint8_truncate = lambda images: print(len(images), len(images.sharding.device_set)) or truncate(images)
sys.exit(sample.main(sys.argv[1:]))
"""


def test_the_devices_of_a_process_share_a_batch(model, tmp_path):
    """Two devices give the images of one device, up to the rounding of sums."""
    arguments = ["--model", model, "--num", "10", "--steps", "3", "--batch-size", "5", "--out"]
    result = run("-c", TWO_DEVICES, *arguments, str(tmp_path / "two.npz"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("6 2\n") == 2  # two batches of 6 images, each on two devices
    assert sample.main([*arguments, str(tmp_path / "one.npz")]) == 0
    one, two = (np.load(tmp_path / name)["arr_0"].astype(int) for name in ("one.npz", "two.npz"))
    assert np.abs(one - two).max() <= 1
    assert one.std() > 1


@pytest.mark.parametrize(("classes", "num"), [([3, 1, 4], 64), (range(10), 64), (range(1000), 64), ([7], 5), ([2, 2, 5], 6)])
def test_labels_are_balanced_and_take_turns(classes, num):
    labels = many.balanced_labels(classes, num).tolist()
    assert len(labels) == num
    counts = [labels.count(label) / list(classes).count(label) for label in classes]
    assert max(counts) - min(counts) <= 1
    grouped = [labels[place] for place in many.by_class(np.array(labels))]
    assert grouped == sorted(labels, key=list(classes).index)
    if num >= len(classes):
        assert labels == [classes[i % len(classes)] for i in range(num)]


def test_labels_of_the_published_evaluation():
    # The published script's list is `list(range(1000)) * (50000 // 1000)`, and a single process takes it from the front.
    assert many.balanced_labels(range(1000), 50000).tolist() == list(range(1000)) * 50


# A process that is killed (SIGKILL) while it writes its fourth piece. Half of that piece is on the disk by then.
KILLED = """
import os, sys, titok_jax.sample, titok_jax.runtime.shards
savez, pieces = titok_jax.runtime.shards.np.savez, []
def dies(file, **arrays):
    pieces.append(arrays)
    savez(file, **arrays)
    if len(pieces) == 4:
        file.truncate(file.tell() // 2)
        file.flush()
        os.kill(os.getpid(), 9)
titok_jax.runtime.shards.np.savez = dies
titok_jax.sample.main(sys.argv[1:])
"""


def test_a_killed_process_is_continued_with_the_same_images(model, tmp_path, capsys):
    arguments = ["--model", model, "--num", "20", "--steps", "3", "--batch-size", "3"]
    killed, whole = tmp_path / "killed.npz", tmp_path / "whole.npz"
    assert run("-c", KILLED, *arguments, "--out", str(killed)).returncode == -9
    shards = tmp_path / "killed.npz.shards"
    there = files(shards)
    assert not killed.exists()
    assert sorted(name for name in there if not name.startswith(".")) == [
        *("00000.npz", "00001.npz", "00002.npz", "settings.json")
    ]
    assert there.pop(".lock")
    assert len(there) == 5  # including half a piece
    # Another seed makes another job, which is refused; nothing is touched.
    assert sample.main([*arguments, "--out", str(killed), "--seed", "1"]) == 2
    assert "other settings (seed: 0 there, 1 now)" in capsys.readouterr().err
    assert files(shards) == there
    made = (shards / "00001.npz").stat().st_mtime_ns

    class Keeps(sample.Shards):
        def remove(self):
            assert (shards / "00001.npz").stat().st_mtime_ns == made  # not made again
            super().remove()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "Shards", Keeps)
        assert sample.main([*arguments, "--out", str(killed)]) == 0
    assert "11 images in" in capsys.readouterr().out  # 20 images less three batches of 3
    assert sample.main([*arguments, "--out", str(whole)]) == 0
    with np.load(killed) as a, np.load(whole) as b:
        np.testing.assert_array_equal(a["arr_0"], b["arr_0"])
        np.testing.assert_array_equal(a["labels"], np.arange(20) % 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.npz", "whole.npz"]


def test_processes_share_the_batches(model, tmp_path, monkeypatch, capsys):
    """Three processes write the file that one process writes. Here they run one after the other, the first one last."""
    arguments = ["--model", model, "--num", "20", "--steps", "3", "--batch-size", "3", "--out"]
    assert sample.main([*arguments, str(tmp_path / "one.npz")]) == 0
    monkeypatch.setattr(sample.Shards, "wait", lambda self, event: None)
    monkeypatch.setattr(sample, "lock_run", lambda *args, **options: contextlib.nullcontext())
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    with monkeypatch.context() as patch:  # so that the others find the settings
        patch.setattr(sample.Shards, "missing", lambda self: [])
        assert sample.main([*arguments, str(tmp_path / "three.npz")]) == 2
        assert "00000.npz" in capsys.readouterr().err
    for index in (2, 1, 0):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        assert sample.main([*arguments, str(tmp_path / "three.npz")]) == 0
    images = [np.load(tmp_path / name)["arr_0"] for name in ("one.npz", "three.npz")]
    np.testing.assert_array_equal(*images)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.npz", "three.npz"]


# --------------------------------------------------------------------------------------------------------------------
# reconstruct


def test_reconstruct(model, pair, tmp_path, capsys):
    inputs = tmp_path / "in"
    paths = [
        png(inputs / "a.png", mode="L"),
        png(inputs / "b.jpg", (35, 64), seed=1),
        png(inputs / "sub" / "a.bmp", (32, 32), "P", seed=2),
        png(inputs / "sub" / "c.png", (200, 33), "RGBA", seed=3),
    ]
    (inputs / "notes.txt").write_text("not an image")
    out = tmp_path / "out"
    assert reconstruct.main(["--model", model, str(inputs), "--out", str(out), "--batch-size", "3"]) == 0
    printed = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        "a_2_reconstruction.png",
        "a_reconstruction.png",
        "b_reconstruction.png",
        "c_reconstruction.png",
        "grid.png",
        "settings.json",
        "tokens.json",
    ]
    tokenizer, _ = pair
    images = np.stack([center_crop_torchvision(np.asarray(Image.open(path).convert("RGB")), 32) for path in paths])
    expected = np.asarray(tokenizer.encode(images))
    tokens = json.loads((out / "tokens.json").read_text())
    assert list(tokens) == [str(path) for path in paths]
    np.testing.assert_array_equal(list(tokens.values()), expected)
    values = metrics.psnr(images / 255.0, np.asarray(tokenizer.decode(expected)))
    for path, value in zip(paths, values, strict=True):
        assert re.search(rf"{re.escape(str(path))} +PSNR +{value:.2f} dB", printed)
    assert f"mean PSNR {np.mean(values):.2f} dB over 4 images" in printed
    # The picture shows the original, enlarged four times.
    picture = np.asarray(Image.open(out / "b_reconstruction.png"))
    windows = np.lib.stride_tricks.sliding_window_view(picture, (128, 128, 3))[:, :, 0]
    cell = images[1].repeat(4, 0).repeat(4, 1)
    assert any((windows[y, x] == cell).all() for y, x in np.argwhere((windows[:, :, 0, 0] == cell[0, 0]).all(-1)))


def test_reconstruct_with_a_vae(tmp_path):
    folder = tiny.save(tmp_path / "vae", tiny.VAE)
    path = png(tmp_path / "a.png", (32, 32))
    assert reconstruct.main(["--model", str(folder), str(path), "--out", f"{tmp_path}/out"]) == 0
    tokens = json.loads((tmp_path / "out" / "tokens.json").read_text())
    expected = inference.load_tokenizer(folder).encode(np.asarray(Image.open(path))[None])
    np.testing.assert_allclose([tokens[str(path)]], expected, rtol=1e-6)
    assert reconstruct.main(["--model", str(folder), str(path), "--out", f"{tmp_path}/draw", "--latents", "sample"]) == 0
    about = json.loads((tmp_path / "draw" / "settings.json").read_text())
    assert (about["latents"], about["seed"], about["precision"], about["dtype"]) == ("sample", 0, "highest", "float32")
    assert json.loads((tmp_path / "draw" / "tokens.json").read_text()) != tokens


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{good}", "{broken}", "{text}"], r"unreadable images, nothing was written:\n  .*broken.jpg.*\n  .*text.png"),
        (["{good}", "missing.png"], r"missing.png: no such file or folder"),
        (["{empty}"], r"empty: no images in this folder or below"),
        ([], r"no images given"),
        (["{good}", "--num", "0"], r"--num is 0"),
        (["{good}", "--model", "{stage_1}"], r"is a stage 1 model"),
        (["{good}", "--model", "nothing"], r"unknown model 'nothing'"),
        (["{good}", "--out", "{good}"], r"it is a file, not a folder"),
        (["{good}", "--out", "{photos}", "--overwrite"], r"photos holds files of other origin \(good.png\)"),
    ],
)
def test_reconstruct_refuses(arguments, message, model, tmp_path, capsys, no_weights):
    good = png(tmp_path / "photos" / "good.png")
    broken = png(tmp_path / "broken.jpg", (300, 300))
    broken.write_bytes(broken.read_bytes()[:1000])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    stage_1 = tiny.save(tmp_path / "stage_1", tiny.STAGE_1)
    places = {"good": good, "broken": broken, "text": tmp_path / "text.png", "empty": tmp_path / "empty"}
    places |= {"stage_1": stage_1, "photos": good.parent}
    before = files(tmp_path)
    arguments = [argument.format(**places) for argument in arguments]
    assert reconstruct.main(["--model", model, "--out", f"{tmp_path}/out", *arguments]) == 2
    assert re.match("error: .*" + message, capsys.readouterr().err, re.DOTALL)
    assert files(tmp_path) == before
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------------------
# The embedded model


def test_digits_without_arguments(tmp_path):
    result = run("-m", "titok_jax.sample", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "wrote samples.png" in result.stdout
    assert min(Image.open(tmp_path / "samples.png").size) > 8 * 64
    again = run("-m", "titok_jax.sample", cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr.startswith("error: samples.png exists")


def test_held_out_digits_are_reconstructed(tmp_path, capsys):
    assert reconstruct.main(["--num", "16", "--out", f"{tmp_path}/out"]) == 0
    mean = float(re.search(r"mean PSNR ([\d.]+) dB over 16 images", capsys.readouterr().out).group(1))
    assert mean > 15
    assert len(list((tmp_path / "out").glob("digit_*_reconstruction.png"))) == 16


def test_quality_of_the_digits(tmp_path):
    """The figures that the README states, at full size."""
    out = tmp_path / "digits.json"
    assert evaluate.main(["--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["generation"]["num_images"] == 1000
    assert result["generated_accuracy"] >= 0.95
    assert result["reconstructed_accuracy"] >= 0.95
    against = result["against_training_digits"]
    assert against["held_out"]["digits-FID-360"] < 8  # as near as real digits
    assert result["reconstruction"]["held_out"]["digits-rFID-360"] < 6
    assert 30 < against["generated"]["digits-FID-360"] < 80
    assert 30 < against["generated"]["digits-FID-1K"] < 80
