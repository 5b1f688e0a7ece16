"""Writes the metrics of a training to the terminal and to `metrics.jsonl`, `curves.png`, `log.txt` and TensorBoard in the
workdir."""

import io
import json
import math
import sys
import threading
import time
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from tensorboardX import summary

from titok_jax.pictures import plots
from titok_jax.runtime.outputs import new_file
from titok_jax.runtime.paths import writing
from titok_jax.training.log_files import EventFiles, LogFolder
from titok_jax.training.telemetry import duration

# These have no useful curve, or too many: the step axis itself, times, values that the configuration fixes, norms by group.
_NOT_DRAWN = (
    *("step", "seconds_left", "seconds_per_step/p50", "seconds_per_step/max", "data_wait", "run_seconds", "unix_time"),
    *("time/compile", "time/checkpoint", "time/evaluation", "time/restart", "memory_gib", "memory_limit_gib"),
    *("discriminator_factor", "d_weight", "grad_norm/", "disc_grad_norm/"),
)


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
        changed: Sequence[int] = (),
    ):
        """
        Args:
          folder: where to write; None on all processes but the first.
          first_step: the step at which this process starts. Later entries of an earlier process are dropped.
          changed: steps after which the configuration or the data changed; a line in the curves.
        """
        self._active, self._num_steps, self._changed = folder is not None, num_steps, list(changed)
        if folder is None:
            return
        self.folder = folder.path
        self._path, self._curves = self.folder / "metrics.jsonl", self.folder / "curves.png"
        self._records = [record for record in _records(folder.workdir / self._path.name) if record["step"] <= first_step]
        with new_file(self._path, replace=True) as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in self._records))
        self._tensorboard = EventFiles(self.folder / "tensorboard", first_step + 1)

    @property
    def former(self) -> dict[str, float]:
        """The last line before this process; empty if there is none, or on other processes."""
        known = (record for record in reversed(self._records) if record.get("run_seconds")) if self._active else ()
        return next(iter(known), {})

    def write(
        self, step: int, metrics: Mapping[str, float], *, shown: str, figures: Mapping[str, float], slowest: str = ""
    ) -> None:
        """Logs scalars after `step` updates. The terminal shows metric `shown` first.

        Args:
          figures: those of `Telemetry.line`.
          slowest: the host that waits longest for its data; "" if there is one.
        """
        if not self._active:
            return
        line = {name: float(value) for name, value in metrics.items()}
        parts = [
            f"step {step}/{self._num_steps}",
            f"{shown} {line[shown]:.4f}",
            f"lr {line.get('lr', 0.0):.2e}",
            f"{figures.get('images_per_second', math.nan):.0f} images/s",
            *([f"MFU {100 * figures['mfu']:.0f} %"] if "mfu" in figures else []),
            f"data wait {100 * figures.get('data_wait', math.nan):.0f} %"
            + (f" (most: {100 * figures['data_wait_max']:.0f} %, {slowest})" if slowest else ""),
            *([f"memory {figures['memory_peak_gib']:.1f} GiB"] if "memory_peak_gib" in figures else []),
            f"left {duration(figures.get('seconds_left', 0))}",
        ]
        print("  ".join(parts), flush=True)
        self._record(step, line | figures)

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
