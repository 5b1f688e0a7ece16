"""Long jobs that are split into numbered pieces. Each piece is a file that is complete or absent.

After an interruption, the same command makes only the missing pieces. Several processes share the pieces. JAX is imported
only if there are several.
"""

import contextlib
import json
import math
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from titok_jax.runtime.npz import NpzFile
from titok_jax.runtime.outputs import new_file
from titok_jax.runtime.paths import as_path

_SETTINGS = "settings.json"
_JOB = "job"  # the id of a job, in its settings and in each of its pieces
# The pieces of a job, and what killed writers left of pieces and settings.
_PIECES = re.compile(r"\d{5,}\.npz|\.(\d{5,}|settings)\.partial-[0-9a-f]{16}\.(npz|json)")


class Shards:
    """A folder with the pieces of one job, such as `00012.npz`, and the settings that they were made with.

    The folder is to be locked (`locks.lock_run`) as long as a job works there. Where nothing can be locked, pieces of two
    jobs are still told apart: each has the id of its job.

    Attributes:
      folder: the folder. All processes must reach it, for example in a bucket.
      length: number of items (images) in the whole job.
      size: items per piece; the last piece may have fewer.
      count: number of pieces in the whole job.
      first: whether this is process 0, which does everything that is done once.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        settings: dict[str, Any],
        length: int,
        size: int,
        *,
        restart: bool = False,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Begins or continues a job.

        Args:
          settings: all settings that the contents of the pieces depend on, as JSON values; length and size are added.
          restart: remove pieces that were made with other settings. Otherwise they are an error.

        Raises:
          ValueError: there are no items; or the folder was begun with other settings, which the message lists.
          NotADirectoryError, FileExistsError: there is a file of that name, or a folder with other files. They stay.
        """
        if min(length, size) < 1:
            raise ValueError(f"{folder}: {length} items in pieces of {size}, expected at least 1: there is nothing to make")
        self.folder, self.length, self.size, self.count = as_path(folder), length, size, math.ceil(length / size)
        self.first = process_index == 0
        self._index, self._processes = process_index, process_count
        settings = json.loads(json.dumps({"num": length, "batch_size": size} | settings, allow_nan=False))
        if self.first:
            self._begin(settings, restart)
        self.wait("begun")
        found = self._found()
        if found is None:
            raise FileNotFoundError(
                f"{self.folder / _SETTINGS}: process 0 wrote it, but process {process_index} does not see it; name an "
                "output in a folder that all processes share"
            )
        self._job = found.pop(_JOB)
        keys = dict.fromkeys([*found, *settings])
        different = [
            f"{k}: {found.get(k)!r} there, {settings.get(k)!r} now" for k in keys if found.get(k) != settings.get(k)
        ]
        if different:
            raise ValueError(
                f"{self.folder} holds unfinished work with other settings ({'; '.join(different)}); finish it with those, "
                "or remove that folder"
            )

    def _begin(self, settings: dict[str, Any], restart: bool) -> None:
        """Makes the folder of a new job; leaves that of one that is to go on as it is."""
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder} is a file, expected a folder of unfinished work, or nothing")
        found = self._found()
        if found is not None and not (restart and {**found, _JOB: ""} != {**settings, _JOB: ""}):
            return
        for name in self._names():
            ours = found is not None and (name == _SETTINGS or _PIECES.fullmatch(name))
            if not ours and not name.startswith("."):
                raise FileExistsError(f"{self.folder} holds files of other origin ({name}); choose another output")
        if found is not None:
            self.remove()
        self.folder.mkdir(parents=True, exist_ok=True)
        with new_file(self.folder / _SETTINGS, replace=False) as partial:
            partial.write_text(json.dumps({_JOB: uuid.uuid4().hex, **settings}, indent=2) + "\n", encoding="utf-8")

    def _found(self) -> dict[str, Any] | None:
        """The settings that the folder holds, with the id of its job. None if it has none, or such of other origin."""
        try:
            found = json.loads((self.folder / _SETTINGS).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError, RecursionError):  # the last: nested 1,000 deep
            return None
        ours = isinstance(found, dict) and re.fullmatch("[0-9a-f]{32}", str(found.get(_JOB)))
        return found if ours else None

    def _names(self) -> list[str]:
        there = self.folder.iterdir() if self.folder.exists() else ()  # a bucket has no empty folders
        return sorted(child.name for child in there)

    def wait(self, event: str) -> None:
        """Waits until every process has called this."""
        if self._processes > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(f"{self.folder.name} {event}")

    def mine(self) -> range:
        """The pieces that this process makes."""
        return range(self._index, self.count, self._processes)

    def items(self, number: int) -> slice:
        """The items of a piece."""
        return slice(number * self.size, min((number + 1) * self.size, self.length))

    def missing(self) -> list[int]:
        """The pieces of this process that do not exist yet."""
        return [number for number in self.mine() if not self._path(number).exists()]

    def make(
        self,
        pieces: Callable[[list[int]], Iterable[dict[str, np.ndarray]]],
        *,
        unit: str = "image",
        name: str | None = None,
        quiet: bool = False,
    ) -> str:
        """Makes the missing pieces of this process, with a progress bar, and waits for the other processes.

        Args:
          pieces: (numbers of pieces) -> their arrays, in this order, one at a time.
          unit: name of an item.
          name: label of the bar.
          quiet: show no bar.

        Returns:
          A sentence about what was made and how fast.
        """

        def items(numbers):
            return sum(self.items(number).stop - self.items(number).start for number in numbers)

        missing = self.missing()
        num, total = items(missing), items(self.mine())
        start, first = time.perf_counter(), None
        with tqdm(total=total, initial=total - num, unit=unit, desc=name, disable=quiet or not self.first) as bar:
            for number, arrays in zip(missing, pieces(missing), strict=True):
                self.write(number, **arrays)
                bar.update(items([number]))
                first = first or (items([number]), time.perf_counter())
        now = time.perf_counter()
        self.wait("made")
        if not missing:
            return f"all {total} {unit}s were there"
        speed = f"{num / (now - start):.1f} {unit}s/s with compilation"
        if first[0] < num:
            speed += f", {(num - first[0]) / (now - first[1]):.1f} {unit}s/s after the first batch"
        return f"{num} {unit}s in {now - start:.1f} s ({speed})"

    def write(self, number: int, **arrays: np.ndarray) -> None:
        """Writes a piece. Returns when it is on the disk."""
        with new_file(self._path(number), replace=True) as partial, open(partial, "wb") as file:
            np.savez(file, **arrays, **{_JOB: np.array(self._job)})
            file.flush()
            os.fsync(file.fileno())

    def read(self, number: int) -> dict[str, np.ndarray]:
        """Reads the arrays of a piece.

        Raises:
          FileNotFoundError: the piece does not exist.
          ValueError: the piece is damaged, or of another job.
        """
        path = self._path(number)
        try:
            with NpzFile(path) as file:
                arrays = {name: file.read(name, most=sys.maxsize) for name in file.names}
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); remove it, and the same command makes it again") from None
        if str(arrays.pop(_JOB, None)) != self._job:
            raise ValueError(f"{path} was made by another run; remove it, and the same command makes it again")
        return arrays

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Yields the pieces of all processes, in order. Only one is in memory at a time."""
        for number in range(self.count):
            yield self.read(number)

    def remove(self) -> None:
        """Removes the pieces, and the folder if it is then empty."""
        for name in filter(_PIECES.fullmatch, self._names()):
            (self.folder / name).unlink(missing_ok=True)
        (self.folder / _SETTINGS).unlink(missing_ok=True)  # last: a job without them cannot be continued
        with contextlib.suppress(OSError, ValueError):  # etils raises ValueError
            self.folder.rmdir()

    def _path(self, number: int) -> Path | epath.Path:
        return self.folder / f"{number:05d}.npz"
