"""Writes the metrics of a training to the terminal and to `metrics.jsonl`, `curves.png`, `log.txt` and TensorBoard in the
workdir."""

import contextlib
import io
import json
import math
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from etils import epath
from tensorboardX import summary

from titok_jax.pictures import plots
from titok_jax.runtime.outputs import new_file
from titok_jax.runtime.paths import writing
from titok_jax.training.log_files import EventFiles, LogFolder

# These have no useful curve, or too many: the step axis itself, times, values that the configuration fixes, norms by group.
_NOT_DRAWN = ("step", "seconds_left", "data_wait", "discriminator_factor", "d_weight", "grad_norm/", "disc_grad_norm/")


class TextLog(io.TextIOBase):
    """A copy of what a training prints, in `log.txt` of its workdir, each line with the date and time (UTC).

    Use as `contextlib.redirect_stdout(TextLog())`. It keeps the text until `open` says where to write it, since nothing is
    written to a workdir before it is locked. Lines of earlier processes stay. Any thread may print.
    """

    def __init__(self):
        self._terminal, self._kept, self._line = sys.stdout, [], ""
        self._path: epath.Path | None = None
        self._alone = threading.RLock()

    def open(self, folder: LogFolder) -> None:
        """Writes what was printed until now to `log.txt` in a folder, and everything from now on."""
        former = folder.workdir / "log.txt"
        path = folder.path / former.name
        if path != former and former.exists():
            former.copy(path)
        with self._alone:
            self._path = path
            self._append()

    def write(self, text: str) -> int:
        with self._alone:
            self._terminal.write(text)
            self.note(text)
        return len(text)

    def note(self, text: str) -> None:
        """Writes a text to the file only."""
        with self._alone:
            *lines, self._line = (self._line + text).split("\n")
            now = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
            self._kept += [f"{now}  {line}\n" for line in lines]
            if self._path is not None and lines:
                self._append()

    def flush(self) -> None:
        self._terminal.flush()

    def _append(self) -> None:
        with writing(self._path), self._path.open("a") as file:
            file.write("".join(self._kept))
        self._kept = []


class MetricLog:
    """Writes on the first process only. On the others, which have no folder, every method does nothing.

    Attributes:
      folder: the local folder of the log files.
    """

    def __init__(
        self,
        folder: LogFolder | None,
        *,
        first_step: int,
        num_steps: int,
        batch_size: int,
        changed: Sequence[int] = (),
    ):
        """
        Args:
          folder: where to write; None on all processes but the first.
          first_step: the step at which this process starts. Later entries of an earlier process are dropped.
          batch_size: global batch size, used to compute images/s.
          changed: steps after which the configuration or the data changed; a line in the curves.
        """
        self._active, self._num_steps, self._batch_size = folder is not None, num_steps, batch_size
        self._changed = list(changed)
        self._last_step, self._last_time, self._wait = first_step, time.perf_counter(), 0.0
        if folder is None:
            return
        self.folder = folder.path
        self._path, self._curves = self.folder / "metrics.jsonl", self.folder / "curves.png"
        self._records = [record for record in _records(folder.workdir / self._path.name) if record["step"] <= first_step]
        with new_file(self._path, replace=True) as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in self._records))
        self._tensorboard = EventFiles(self.folder / "tensorboard", first_step + 1)

    def waited(self, seconds: float) -> None:
        """Adds the time that a step waited for its data."""
        self._wait += seconds

    def write(self, step: int, metrics: Mapping[str, float], *, shown: str) -> None:
        """Logs scalars after `step` updates, with the speed since the last call. The terminal shows metric `shown` first."""
        now = time.perf_counter()
        seconds, steps = max(now - self._last_time, 1e-9), step - self._last_step
        wait, self._wait = self._wait / seconds, 0.0
        self._last_step, self._last_time = step, now
        if not self._active or steps <= 0:
            return
        line = {name: float(value) for name, value in metrics.items()}
        rate = steps * self._batch_size / seconds
        remaining = (self._num_steps - step) * seconds / steps
        print(
            f"step {step}/{self._num_steps}  {shown} {line[shown]:.4f}  lr {line.get('lr', 0.0):.2e}  "
            f"{rate:.0f} images/s  data wait {100 * wait:.0f} %  left {_duration(remaining)}",
            flush=True,
        )
        line |= {"images_per_second": rate, "data_wait": wait, "seconds_left": remaining}
        self._record(step, line)

    def write_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Logs metrics of held-out examples after `step` updates, each as "eval/" plus its name. Does nothing if they are
        already logged for this step."""
        line = {f"eval/{name}": float(value) for name, value in values.items()}
        if not self._active or any(record["step"] == step and line.keys() <= record.keys() for record in self._records):
            return
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        print(f"step {step}/{self._num_steps}  held out: {shown}", flush=True)
        self._record(step, line)

    def _record(self, step: int, line: Mapping[str, float]) -> None:
        record = {"step": step, **{n: v if math.isfinite(v) else None for n, v in line.items()}}
        self._records.append(record)
        for name, value in line.items():
            if not math.isnan(value):  # NaN: not computed in this step
                self._tensorboard.add(step, summary.scalar(name, value))
        with writing(self._path), self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self._tensorboard.flush()

    def draw_curves(self) -> None:
        """Draws curves.png: everything logged by this process and earlier ones, over the steps."""
        if not self._active:
            return
        names = {name: None for record in self._records for name in record if not name.startswith(_NOT_DRAWN)}
        curves = {n: [(r["step"], r[n]) for r in self._records if r.get(n) is not None] for n in names}
        # Skip what is always 0, e.g. a loss with weight 0. Keep other constants, e.g. a learning rate.
        curves = {n: p for n, p in curves.items() if any(value for _, value in p)}
        if not curves:
            return
        with new_file(self._curves, replace=True) as partial:
            plots.training_curves(curves, self._changed).savefig(partial, format="png")

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Logs an image, uint8 [H, W, 3]."""
        if self._active:
            self._tensorboard.add(step, summary.image(name, image, dataformats="HWC"), last=True)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time spent in the `with` block from the speed."""
        began = time.perf_counter()
        yield
        self._last_time += time.perf_counter() - began

    def restart_clock(self) -> None:
        """Excludes the time since the last `write` (compilation) from the next speed."""
        self._last_time, self._wait = time.perf_counter(), 0.0

    def close(self) -> None:
        if self._active:
            self._tensorboard.close()


def _records(path: epath.Path) -> list[dict[str, float | None]]:
    """What earlier processes have logged.

    Raises:
      ValueError: the file holds something else. It is left as it is.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    records = [_record_of(line) for line in lines]
    if records and records[-1] is None:  # of a run that was killed while it wrote
        records.pop()
    if None in records:
        raise ValueError(
            f"{path}, line {records.index(None) + 1}: expected a step and its numbers, as it is logged; is the file of "
            "another program? Move it, or choose another workdir"
        )
    return records


def _record_of(line: bytes) -> dict[str, float | None] | None:
    """A line of the log; None if it is none."""
    try:
        record = json.loads(line)
        if not isinstance(record, dict) or type(record["step"]) is not int:
            return None
        values = {name: None if value is None else float(value) for name, value in record.items()}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return {name: value if value is None or math.isfinite(value) else None for name, value in values.items()} | {
        "step": record["step"]
    }


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
