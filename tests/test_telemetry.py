"""What a training tells of its speed, time, memory and hosts, and that it does not wait for its devices to tell it."""

import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import metrics_of, small

from titok_jax.runtime import chips, sharding
from titok_jax.training import flops, loop, telemetry
from titok_jax.training.flops import Work
from titok_jax.training.recipes import read_config
from titok_jax.training.settings import parse_settings
from titok_jax.training.telemetry import Hosts, Means, RunTime, StepTimes, Telemetry


@pytest.fixture
def clock(monkeypatch):
    """The time, which passes only by `clock.now += seconds`."""
    found, Result.device = SimpleNamespace(now=1000.0), 0.0
    found.time = found.perf_counter = lambda: found.now
    monkeypatch.setattr(telemetry, "time", found)
    return found


class Result:
    """Metrics of a step, which a device has computed after some seconds of its own."""

    device = 0.0  # when it will be ready with all that it was given

    def __init__(self, clock, seconds: float):
        Result.device = self.end = max(Result.device, clock.now) + seconds
        self._clock = clock

    def block_until_ready(self):
        self._clock.now = max(self._clock.now, self.end)
        return self


def scalars(**values) -> dict[str, jax.Array]:
    return {name: jnp.float32(value) for name, value in values.items()}


def test_metrics_are_means_of_the_interval_over_the_steps_that_are_finite():
    means = Means()
    for loss, norm in ((1.0, math.nan), (2.0, 5.0), (math.inf, math.nan), (6.0, 7.0)):
        means.add(scalars(loss=loss, norm=norm, never=math.nan, lr=loss / 8, nonfinite_steps=3))
    found = means.take()
    assert {n: v for n, v in found.items() if n != "never"} == {"loss": 3.0, "norm": 6.0, "lr": 0.75, "nonfinite_steps": 3.0}
    assert math.isnan(found["never"])
    means.add(scalars(loss=0.1, other=2.0))  # anew, also with other names
    assert means.take() == {"loss": float(np.float32(0.1)), "other": 2.0}  # of one step, its bits


def test_a_checkpoint_between_two_log_lines_keeps_the_sums():
    rng, straight, before = np.random.default_rng(0), Means(), Means()
    values = rng.normal(size=9).tolist()
    for value in values:
        straight.add(scalars(loss=value, lr=1.0))
    for value in values[:4]:
        before.add(scalars(loss=value, lr=1.0))
    after = Means(json.loads(json.dumps(before.stored())))
    for value in values[4:]:
        after.add(scalars(loss=value, lr=1.0))
    assert after.take() == straight.take()
    assert Means().stored() == {}
    other = Means(before.stored())  # of a run that now logs other metrics
    other.add(scalars(loss=3.0))
    assert other.take() == {"loss": 3.0}


def test_the_host_waits_only_for_the_step_before_the_last_two(clock):
    times, ends = StepTimes(), []
    for _ in range(4):
        times.begun({"loss": Result(clock, 10)})
        ends.append(clock.now - 1000)
    assert ends == [0, 0, 10, 20]  # and the device has two more steps to do
    clock.now += 3
    times.wait()
    assert clock.now == 1040
    assert times.take() == [10] * 4
    clock.now += 5  # such as a checkpoint
    times.skip(5)
    times.begun({"loss": Result(clock, 7)})
    times.wait()
    assert times.take() == [7]


class NoMeans:
    """In the place of `Means`, for metrics that are no arrays."""

    def __init__(self, stored=None):
        pass

    def add(self, metrics):
        pass

    def take(self):
        return {"loss": 1.0}


@pytest.fixture
def follow(clock, monkeypatch):
    """A function that makes a Telemetry of a run of 100 steps of 32 examples. Its other function runs a step."""
    monkeypatch.setattr(telemetry, "Means", NoMeans)

    def make(first_step=0, former=None, **work):
        Result.device = 0.0  # a machine that does nothing yet
        followed = Telemetry(Work(100, 32, **work), first_step, RunTime(former or {}, clock.now - 20))

        def run(seconds, *, wait=0.0, first=False):
            with followed.waiting():
                clock.now += wait
            followed.step({"loss": Result(clock, seconds)}, first=first)

        return followed, run

    return make


