"""Long jobs in numbered pieces: each is a file that is complete or absent, so after any kill the same command makes the
missing ones only; several processes share the pieces. Imports no JAX until there are several."""

import contextlib
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from titok_jax.cli import new_file

_SETTINGS = "settings.json"


class Shards:
    """A folder of the pieces 0 .. count - 1 of one job, `00012.npz`, and the settings that they were made with.

    Attributes:
      folder: where they are; with several processes, one that all of them reach.
      count: how many pieces the whole job has.
      first: this is the process that does what is done once.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        settings: dict[str, Any],
        count: int,
        *,
        restart: bool = False,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Begins a job, or continues one.

        Args:
          settings: everything that decides what the pieces hold, as JSON has it.
          restart: pieces of other settings are removed, where otherwise they are an error.

        Raises:
          ValueError: the folder was begun with other settings; the message lists them.
          NotADirectoryError, FileExistsError: there is a file of that name, or a folder with something else in it.
        """
        self.folder, self.count = Path(folder), count
        self.first = process_index == 0
        self._index, self._processes = process_index, process_count
        path = self.folder / _SETTINGS
        settings = json.loads(json.dumps(settings, allow_nan=False))
        if self.first:
            if self.folder.exists() and not self.folder.is_dir():
                raise NotADirectoryError(f"{self.folder} is a file, expected a folder of unfinished work, or nothing")
            if restart and path.exists() and json.loads(path.read_text(encoding="utf-8")) != settings:
                self.remove()
            self.folder.mkdir(exist_ok=True)
            if not path.exists():
                foreign = sorted(child.name for child in self.folder.iterdir() if not child.name.startswith("."))
                if foreign:
                    raise FileExistsError(f"{self.folder} holds files of other origin ({foreign[0]}); choose another output")
                with new_file(path) as partial:
                    partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        self.wait("begun")
        if not path.exists():
            raise FileNotFoundError(
                f"{path}: process 0 wrote it, but process {process_index} does not see it; name an output in a folder that "
                "all processes share"
            )
        found = json.loads(path.read_text(encoding="utf-8"))
        keys = dict.fromkeys([*found, *settings])
        different = [
            f"{k}: {found.get(k)!r} there, {settings.get(k)!r} now" for k in keys if found.get(k) != settings.get(k)
        ]
        if different:
            raise ValueError(
                f"{self.folder} holds unfinished work with other settings ({'; '.join(different)}); finish it with those, "
                "or remove that folder"
            )

    def wait(self, event: str) -> None:
        """Until every process is here."""
        if self._processes > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(f"{self.folder.name} {event}")

    def mine(self) -> range:
        """The pieces that this process makes."""
        return range(self._index, self.count, self._processes)

    def missing(self) -> list[int]:
        """Those of them that are not there yet."""
        return [number for number in self.mine() if not self._path(number).exists()]

    def write(self, number: int, **arrays: np.ndarray) -> None:
        """Adds a piece. Returns when it is on the disk."""
        with new_file(self._path(number)) as partial, open(partial, "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())

    def read(self, number: int) -> dict[str, np.ndarray]:
        """A piece, as it was given to `write`.

        Raises:
          FileNotFoundError: it is not there.
          ValueError: it is damaged.
        """
        path = self._path(number)
        try:
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except (zipfile.BadZipFile, ValueError, EOFError) as error:
            raise ValueError(f"{path} is damaged ({error}); remove it, and the same command makes it again") from None

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """All pieces of all processes, in order; one is held at a time."""
        for number in range(self.count):
            yield self.read(number)

    def remove(self) -> None:
        """Removes the pieces and, if there was nothing else in it, the folder."""
        for pattern in ("[0-9]*.npz", ".*.partial-*", _SETTINGS):  # the settings last: without them nothing continues
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.npz"
