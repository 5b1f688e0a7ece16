"""What a training tells of itself beside its metrics: its speed, and where its time and its memory go.

The host waits for no step that it has just begun. Metrics are summed on the devices and fetched at a log line, and so are
the figures of all hosts, in one exchange.
"""

import collections
import contextlib
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from titok_jax.training.flops import Work

Metrics = Mapping[str, jax.Array]

# These say how things stand after a step, so a line shows the last one and no mean.
STATES = ("lr", "disc_lr", "nonfinite_steps")


@jax.jit
def _added(sums: jax.Array, counts: jax.Array, values: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    new = jnp.stack([jnp.asarray(value, jnp.float32) for value in values])
    finite = jnp.isfinite(new)
    return sums + jnp.where(finite, new, 0), counts + finite


class Means:
    """The means of a training's metrics since the last log line, over the steps in which they are finite. A metric that is
    finite in none is NaN, and those in STATES are the last ones."""

    def __init__(self, stored: Mapping[str, list[float]] | None = None):
        """
        Args:
          stored: what `stored` gave when the checkpoint was written from which the training goes on.
        """
        self._stored, self._names, self._last = stored or {}, (), {}

    def add(self, metrics: Metrics) -> None:
        """Adds the metrics of a step, scalars."""
        if not self._names:
            self._names = tuple(sorted(metrics))
            begun = np.array([self._stored.get(name, (0, 0)) for name in self._names])
            if set(self._stored) != set(self._names):
                begun = np.zeros_like(begun)
            self._sums, self._counts = begun[:, 0].astype(np.float32), begun[:, 1].astype(np.int32)
        self._sums, self._counts = _added(self._sums, self._counts, [metrics[name] for name in self._names])
        self._last = {name: metrics[name] for name in STATES if name in metrics}

    def stored(self) -> dict[str, list[float]]:
        """What a checkpoint keeps, as the next log line must count the steps before it: {metric: [sum, count]}."""
        if not self._names:
            return {}
        sums, counts = jax.device_get((self._sums, self._counts))
        return {name: [float(s), int(c)] for name, s, c in zip(self._names, sums, counts, strict=True)}

    def take(self) -> dict[str, float]:
        """The means; the next step begins anew."""
        found, last = self.stored(), jax.device_get(self._last)
        self._names, self._stored = (), {}
        means = {name: np.float32(total) / np.float32(count) if count else np.nan for name, (total, count) in found.items()}
        return {name: float(value) for name, value in (means | last).items()}


class StepTimes:
    """The seconds that each step took, from the end of the one before it. The devices always have a step to go on with: the
    host waits only for the step before the last two."""

    AHEAD = 2

    def __init__(self):
        self._running: collections.deque[Metrics] = collections.deque()
        self._ended, self._seconds = time.perf_counter(), []

    def begun(self, metrics: Metrics) -> None:
        """Says that a step has been given to the devices."""
        self._running.append(metrics)
        self.wait(self.AHEAD)

    def wait(self, running: int = 0) -> None:
        """Waits until at most this number of steps are running."""
        while len(self._running) > running:
            jax.block_until_ready(self._running.popleft())
            now = time.perf_counter()
            self._seconds.append(now - self._ended)
            self._ended = now

    def skip(self, seconds: float) -> None:
        """Leaves out time that belongs to no step. No step may be running."""
        self._ended += seconds

    def take(self) -> list[float]:
        """The times of the steps since the last call that have ended."""
        taken, self._seconds = self._seconds, []
        return taken


class RunTime:
    """Where the time of a run went since its first start, over all its starts: compiling (with the first step), checkpoints
    (while the steps wait), evaluation (with previews), and restarts: what passed between the last log line that was kept and
    the next step, or before the first step. All other time was productive."""

    KINDS = ("compile", "checkpoint", "evaluation", "restart")

    def __init__(self, former: Mapping[str, float], began: float):
        """
        Args:
          former: the `figures` in the log at which this process goes on; empty for a new run.
          began: when this process began, as `time.time`.
        """
        self._before = former.get("run_seconds") or 0.0
        self._since = former.get("unix_time") or began
        self._spent = {kind: (former.get(f"time/{kind}") or 0.0) * self._before for kind in self.KINDS}
        self._known = 0.0  # of the time since `_since`

    def spend(self, kind: str, seconds: float) -> None:
        """Adds time of this kind."""
        self._spent[kind] += seconds
        self._known += seconds

    def first_step(self, seconds: float) -> None:
        """Says that the first step of this process has just ended, and how long it took."""
        self.spend("compile", seconds)
        self.spend("restart", max(0.0, time.time() - self._since - self._known))

    def figures(self) -> dict[str, float]:
        """The seconds since the first start ("run_seconds"), what part of them went where, and the time ("unix_time")."""
        now = time.time()
        total = max(self._before + now - self._since, sum(self._spent.values()), 1e-9)
        shares = {f"time/{kind}": seconds / total for kind, seconds in self._spent.items()}
        return {"time/productive": 1 - sum(shares.values()), **shares, "run_seconds": total, "unix_time": now}


class Hosts:
    """The processes of a run, and what they measure."""

    def __init__(self):
        own = np.frombuffer(socket.gethostname().encode()[:64].ljust(64, b"\0"), np.uint8)
        names = _gathered(own)
        self._names = [bytes(name).rstrip(b"\0").decode(errors="replace") for name in names]

    def name(self, process: int) -> str:
        return f"process {process} ({self._names[process]})"

    def figures(self, data_wait: float) -> dict[str, float]:
        """The figures of all processes, which all call it at the same steps.

        Returns:
          data_wait: mean over the processes; with several also data_wait_max, and data_wait_slowest, the process that waits
            longest. memory_gib, memory_peak_gib, memory_limit_gib: of the device that has most of it, if devices tell.
        """
        data = _gathered(np.array([data_wait, *_memory()], np.float32))
        found = {"data_wait": float(data[:, 0].mean())}
        if len(data) > 1:
            found |= {"data_wait_max": float(data[:, 0].max()), "data_wait_slowest": float(data[:, 0].argmax())}
        names = ("memory_gib", "memory_peak_gib", "memory_limit_gib")
        known = {name: values[np.isfinite(values)] for name, values in zip(names, data[:, 1:].T, strict=True)}
        return found | {name: float(values.max()) for name, values in known.items() if values.size}


def _gathered(own: np.ndarray) -> np.ndarray:
    """The same small array of all processes: [processes, ...]."""
    return own[None] if jax.process_count() == 1 else np.asarray(multihost_utils.process_allgather(own))


def _memory() -> list[float]:
    """Of the devices of this process: GiB in use, their peak, and what there is, each on the device that has most. NaN where
    devices do not tell, as CPUs."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    keys = ("bytes_in_use", "peak_bytes_in_use", "bytes_limit")
    return [max((stat[key] / 2**30 for stat in stats if key in stat), default=np.nan) for key in keys]


class Telemetry:
    """Follows the steps of one process of a training."""

    def __init__(self, work: Work, first_step: int, run_time: RunTime, stored: Mapping[str, Any] | None = None):
        """
        Args:
          first_step: number of steps done before.
          stored: sums of metrics in the checkpoint, see `Means`.
        """
        self._hosts = Hosts()
        self._work, self._means, self._steps, self._run_time = work, Means(stored), StepTimes(), run_time
        self._line_step, self._line_time, self._waited = first_step, time.perf_counter(), 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The block waits for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def step(self, metrics: Metrics, *, first: bool) -> None:
        """Says that a step has been given to the devices. The first of a process, which is compiled, is waited for."""
        self._means.add(metrics)
        self._steps.begun(metrics)
        if first:
            self._steps.wait()
            (self._first,) = self._steps.take()
            self._run_time.first_step(self._first)
            self._line_step, self._line_time, self._waited = self._line_step + 1, time.perf_counter(), 0.0

    @contextlib.contextmanager
    def spending(self, kind: str) -> Iterator[None]:
        """The block is work of this kind (`RunTime.KINDS`). It waits for the running steps first."""
        self._steps.wait()
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self._run_time.spend(kind, seconds)
        self._steps.skip(seconds)
        if kind == "evaluation":  # the speed excludes it
            self._line_time += seconds

    def wait(self) -> None:
        """Waits until all steps have ended."""
        self._steps.wait()

    def slowest(self, figures: Mapping[str, float]) -> str:
        """The host that waits longest for its data, by the figures of a line; "" if there is only one."""
        return self._hosts.name(int(figures["data_wait_slowest"])) if "data_wait_slowest" in figures else ""

    def stored(self) -> dict[str, list[float]]:
        """What a checkpoint keeps of the steps since the last log line."""
        return self._means.stored()

    def line(self, step: int) -> tuple[dict[str, float], dict[str, float]]:
        """The means of the metrics after `step` steps, and the figures of this interval. All processes call it together."""
        self._steps.wait()
        now, times = time.perf_counter(), self._steps.take()
        seconds, steps = now - self._line_time, step - self._line_step
        if not steps:  # only the first step of this process, which all other lines leave out
            seconds, steps, times = self._first, 1, [self._first]
        found = self._hosts.figures(self._waited / seconds)
        self._line_step, self._line_time, self._waited = step, now, 0.0
        figures = {
            "images_per_second": steps * self._work.batch_size / seconds,
            **found,
            "seconds_left": (self._work.num_steps - step) * seconds / steps,
        }
        middle, high = np.percentile(times, (50, 95)).tolist()
        figures |= {"seconds_per_step/p50": middle, "seconds_per_step/p95": high, "seconds_per_step/max": max(times)}
        if self._work.peak_flops:
            figures["mfu"] = self._work.flops * steps / seconds / self._work.peak_flops
        return self._means.take(), figures | self._run_time.figures()

    def summary(self) -> str:
        """Where the time of the run went, in one line."""
        figures = self._run_time.figures()
        kinds = ("productive", *RunTime.KINDS)
        shares = ", ".join(f"{kind} {100 * figures[f'time/{kind}']:.0f} %" for kind in kinds)
        return f"Time since the first start: {duration(figures['run_seconds'])}; {shares}"


def duration(seconds: float) -> str:
    """ "3h25m" or "12m05s"."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