def test_a_line_tells_the_speed_without_compilation_and_evaluation(clock, follow):
    followed, run = follow(first_step=10, flops=6e12, peak_flops=12e12)
    run(40, wait=3, first=True)
    for seconds in (1, 1, 1, 5):
        run(seconds)
    with followed.spending("evaluation"):
        clock.now += 500
    means, figures = followed.line(15)
    assert means == {"loss": 1.0}
    assert figures["images_per_second"] == 4 * 32 / 8  # of the four steps after the first one
    assert figures["seconds_left"] == 85 * 2
    assert figures["data_wait"] == 0
    assert figures["mfu"] == 6 / 12 / 2
    assert [figures[f"seconds_per_step/{name}"] for name in ("p50", "max")] == [1, 5]
    assert figures["seconds_per_step/p95"] == pytest.approx(1 + 0.85 * 4)
    run(1, wait=3)
    with followed.spending("checkpoint"):
        clock.now += 6
    _, figures = followed.line(16)
    assert figures["images_per_second"] == 32 / 10  # the steps wait for a checkpoint
    assert figures["seconds_per_step/max"] == 4  # which is none of their time
    assert figures["data_wait"] == pytest.approx(0.3)


def test_a_line_of_the_first_step_alone_counts_its_compilation(clock, follow):
    followed, run = follow()
    run(40, first=True)
    _, figures = followed.line(1)
    assert figures["images_per_second"] == 32 / 40
    assert figures["seconds_per_step/p95"] == 40
    assert "mfu" not in figures  # the chip is not known
    assert not any("memory" in name for name in figures)  # nor do CPUs tell what they use


def test_the_time_of_a_run_goes_on_over_its_restarts(clock, follow):
    followed, run = follow()  # began 20 s before
    run(40, first=True)
    run(60)
    with followed.spending("checkpoint"):
        clock.now += 30
    with followed.spending("evaluation"):
        clock.now += 50
    _, figures = followed.line(2)
    expected = {"restart": 20, "compile": 40, "productive": 60, "checkpoint": 30, "evaluation": 50}
    assert {n: figures[f"time/{n}"] * figures["run_seconds"] for n in expected} == pytest.approx(expected)
    assert figures["run_seconds"] == pytest.approx(200)
    assert figures["unix_time"] == clock.now
    run(1000)  # this step is lost, and then there is no machine
    clock.now += 200
    again, run = follow(first_step=2, former=figures)
    with again.spending("evaluation"):  # which the former process did not come to
        clock.now += 10
    run(40, first=True)
    run(100)
    _, figures = again.line(4)
    for name, more in {"restart": 200, "compile": 40, "productive": 100, "evaluation": 10}.items():
        expected[name] += more
    assert figures["run_seconds"] == pytest.approx(sum(expected.values()))
    assert {n: figures[f"time/{n}"] * figures["run_seconds"] for n in expected} == pytest.approx(expected)
    assert again.summary().startswith("Time since the first start: ")
    assert again.summary().endswith("productive 29 %, compile 15 %, checkpoint 5 %, evaluation 11 %, restart 40 %")


def test_of_several_hosts_the_slowest_is_named_and_the_fullest_device_counts(monkeypatch):
    calls = []

    def allgather(own):
        calls.append(own)
        if own.dtype == np.uint8:
            return np.stack([np.frombuffer(f"host-{i}".encode().ljust(64, b"\0"), np.uint8) for i in range(3)])
        return np.array([[0.125, 1, 5, 16], [0.5, 2, 4, 16], [0.125, math.nan, math.nan, math.nan]], np.float32)

    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(telemetry.multihost_utils, "process_allgather", allgather)
    stats = [{"bytes_in_use": 2**30, "peak_bytes_in_use": 5 * 2**30}, {"bytes_in_use": 2**31, "bytes_limit": 2**34}, None]
    devices = [SimpleNamespace(memory_stats=lambda stat=stat: stat) for stat in stats]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    hosts = Hosts()
    assert hosts.figures(0.75) == {
        **{"data_wait": 0.25, "data_wait_max": 0.5, "data_wait_slowest": 1.0},
        **{"memory_gib": 2.0, "memory_peak_gib": 5.0, "memory_limit_gib": 16.0},
    }
    assert calls[1].tolist() == [0.75, 2, 5, 16]
    assert len(calls) == 2  # one exchange for a line
    assert hosts.name(1) == "process 1 (host-1)"


