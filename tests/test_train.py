"""The training loop: it resumes exactly, refuses what does not fit, and gives the same on any mesh."""

import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from ml_collections import ConfigDict

import titok_jax
from titok_jax import pretrained, train
from titok_jax.data.records import token_writer

ROOT = pathlib.Path(__file__).parents[1]
NO_CACHE = {**os.environ, "PYTHONPATH": str(ROOT)}


def digits_config(variant: str) -> ConfigDict:
    spec = importlib.util.spec_from_file_location("digits_config", ROOT / "configs/digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant)


def small(variant: str, **changes) -> ConfigDict:
    """The smoke variant, smaller still."""
    config = digits_config("smoke_" + variant)
    size = {"width": 32, "num_layers": 1, "num_heads": 2}
    if variant == "tokenizer":
        config.model.update({"encoder": size, "decoder": size})
    else:
        config.model.update({"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64})
    config.update({"num_steps": 6, "log_every": 2, "checkpoint_every": 3, "preview_every": 0})
    config.data.batch_size = 16
    config.update(changes)
    return config


def adversarial(**changes) -> ConfigDict:
    """A tokenizer with a discriminator that starts in the middle."""
    config = small("tokenizer", **changes)
    config.data.batch_size = 8
    config.loss.update({"discriminator_weight": 0.1, "discriminator_start": 2, "lecam_weight": 0.001})
    config.discriminator = ConfigDict({"hidden_channels": 32, "num_stages": 2, "logits_size": 8})
    config.discriminator_optimizer = ConfigDict(config.optimizer.to_dict())
    return config


def weights(workdir) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(pathlib.Path(workdir) / "pretrained" / "model.safetensors")


def assert_same_state(a, b):
    for (path, x), (_, y) in zip(*map(jax.tree_util.tree_leaves_with_path, (a, b)), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


class Stopped(Exception):
    """Stands for a crash."""


@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(kind, tmp_path, monkeypatch):
    if kind == "tokenizer":  # with all that a step can draw and remember: noise, two optimizers, LeCam's averages
        config = adversarial()
        config.model.quantize_mode = "vae"
    else:
        config = small("generator")
        tokenizer = small("tokenizer", num_steps=1)
        train.train(tokenizer, tmp_path / "tokenizer")
        config.tokenizer = str(tmp_path / "tokenizer" / "pretrained")
    straight = train.train(config, tmp_path / "straight")

    real_write = train.MetricLog.write

    def crash(self, step, metrics, **options):
        real_write(self, step, metrics, **options)
        if step == 4:
            raise Stopped

    monkeypatch.setattr(train.MetricLog, "write", crash)
    with pytest.raises(Stopped):
        train.train(config, tmp_path / "resumed")
    monkeypatch.undo()
    resumed = train.train(config, tmp_path / "resumed")  # from the checkpoint of step 3
    assert_same_state(straight, resumed)
    # Each step is logged once, and the logs agree.
    logs = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("straight", "resumed")]
    one, two = ([json.loads(line) for line in log] for log in logs)
    assert [line["step"] for line in two] == [line["step"] for line in one] == [2, 4, 6]
    for a, b in zip(one, two, strict=True):
        timing = {"images_per_second", "data_wait", "seconds_left"}
        assert {k: v for k, v in a.items() if k not in timing} == {k: v for k, v in b.items() if k not in timing}


def test_sigkill_twice_once_during_a_save_changes_nothing(tmp_path):
    """A real process of the command, killed without warning; the run that is never killed is another process too."""
    overrides = [
        "--config.num_steps=40",
        "--config.checkpoint_every=4",
        "--config.log_every=2",
        "--config.preview_every=0",
        "--config.data.batch_size=16",
    ]

    def command(workdir):
        arguments = ["--config", "configs/digits.py:smoke_tokenizer", "--workdir", str(workdir), *overrides]
        return [sys.executable, "-m", "titok_jax.train", *arguments]

    def start(workdir):
        return subprocess.Popen(command(workdir), cwd=ROOT, env=NO_CACHE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def kill_when(process, condition):
        deadline = time.monotonic() + 240
        while not condition():
            assert process.poll() is None, f"ended before it could be killed: {process.stderr.read().decode()[-2000:]}"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()

    killed, straight = tmp_path / "killed", tmp_path / "straight"
    checkpoints = killed / "checkpoints"

    def saving() -> bool:
        return checkpoints.exists() and any(checkpoints.glob("*tmp*"))

    def finished(step: int) -> bool:
        return (checkpoints / str(step)).exists()

    kill_when(start(killed), saving)
    assert not (killed / "pretrained").exists()
    kill_when(start(killed), lambda: finished(12) or finished(16) or finished(20))
    assert not (killed / "pretrained").exists()
    for workdir in (killed, straight):
        run = subprocess.run(command(workdir), cwd=ROOT, env=NO_CACHE, check=True, capture_output=True, text=True)
        assert ("Continuing at step" in run.stdout) == (workdir == killed)
    a, b = weights(killed), weights(straight)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_a_changed_configuration_is_refused_and_names_the_fields(tmp_path):
    train.train(small("tokenizer", num_steps=2), tmp_path)
    changed = small("tokenizer", num_steps=2)
    changed.optimizer.learning_rate = 5e-4
    changed.model.codebook_size = 64
    with pytest.raises(
        ValueError, match=r"(?s)model.codebook_size: 128 .* 64 now.*optimizer.learning_rate: 0.001 .* 0.0005 now"
    ):
        train.train(changed, tmp_path)
    # What does not touch the result may change.
    train.train(small("tokenizer", num_steps=2, log_every=1), tmp_path)


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(tmp_path, capsys):
    config = small("tokenizer")
    train.train(config, tmp_path)
    expected = weights(tmp_path)
    shutil.rmtree(tmp_path / "pretrained")
    for file in (tmp_path / "checkpoints" / "6" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    train.train(config, tmp_path)  # from step 3
    out = capsys.readouterr().out
    assert "the checkpoint of step 6 cannot be read" in out
    assert "Continuing at step 3 of 6" in out
    assert (tmp_path / "damaged" / "6").is_dir()
    for name, array in weights(tmp_path).items():
        np.testing.assert_array_equal(array, expected[name])


def test_sigterm_saves_and_ends_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    config = small("tokenizer")
    straight = train.train(config, tmp_path / "straight")
    real_write = train.MetricLog.write

    def write(self, step, metrics, **options):
        real_write(self, step, metrics, **options)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(train.MetricLog, "write", write)
    train.train(config, tmp_path / "stopped")
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) is before
    assert "Stopped by SIGTERM after step 2" in capsys.readouterr().out
    assert not (tmp_path / "stopped" / "pretrained").exists()
    assert_same_state(straight, train.train(config, tmp_path / "stopped"))
    assert "Continuing at step 2" in capsys.readouterr().out


def test_a_second_run_on_one_workdir_is_refused(tmp_path):
    with train.lock_workdir(epath.Path(tmp_path)), pytest.raises(ValueError, match="another run"):
        train.train(small("tokenizer"), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        (None, {"task": "stage9"}, "config.task"),
        ("model", {"widht": 3}, "widht"),
        ("model", {"patch_size": 5}, "patch_size"),
        ("loss", {"lpips": 3}, "lpips"),
        ("data", {"batch_size": 5000}, "fewer than one global batch"),
        ("data", {"source": ConfigDict({"name": "imagenet"})}, "unknown data source"),
        ("model", {"image_size": 64}, "images have shape"),
        ("mesh", {"fsdp": 3}, "does not fit 1 devices"),
        (None, {"compute_dtype": "float16"}, "compute_dtype"),
        (None, {"log_every": 0}, "log_every is 0"),
    ],
)
def test_bad_configurations_are_refused_before_anything_is_written(section, change, message, tmp_path):
    config = small("tokenizer")
    with config.unlocked():
        (config if section is None else config[section]).update(change)
    with pytest.raises(ValueError, match=message):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_generator_from_token_records_needs_no_tokenizer(tmp_path):
    rng = np.random.default_rng(0)
    with token_writer(tmp_path / "tokens.array_record") as write:
        for i in range(40):
            write(rng.integers(0, 50, 6), i % 10)
    config = small("generator", num_steps=2, tokenizer="")
    with config.unlocked():
        config.data.source = ConfigDict({"name": "tokens", "paths": str(tmp_path / "tokens.array_record")})
        config.data.transform = None
        config.model.update({"num_tokens": 6, "codebook_size": 50})
    train.train(config, tmp_path / "run")
    generator = titok_jax.load_generator(tmp_path / "run" / "pretrained")
    ids = titok_jax.generate(generator, [1, 2], jax.random.key(0), num_steps=3)
    assert ids.shape == (2, 6)
    assert 0 <= ids.min() <= ids.max() < 50
    config.model.codebook_size = 40
    with pytest.raises(ValueError, match="the codebook has 40"):
        train.train(config, tmp_path / "other")


def test_a_run_leaves_model_curves_and_pictures(tmp_path, capsys):
    config = small("tokenizer", preview_every=3, gradient_accumulation=2, compute_dtype="bfloat16")
    state = train.train(config, tmp_path / "run")
    run = tmp_path / "run"
    out = capsys.readouterr().out
    for part in ("learning_rate: 0.001", "encoder/transformer/attn/qkv/kernel", "Global batch 16 x 6 steps", "'fsdp': 1",
                 "images/s", "data wait", "left"):  # fmt: skip
        assert part in out, part
    assert sorted(p.name for p in (run / "previews").iterdir()) == ["0000003.png", "0000006.png"]
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(state["params"]))
    loaded, params = pretrained.load(run / "pretrained", titok_jax.inference.TiTokConfig)
    assert loaded.codebook_size == 128
    assert_same_state(params, state["ema"]["tokenizer"])


MESH_PROGRAM = """
import json, sys
import test_train
from titok_jax import train
shape, workdir = json.loads(sys.argv[1]), sys.argv[2]
config = test_train.adversarial(log_every=1)
config.mesh.update(dict(zip(("data", "fsdp", "tensor"), shape)))
train.sharding.SMALLEST_SHARDED = 64
train.train(config, workdir)
"""


def test_the_same_losses_on_any_mesh(tmp_path):
    logs = []
    for name, shape in (("one", [1, 1, 1]), ("eight", [2, 2, 2])):
        env = {**NO_CACHE, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_NUM_CPU_DEVICES": str(np.prod(shape))}
        arguments = [sys.executable, "-c", MESH_PROGRAM, json.dumps(shape), str(tmp_path / name)]
        subprocess.run(arguments, cwd=ROOT, env=env, check=True, capture_output=True)
        logs.append([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()])
    assert len(logs[0]) == len(logs[1]) == 6
    for one, eight in zip(*logs, strict=True):
        for name in ("total_loss", "reconstruction_loss", "grad_norm", "discriminator_loss", "lecam_loss"):
            if one[name] is None:
                assert eight[name] is None
            else:
                # Sums over devices are in another order, and Adam amplifies rounding in its first steps.
                np.testing.assert_allclose(eight[name], one[name], rtol=1e-3, err_msg=name)


def test_the_command_explains_itself_and_what_is_wrong_with_a_flag(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "titok_jax.train", *arguments]
        return subprocess.run(command, cwd=ROOT, env=NO_CACHE, capture_output=True, text=True)

    text = run("--help").stdout
    assert text.count("python -m titok_jax.train --config") >= 3
    workdir = tmp_path / "run"
    bad = run("--config", "configs/digits.py:tokenizer", "--workdir", str(workdir), "--config.nope=3")
    assert bad.returncode != 0
    assert "Traceback" not in bad.stderr
    assert bad.stderr.strip().splitlines()[-1].startswith("error: --config.nope=3: the configuration has no field")
    bad = run("--config", "configs/digits.py:tokenizer", "--workdir", str(workdir), "--config.task=paint")
    assert bad.stderr.strip().splitlines()[-1].startswith("error: config.task is 'paint'")
    assert not workdir.exists()
