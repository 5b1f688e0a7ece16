"""The training loop: it resumes exactly, refuses what does not fit, and gives the same results on any mesh."""

import errno
import fcntl
import importlib.util
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy
import tiny_models
from ml_collections import ConfigDict
from orbax.checkpoint._src.serialization import serialization
from test_data import kill_with_workers

import titok_jax
from titok_jax import models, train
from titok_jax.data.loader import make_loader
from titok_jax.data.records import token_writer
from titok_jax.data.sources import make_source
from titok_jax.evaluation import metrics
from titok_jax.models import generator, layers, titok
from titok_jax.runtime import locks
from titok_jax.runtime.outputs import sha256
from titok_jax.training import loop, same_run
from titok_jax.training.build import build_task
from titok_jax.training.losses import LeCamEma, masked_token_loss
from titok_jax.training.masking import mask_tokens
from titok_jax.training.settings import parse_settings
from titok_jax.weights import pretrained

ROOT = pathlib.Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def digits_config(variant: str) -> ConfigDict:
    spec = importlib.util.spec_from_file_location("digits_config", ROOT / "configs/digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant)


def small(variant: str, **changes) -> ConfigDict:
    """The smoke variant, made even smaller."""
    config = digits_config("smoke_" + variant)
    size = {"width": 32, "num_layers": 1, "num_heads": 2}
    if variant == "tokenizer":
        config.model.update({"encoder": size, "decoder": size})
    else:
        config.model.update({"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64})
    config.update({"num_steps": 6, "log_every": 2, "checkpoint_every": 3, "eval_every": 0, "preview_every": 0})
    config.data.batch_size = 16
    config.update(changes)
    return config


def adversarial(**changes) -> ConfigDict:
    """A tokenizer with a discriminator that starts in the middle of the run."""
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


def batches(config: ConfigDict, count: int) -> list[dict]:
    """The first batches of a run, as floats, so that tests can insert non-finite numbers."""
    with make_loader(
        make_source(config.data.source), seed=0, global_batch_size=config.data.batch_size, num_threads=0
    ) as loader:
        return [{**b, "image": b["image"].astype(np.float32) / 255} for b in (next(loader) for _ in range(count))]


class Stopped(Exception):
    """Stands for a crash."""


@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(kind, tmp_path, monkeypatch):
    if kind == "tokenizer":  # has all kinds of draws and state: noise, two optimizers, LeCam's averages
        config = adversarial()
        config.model.quantize_mode = "vae"
    else:
        config = small("generator")
        tokenizer = small("tokenizer", num_steps=1)
        loop.train(parse_settings(tokenizer), tmp_path / "tokenizer")
        config.tokenizer = str(tmp_path / "tokenizer" / "pretrained")
    straight = loop.train(parse_settings(config), tmp_path / "straight")

    real_write = loop.MetricLog.write

    def crash(self, step, metrics, **options):
        real_write(self, step, metrics, **options)
        if step == 4:
            raise Stopped

    monkeypatch.setattr(loop.MetricLog, "write", crash)
    with pytest.raises(Stopped):
        loop.train(parse_settings(config), tmp_path / "resumed")
    monkeypatch.undo()
    resumed = loop.train(parse_settings(config), tmp_path / "resumed")  # from the checkpoint of step 3
    assert_same_state(straight, resumed)
    # Each step is logged once, and the logs agree.
    logs = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("straight", "resumed")]
    one, two = ([json.loads(line) for line in log] for log in logs)
    assert [line["step"] for line in two] == [line["step"] for line in one] == [2, 4, 6]
    for a, b in zip(one, two, strict=True):
        assert metrics_of(a) == metrics_of(b)  # also of step 4, the mean of a step before the crash and one after it


def metrics_of(line: dict[str, float]) -> dict[str, float]:
    """A line of the log without the figures of speed and time."""
    timing = ("images_per_second", "data_wait", "seconds_left", "seconds_per_step/", "time/", "run_seconds", "unix_time")
    return {name: value for name, value in line.items() if not name.startswith(timing)}


def train_command(workdir, *overrides: str) -> list[str]:
    return [
        *(sys.executable, "-m", "titok_jax.train", "--config", "configs/digits.py:smoke_tokenizer"),
        *("--workdir", str(workdir), "--config.log_every=2", "--config.preview_every=0", "--config.eval_every=0"),
        *("--config.data.batch_size=16", *overrides),
    ]


def test_sigkill_twice_once_during_a_save_changes_nothing(tmp_path):
    """Kills a real process of the command without warning. The run that is never killed is a separate process too. The
    killed processes have a worker process, which must not outlive them."""

    def command(workdir, *overrides):
        return train_command(workdir, "--config.num_steps=24", "--config.checkpoint_every=3", *overrides)

    def start(workdir):
        with_worker = command(workdir, "--config.data.num_workers=1")
        return subprocess.Popen(with_worker, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def kill_when(process, condition):
        deadline = time.monotonic() + 900
        while not condition():
            assert process.poll() is None, f"ended before it could be killed: {process.stderr.read().decode()[-2000:]}"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        kill_with_workers(process)

    killed, straight = tmp_path / "killed", tmp_path / "straight"
    checkpoints = killed / "checkpoints"

    def saving() -> bool:
        return checkpoints.exists() and any(checkpoints.glob("*tmp*"))

    def finished(step: int) -> bool:
        return (checkpoints / str(step)).exists()

    kill_when(start(killed), saving)
    assert not (killed / "pretrained").exists()
    kill_when(start(killed), lambda: finished(9) or finished(12) or finished(15))
    assert not (killed / "pretrained").exists()
    for workdir in (killed, straight):
        run = subprocess.run(command(workdir), cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True, text=True)
        assert ("Continuing at step" in run.stdout) == (workdir == killed)
    a, b = weights(killed), weights(straight)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_a_changed_configuration_is_refused_and_names_the_fields(tmp_path):
    before = small("tokenizer", num_steps=2)
    del before.data.read_ahead_mib  # as in checkpoints from before this field
    loop.train(parse_settings(before), tmp_path)
    changed = small("tokenizer", num_steps=2)
    changed.optimizer.learning_rate = 5e-4
    changed.model.codebook_size = 64
    with pytest.raises(
        ValueError, match=r"(?s)model.codebook_size: 128 .* 64 now.*optimizer.learning_rate: 0.001 .* 0.0005 now"
    ):
        loop.train(parse_settings(changed), tmp_path)
    # Settings that do not affect the result may change.
    free = small("tokenizer", num_steps=2, log_every=1, preview_images=8, gradient_accumulation=2, remat="full")
    free.data.read_ahead_mib = 1
    loop.train(parse_settings(free), tmp_path)


def test_a_run_from_before_the_discriminator_had_a_dtype_goes_on_in_that_of_its_model(tmp_path):
    run = loop.prepare(parse_settings(adversarial(compute_dtype="bfloat16")), tmp_path)
    assert run.stored["discriminator_dtype"] == "float32"  # also if a recipe does not say it

    def changes(now: str, *, model: str = "bfloat16", older: bool = True) -> list[str]:
        stored = {**run.stored, "compute_dtype": model}
        found = {name: value for name, value in stored.items() if not (older and name == "discriminator_dtype")}
        return same_run.changes(found, {**stored, "discriminator_dtype": now}, run.settings)

    assert changes("bfloat16") == changes("float32", model="float32") == changes("float32", older=False) == []
    assert changes("float32") == ["discriminator_dtype: 'bfloat16' in the checkpoint, 'float32' now"]


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(tmp_path, capsys):
    config = small("tokenizer")
    loop.train(parse_settings(config), tmp_path)
    expected = weights(tmp_path)
    shutil.rmtree(tmp_path / "pretrained")
    for file in (tmp_path / "checkpoints" / "6" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    loop.train(parse_settings(config), tmp_path)  # from step 3
    out = capsys.readouterr().out
    assert "the checkpoint of step 6 cannot be read" in out
    assert "Continuing at step 3 of 6" in out
    assert (tmp_path / "damaged" / "6").is_dir()
    for name, array in weights(tmp_path).items():
        np.testing.assert_array_equal(array, expected[name])


def test_sigterm_saves_and_ends_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    config = small("tokenizer")
    straight = loop.train(parse_settings(config), tmp_path / "straight")
    real_write = loop.MetricLog.write

    def write(self, step, metrics, **options):
        real_write(self, step, metrics, **options)
        os.kill(os.getpid(), signal.SIGTERM)

    before, closed = signal.getsignal(signal.SIGTERM), []
    for opened in (loop.Loader, loop.MetricLog, loop.Checkpoints, loop.LogFolder):

        def close(self, opened=opened, real_close=opened.close):
            real_close(self)
            closed.append((opened.__name__, (tmp_path / "stopped" / "checkpoints" / "2").exists()))

        monkeypatch.setattr(opened, "close", close)
    monkeypatch.setattr(loop.MetricLog, "write", write)
    loop.train(parse_settings(config), tmp_path / "stopped")
    monkeypatch.undo()
    # The first loader looked at one batch before the start. The rest may take longer than a machine has that is taken away.
    assert closed[1:] == [(name, True) for name in ("Checkpoints", "MetricLog", "Loader", "LogFolder")]
    assert signal.getsignal(signal.SIGTERM) is before
    assert "Stopped by SIGTERM after step 2" in capsys.readouterr().out
    assert not (tmp_path / "stopped" / "pretrained").exists()
    assert_same_state(straight, loop.train(parse_settings(config), tmp_path / "stopped"))
    assert "Continuing at step 2" in capsys.readouterr().out


def test_steps_go_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """No array of step 3's checkpoint is written before step 4 is done, although step 3's state was donated to step 4."""
    config, done, waited = small("tokenizer"), threading.Event(), []
    real_write, real_serialize = loop.MetricLog.write, serialization.async_serialize_from_host

    def write(self, step, metrics, **options):
        real_write(self, step, metrics, **options)
        if step == 4:
            assert not (tmp_path / "checkpoints" / "3").exists()
            done.set()

    async def serialize(*arguments, **options):  # runs in Orbax's thread
        waited.append(done.wait(900))
        await real_serialize(*arguments, **options)

    monkeypatch.setattr(loop.MetricLog, "write", write)
    monkeypatch.setattr(serialization, "async_serialize_from_host", serialize)
    state = loop.train(parse_settings(config), tmp_path)
    monkeypatch.undo()
    assert waited
    assert all(waited)
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    assert_same_state(loop.train(parse_settings(config), tmp_path), state)  # from the checkpoint of step 3


def test_the_command_saves_at_sigterm_and_exits_with_0_and_a_full_disk_leaves_what_it_saved(tmp_path):
    """By itself the run would never end and never save. Then it continues with no room for another checkpoint."""
    command = train_command(tmp_path, "--config.num_steps=1000000000", "--config.checkpoint_every=1000000000")
    run = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    printed = iter(run.stdout.readline, "")
    assert any(line.startswith("step ") for line in printed)
    run.terminate()
    (end,) = (line for line in printed if line.startswith("Stopped by SIGTERM after step "))
    assert run.wait() == 0
    step = end.split()[5].rstrip(",")

    def saved() -> dict[pathlib.Path, bytes]:
        return {path: path.read_bytes() for path in (tmp_path / "checkpoints" / step).rglob("*") if path.is_file()}

    before = saved()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [step]
    limited = ["sh", "-c", 'ulimit -f 100; exec "$@"', "sh"]  # writing past 100 blocks fails, as on a full disk
    again = [*limited, *command, "--config.checkpoint_every=1"]
    full = subprocess.run(again, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert f"Continuing at step {step} of" in full.stdout
    assert full.returncode == 2
    assert "Traceback" not in full.stderr
    # Python may print a warning after the error, about an Orbax coroutine that the failure left.
    (error,) = (line for line in full.stderr.splitlines() if line.startswith("error: "))
    assert error.startswith(f"error: a checkpoint cannot be written to {tmp_path}/checkpoints (")
    assert error.endswith(
        f"is the disk full? the newest complete one, of step {step}, is intact; the same command continues"
    )
    assert saved() == before


def test_a_step_that_is_not_finite_changes_nothing_but_its_count():
    """A run over a bad batch equals the run without it, except for counters: both networks, their averages and clocks."""
    config = adversarial()
    config.loss.discriminator_start = 1
    task, key = build_task(parse_settings(config)), jax.random.key(0)
    one, bad, two, three = batches(config, 4)
    bad["image"][3, 5, 7, 1] = np.nan
    step, update = jax.jit(task.step), jax.jit(task.update)
    begin = jax.jit(task.begin)(key)

    def strip(state):
        return {name: part for name, part in state.items() if name not in ("step", "nonfinite")}

    expected = jax.jit(task.init)(key)
    for batch in (one, two, three):
        expected, expected_metrics = update(expected, None, batch, {})
    state = begin
    for batch in (one, bad, bad, two, three):
        state, found = step(state, None, batch, key)
    assert (state["step"], found["nonfinite_steps"]) == (5, 2)
    assert jax.device_get(state["nonfinite"]) == {"total": 2, "in_row": 0, "longest": 2}
    # Two programs compute the same numbers but round differently, and Adam amplifies this.
    for a, b in zip(*map(jax.tree.leaves, (strip(state), strip(expected))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    for name in ("lr", "disc_lr", "total_loss"):
        np.testing.assert_allclose(found[name], expected_metrics[name], rtol=1e-5)
    # A non-finite value in one network stops both.
    broken = {**state, "lecam": LeCamEma(jnp.float32(np.inf), jnp.float32(0))}
    after, found = step(broken, None, one, key)
    assert np.isfinite(found["total_loss"])
    assert not np.isfinite(found["discriminator_loss"])
    assert_same_state(strip(after), strip(broken))


def test_a_run_of_steps_that_are_not_finite_ends_before_a_bad_checkpoint(tmp_path, monkeypatch, capsys):
    config = small("tokenizer", max_nonfinite_steps=2)
    real = loop.make_loader

    def broken_from(first):
        class Broken:
            def __init__(self, loader, step):
                self.loader, self.step, self.close = loader, step, loader.close
                self.take_replaced = loader.take_replaced

            def __enter__(self):
                return self

            def __exit__(self, *exception):
                self.close()

            def __next__(self):
                batch = next(self.loader)
                image = batch["image"].astype(np.float32) / 255
                image[0, 0, 0, 0] = np.nan if self.step == 1 or self.step >= first else image[0, 0, 0, 0]
                self.step += 1
                return {**batch, "image": image}

        def make(*arguments, **options):
            loader = real(*arguments, **options)
            return Broken(loader, options["start_step"]) if "start_step" in options else loader

        monkeypatch.setattr(loop, "make_loader", make)

    broken_from(4)
    with pytest.raises(FloatingPointError, match="2 steps in a row, of the 6 until now"):
        loop.train(parse_settings(config), tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()] == ["3"]
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["nonfinite_steps"] for line in logged] == [1, 1, 3]
    # Means are of the steps that are finite: of step 1, then of two, and there is none.
    assert [line["total_loss"] is None for line in logged] == [False, False, True]
    broken_from(100)  # fixed: the run continues from before the failure
    state = loop.train(parse_settings(config), tmp_path)
    assert "Continuing at step 3" in capsys.readouterr().out
    assert state["nonfinite"] == {"total": 1, "in_row": 0, "longest": 1}
    assert state["opt"]["tokenizer"][0].count == 5
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_bfloat16_needs_no_loss_scaling():
    """Values stay finite, and losses match float32 as far as 8 bits allow: within 3 % at each of 12 steps (1 % is seen)."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        config = adversarial(compute_dtype=dtype)
        task = build_task(parse_settings(config))
        state, step = jax.jit(task.begin)(jax.random.key(0)), jax.jit(task.step)
        found[dtype] = []
        for batch in batches(config, 12):
            state, values = step(state, None, batch, jax.random.key(0))
            found[dtype].append(float(values["reconstruction_loss"]))
        assert state["nonfinite"]["total"] == 0
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    np.testing.assert_allclose(found["bfloat16"], found["float32"], rtol=0.03)
    assert found["float32"] != found["bfloat16"]


@pytest.mark.parametrize("ramp", [True, False])
def test_the_flags_for_the_average_reach_it(ramp):
    config = small("tokenizer", ema_ramp=ramp, ema_decay=0.5)
    config.optimizer.warmup_steps = 0
    task = build_task(parse_settings(config))
    state, update = jax.jit(task.init)(jax.random.key(0)), jax.jit(task.update)
    average = state["params"]["tokenizer"]["latent_tokens"]
    for batch, decay in zip(batches(config, 3), (0.0, 2 / 11, 3 / 12) if ramp else (0.5,) * 3, strict=True):
        state, _ = update(state, None, batch, {})
        average = decay * average + (1 - decay) * state["params"]["tokenizer"]["latent_tokens"]
        np.testing.assert_allclose(state["ema"]["tokenizer"]["latent_tokens"], average, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("kind", "stacks"), [("tokenizer", 2), ("generator", 1)])
def test_the_fields_for_the_layers_reach_them(kind, stacks, monkeypatch):
    """The tests of the layers check what they do."""
    module, found = titok if kind == "tokenizer" else generator, []  # a generator's tokenizer is frozen

    def run_stack(*arguments, remat, scan, **options):
        found.append((remat, scan))
        return layers.run_stack(*arguments, **options)

    monkeypatch.setattr(module, "run_stack", run_stack)
    for changes in ({}, {"remat": "dots"}, {"remat": "full", "scan_layers": "False"}):
        found.clear()
        config = small(kind, **changes)
        settings = parse_settings(config)
        task = build_task(settings)
        state = jax.eval_shape(task.begin, jax.random.key(0))
        jax.eval_shape(task.step, state, task.frozen, batches(config, 1)[0], jax.random.key(1))
        assert found == [(settings.remat, settings.scan_layers)] * stacks


def test_changed_weights_of_a_frozen_network_are_refused(tmp_path):
    folder = tmp_path / "tokenizer"
    shutil.copytree(ROOT / "titok_jax/embedded/digits/tokenizer", folder)
    config = small("generator", num_steps=1, tokenizer=str(folder))
    loop.train(parse_settings(config), tmp_path / "run")
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["latent_tokens"] = tensors["latent_tokens"] + 1
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(
        ValueError, match=r"frozen weights of config.tokenizer \(.*tokenizer\): SHA-256 .* in the checkpoint"
    ):
        loop.train(parse_settings(config), tmp_path / "run")


def test_held_out_loss_of_a_generator_is_that_of_its_examples():
    config = small("generator")
    task = build_task(parse_settings(config))
    state, frozen = jax.jit(task.begin)(jax.random.key(0)), jax.tree.map(jnp.asarray, task.frozen)
    (batch,), key = batches(config, 1), jax.random.key(7)
    values = jax.jit(task.evaluate)(state, frozen, batch, key)
    network, model = task.networks["generator"], task.networks["generator"].config
    tokens = titok_jax.load_tokenizer("digits").encode(batch["image"])
    draws = task.draw(key, batch)
    masked, mask = mask_tokens(tokens, draws["timesteps"], draws["order_uniforms"], model.mask_id)
    logits = network.module(state["ema"]["generator"]).logits(masked, batch["label"])
    for i in (0, 5):
        _, expected = masked_token_loss(logits[i : i + 1], tokens[i : i + 1], mask[i : i + 1])
        for name in ("loss", "correct_tokens"):
            np.testing.assert_allclose(values[name][i], expected[name], rtol=1e-4)


def test_a_second_run_on_one_workdir_is_refused(tmp_path):
    with locks.lock_run(tmp_path), pytest.raises(ValueError, match=r"another run \(.*, process \d+\) is at work in"):
        loop.train(parse_settings(small("tokenizer")), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_where_a_file_system_has_no_locks_a_run_warns_and_goes_on(tmp_path, monkeypatch, capsys):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locks.lock_run(tmp_path):
        assert f"warning: {tmp_path} cannot be locked ([Errno 37] No locks available)" in capsys.readouterr().out


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
        (None, {"discriminator_dtype": "float16"}, "discriminator_dtype"),
        (None, {"log_every": 0}, "log_every is 0"),
        (None, {"max_nonfinite_steps": 0}, "max_nonfinite_steps is 0"),
        ("data", {"eval_source": ConfigDict({"name": "digits", "split": "test", "image_size": 64})}, "images have shape"),
        (
            "data",
            {"eval_transform": ConfigDict({"name": "center_crop_torchvision", "size": 16})},
            r"data.eval_transform.size is 16, but the model takes images of 32 x 32",
        ),
        ("data", {"num_threats": 2}, "config.data has unknown fields: num_threats"),
        (None, {"nmu_steps": 2}, "config has unknown fields: nmu_steps"),
        ("optimizer", {"schedule": "step"}, "config.optimizer: schedule is 'step'"),
    ],
)
def test_bad_configurations_are_refused_before_anything_is_written(section, change, message, tmp_path):
    config = small("tokenizer")
    with config.unlocked():
        (config if section is None else config[section]).update(change)
    config.eval_every = 3
    with pytest.raises(ValueError, match=message):
        loop.train(parse_settings(config), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_pictures_of_another_size_are_refused_before_anything_is_written(tmp_path):
    """Previews show held-out data, or the training data without augmentation."""
    config = small("tokenizer", preview_every=3)
    with config.unlocked():
        config.data.eval_source = ConfigDict({"name": "digits", "split": "test", "image_size": 64})
    with pytest.raises(ValueError, match=r"images have shape \[64, 64, 3\], the model takes \[32, 32, 3\]"):
        loop.train(parse_settings(config), tmp_path / "run")
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
    loop.train(parse_settings(config), tmp_path / "run")
    generator = titok_jax.load_generator(tmp_path / "run" / "pretrained")
    ids = titok_jax.generate(generator, [1, 2], jax.random.key(0), num_steps=3)
    assert ids.shape == (2, 6)
    assert 0 <= ids.min() <= ids.max() < 50
    config.model.codebook_size = 40
    with pytest.raises(ValueError, match=r"tokens\.array_record, record \d+: token 4\d, expected 0 to 39"):
        loop.train(parse_settings(config), tmp_path / "other")


def test_a_run_leaves_model_curves_and_pictures(tmp_path, capsys):
    config = small(
        "tokenizer", preview_every=3, eval_every=4, eval_images=20, gradient_accumulation=2, compute_dtype="bfloat16"
    )
    config.log_grad_norms, config.log_every = True, 1
    config.data.batch_size = 24
    state = loop.train(parse_settings(config), tmp_path / "run")
    run = tmp_path / "run"
    out = capsys.readouterr().out
    for part in ("learning_rate: 0.001", "encoder/transformer/attn/qkv/kernel", "Global batch 24 x 6 steps", "'fsdp': 1",
                 "WARNING: data.batch_size is 24, the recipe has 32", "images/s", "data wait", "left",
                 "held out: psnr"):  # fmt: skip
        assert part in out, part
    assert sorted(p.name for p in (run / "previews").iterdir()) == ["0000003.png", "0000006.png"]
    # What was printed is in a file too, each line with the time, and so is the configuration.
    logged = (run / "log.txt").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in logged)
    assert [line[21:] for line in logged] == out.splitlines()
    assert json.loads((run / "config.json").read_text()) == json.loads(config.to_json())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    norms = {name: value for name, value in records[0].items() if name.startswith("grad_norm/")}
    assert {"grad_norm/quantize", "grad_norm/encoder/transformer", "grad_norm/latent_tokens"} <= norms.keys()
    assert math.sqrt(sum(value**2 for value in norms.values())) == pytest.approx(records[0]["grad_norm"], rel=1e-5)
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(state["params"]))
    loaded, params = pretrained.load(run / "pretrained", models.TiTokConfig)
    assert loaded.codebook_size == 128
    assert_same_state(params, state["ema"]["tokenizer"])
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = {line["step"]: line for line in logged if "eval/psnr" in line}
    assert sorted(evaluations) == [4, 6]
    # The exported model on the first 24 held-out digits: 20, rounded up to full parts of a batch, of 12 each.
    test = make_source({"name": "digits", "split": "test"})
    images = np.stack([test[i]["image"] for i in range(24)]) / 255.0
    tokenizer = titok_jax.load_tokenizer(str(run / "pretrained"))
    rebuilt = np.clip(tokenizer.decode(tokenizer.encode(images.astype(np.float32))), 0, 1)
    # The run computed in bfloat16, which affects the third digit.
    np.testing.assert_allclose(evaluations[6]["eval/psnr"], metrics.psnr(images, rebuilt).mean(), rtol=1e-2)
    np.testing.assert_allclose(evaluations[6]["eval/ssim"], metrics.ssim(images, rebuilt).mean(), rtol=0.1, atol=1e-3)
    with PIL.Image.open(run / "curves.png") as curves:
        assert curves.width == 3 * 440
        assert curves.height >= 3 * 280


MESH_PROGRAM = """
import json, pathlib, sys
import jax
import on_meshes, test_train
from titok_jax.runtime import sharding
from titok_jax.training import loop, same_run
from titok_jax.training.settings import parse_settings
shape, workdir = json.loads(sys.argv[1]), sys.argv[2]
config = test_train.small("tokenizer", log_every=1, eval_every=6, eval_images=20, preview_every=6)
config.data.batch_size = 56  # no other size in this model is a multiple of 7
with config.unlocked():
    config.restart_codes = True
config.mesh.update(dict(zip(("data", "fsdp", "tensor"), shape)))
sharding.SMALLEST_SHARDED = 64
sent, real = {}, sharding.jit_on
def jit_on(mesh, function, **options):
    jitted = real(mesh, function, **options)
    def call(*arguments):
        with sharding.on_mesh(mesh):
            text = jitted.__wrapped__.lower(*arguments).compile().as_text()
        sent[function.__name__] = on_meshes.collectives(text)
        return jitted(*arguments)
    return call
sharding.jit_on = jit_on
loop.train(parse_settings(config), workdir)
pathlib.Path(workdir, "sent.json").write_text(json.dumps(sent))
"""


@pytest.mark.long
def test_the_loop_gives_the_same_on_any_mesh(tmp_path):
    """Losses, restarted codes and held-out measures. For these no device receives another device's part of a batch.
    test_sharding.py tests the steps of each task."""
    logs, sent = [], []
    for name, shape in (("one", [1, 1, 1]), ("eight", [2, 2, 2])):
        env = {**ENVIRONMENT, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_NUM_CPU_DEVICES": str(np.prod(shape))}
        arguments = [sys.executable, "-c", MESH_PROGRAM, json.dumps(shape), str(tmp_path / name)]
        subprocess.run(arguments, cwd=ROOT, env=env, check=True, capture_output=True)
        logs.append([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()])
        sent.append(json.loads((tmp_path / name / "sent.json").read_text()))
        assert (tmp_path / name / "previews" / "0000006.png").exists()
    assert sent[0] == {"sums": {}, "preview": {}}
    assert sent[1]["sums"]["all-gather"]
    assert not any(size % 7 == 0 and size > 56 // 4 for arrays in sent[1]["sums"].values() for _, s in arrays for size in s)
    one, eight = (log.pop() for log in logs)
    for name in ("eval/psnr", "eval/ssim"):
        np.testing.assert_allclose(one[name], eight[name], rtol=1e-3)
    assert len(logs[0]) == len(logs[1]) == 6
    assert logs[0][-1]["codebook_usage"] == logs[1][-1]["codebook_usage"] > 1 / 128
    for one, eight in zip(*logs, strict=True):
        for name in ("total_loss", "reconstruction_loss", "grad_norm"):
            # Sums over devices are in another order, and Adam's first steps amplify rounding.
            np.testing.assert_allclose(eight[name], one[name], rtol=1e-3, err_msg=name)


def test_the_command_explains_itself_and_what_is_wrong_with_a_flag(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "titok_jax.train", *arguments]
        return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)

    text = run("--help").stdout
    assert text.count("python -m titok_jax.train --config") >= 3
    workdir = tmp_path / "run"
    bad = run("--config", "configs/digits.py:tokenizer", "--workdir", str(workdir), "--config.nope=3")
    assert bad.returncode == 2
    assert "Traceback" not in bad.stderr
    assert bad.stderr.strip().splitlines()[-1] == "error: --config.nope=3: configs/digits.py:tokenizer has no field nope"
    bad = run("--config", "configs/digits.py:tokenizer", "--workdir", str(workdir), "--config.task=paint")
    assert bad.stderr.strip().splitlines()[-1].startswith("error: config.task is 'paint'")
    for span in ("10:10", "10", "a:b", "-1:3", "1:2:3"):
        with pytest.raises(
            ValueError, match=f"^--profile is {span}, expected START:STOP, numbers of steps, such as 100:110$"
        ):
            train._parser().parse_args(["--config", "digits:tokenizer", "--workdir", "x", f"--profile={span}"])
    assert not workdir.exists()


def test_labels_always_mean_the_same_classes(tmp_path, capsys):
    """The classes are printed, kept with the checkpoint, and the same in what is held out."""
    for split in ("train", "held_out"):
        for name in ("cat", "dog", "eel"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(8):
                pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
                PIL.Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    config = small("tokenizer", num_steps=2, log_every=1, checkpoint_every=1)
    config.data.batch_size = 8
    with config.unlocked():
        config.data.source = ConfigDict({"name": "folder", "path": str(tmp_path / "train")})
        config.data.eval_source = ConfigDict({"name": "folder", "path": str(tmp_path / "held_out")})
    loop.train(parse_settings(config), tmp_path / "run")
    assert "Classes: 0 cat, 1 dog, 2 eel" in capsys.readouterr().out
    shutil.move(tmp_path / "train" / "dog", tmp_path / "train" / "fox")
    with pytest.raises(ValueError, match=r"0 cat, 1 dog, 2 eel in the checkpoint, 0 cat, 1 eel, 2 fox now"):
        loop.train(parse_settings(config), tmp_path / "run")
    config.update({"eval_every": 1, "eval_images": 8})
    with pytest.raises(ValueError, match=r"eval_source has 3 classes and config\.data\.source 3.*only: dog, fox"):
        loop.train(parse_settings(config), tmp_path / "other")


def test_tokens_know_their_tokenizer(tmp_path):
    """A generator is not trained on the tokens of one tokenizer and exported with another."""
    mine = tiny_models.save(tmp_path / "mine", tiny_models.TOKENIZER)
    with token_writer(tmp_path / "tokens.array_record") as write:
        for i in range(40):
            write(np.arange(8), i % 10)
    manifest = tmp_path / "pretokenize.json"
    config = small("generator", num_steps=2, tokenizer=str(mine))
    with config.unlocked():
        config.data.source = ConfigDict({"name": "tokens", "paths": str(tmp_path / "tokens.array_record")})
        config.data.transform = None
    loop.prepare(parse_settings(config), tmp_path / "run")  # records of another program, which say nothing
    manifest.write_text(json.dumps({"model": "digits", "weights": "0" * 64}))
    with pytest.raises(ValueError, match=r"pretokenize\.json: the tokens were made by digits \(SHA-256 0{12}\.\.\.\)"):
        loop.prepare(parse_settings(config), tmp_path / "run")
    manifest.write_text(json.dumps({"model": "mine", "weights": sha256(mine / "model.safetensors")}))
    loop.prepare(parse_settings(config), tmp_path / "run")
    config.model.num_tokens = 9
    with pytest.raises(ValueError, match=r"config\.model\.num_tokens is 9, but the tokenizer .*mine has 8: take the recipe"):
        parse_settings(config)