def test_a_line_says_it_in_the_terminal(tmp_path, capsys):
    log = loop.MetricLog(loop.LogFolder(loop.epath.Path(tmp_path)), first_step=0, num_steps=100)
    figures = {
        "images_per_second": 812.4,
        "seconds_left": 3700.0,
        "data_wait": 0.031,
        "memory_peak_gib": 12.94,
        "mfu": 0.314,
    }
    hosts = {"data_wait_max": 0.12, "data_wait_slowest": 5.0}
    log.write(10, {"loss": 0.5, "lr": 1e-4}, shown="loss", figures=figures | hosts, slowest="process 5 (t1v-5)")
    log.close()
    assert capsys.readouterr().out == (
        "step 10/100  loss 0.5000  lr 1.00e-04  812 images/s  MFU 31 %  data wait 3 % (most: 12 %, process 5 (t1v-5))  "
        "memory 12.9 GiB  left 1h01m\n"
    )
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line.items() >= (figures | hosts).items()


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197.0),
        ("TPU v5p", 459.0),
        ("TPU v4", 275.0),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L400", None),
        ("cpu", None),
    ],
)
def test_the_peak_of_a_chip_is_known_by_its_kind(kind, peak):
    assert chips.peak_tflops(kind) == peak


@pytest.mark.parametrize(
    ("recipe", "tflop"),
    [("generator:l32", 16 * 4.41), ("stage1:smoke", None), ("stage2:smoke", None), ("single_stage:smoke", None)],
)
def test_operations_are_those_of_the_model_whatever_is_computed_again(recipe, tflop):
    """The table of docs/tpu.md has the generator's, per device of 16."""
    found = []
    for changes in ((), ("--config.remat=full", "--config.gradient_accumulation=2")):
        settings = parse_settings(read_config(recipe, list(changes)), abstract=True)
        found.append(flops.model_flops(settings, sharding.make_mesh()))
    assert found[0] == found[1] > 0
    if tflop:
        assert found[0] / 1e12 == pytest.approx(tflop, rel=2e-3)


def test_a_run_tells_all_of_it(tmp_path, monkeypatch, capsys):
    """Means over steps, model FLOP utilisation where the chip is known, and a trace of two steps, also in TensorBoard's
    folder."""
    steps, real = [], loop.compile_step

    def compile_step(*arguments):
        step = real(*arguments)

        def kept(*arguments):
            state, metrics = step(*arguments)
            steps.append(metrics)
            return state, metrics

        return kept

    monkeypatch.setattr(loop, "compile_step", compile_step)
    monkeypatch.setattr(flops, "peak_tflops", lambda kind: 0.001)
    config = small("tokenizer", log_every=3)
    with pytest.raises(ValueError, match=r"^--profile 6:8 is after the end: this run has 6 steps$"):
        loop.train(parse_settings(config), tmp_path / "run", profile=(6, 8))
    loop.train(parse_settings(config), tmp_path / "run", profile=(3, 5))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6]
    for line, part in zip(lines, (steps[:3], steps[3:]), strict=True):
        losses = [float(metrics["total_loss"]) for metrics in part]
        assert len(set(losses)) == 3
        assert line["total_loss"] == pytest.approx(np.mean(losses), rel=1e-6)
        assert line["lr"] == part[-1]["lr"]
        assert metrics_of(line).keys() == {"step", "mfu", *part[0]}
        assert 0 < line["seconds_per_step/p50"] <= line["seconds_per_step/p95"] <= line["seconds_per_step/max"]
        assert line["mfu"] > 0
    shares = [name for name in lines[0] if name.startswith("time/")]
    assert sum(lines[1][name] for name in shares) == pytest.approx(1)
    assert all(lines[1][name] >= 0 for name in shares)
    out = capsys.readouterr().out
    for part in ("A step is 0.00 TFLOP, the devices' peak 0 TFLOP/s in bfloat16", "  MFU ", "Time since the first start: "):
        assert part in out
    assert list((tmp_path / "run/tensorboard/plugins/profile").glob("*/*.xplane.pb"))
    assert f"The trace is in {tmp_path}/run/tensorboard/plugins/profile" in out
