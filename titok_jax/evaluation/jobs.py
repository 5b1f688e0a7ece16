"""Stores the pieces of an evaluation and the settings that its jobs share, and writes its result."""

import contextlib
import json
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from titok_jax import __version__
from titok_jax.evaluation import pieces
from titok_jax.runtime.capacity import check_batch
from titok_jax.runtime.locks import lock_run
from titok_jax.runtime.outputs import new_file
from titok_jax.runtime.paths import as_path
from titok_jax.runtime.sharding import round_up_batch_size
from titok_jax.runtime.shards import Shards


class Work:
    """The folder with the pieces of an evaluation, and the settings that all of its jobs share."""

    def __init__(
        self, folder: Path | epath.Path, *, batch_size: int, image_size: int, restart: bool = False, quiet: bool = False
    ):
        import jax

        self.folder, self.batch_size, self.image_size, self.quiet = folder, batch_size, image_size, quiet
        self._options = {"restart": restart, "process_index": jax.process_index(), "process_count": jax.process_count()}
        self.first = jax.process_index() == 0
        self.jobs: list[Shards] = []

    def job(self, name: str, length: int, settings: dict[str, Any]) -> Shards:
        """Begins or continues a job and returns its pieces."""
        size = round_up_batch_size(self.batch_size, length)
        check_batch(size, self.image_size, f"--batch-size {self.batch_size}")
        shards = Shards(self.folder / name, settings, length, size, **self._options)
        self.jobs.append(shards)
        return shards

    def make(self, shards: Shards, make_pieces: pieces.Pieces) -> None:
        """Makes the missing pieces of a job."""
        shards.make(make_pieces, name=shards.folder.name, quiet=self.quiet)

    def remove(self) -> None:
        """Removes the pieces of all jobs after every process has finished reading them."""
        for shards in self.jobs:
            shards.wait("used")
        if self.first:
            for shards in self.jobs:
                shards.remove()


def versions() -> dict[str, str]:
    """Versions of the packages that can affect the metrics, and the kind of device."""
    import flax
    import jax
    import jaxlib

    return {
        "titok_jax": __version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "flax": flax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
    }


def write_json(path: str, result: dict[str, Any], *, replace: bool) -> None:
    with new_file(path, replace=replace) as partial:
        partial.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def work_folder(output: str | None) -> Iterator[Path | epath.Path]:
    """Yields the folder for the pieces of an evaluation that writes this file. No other run works there.

    Raises:
      ValueError: another run works there; or there are several processes and no output.
    """
    import jax

    if output:
        several = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        with lock_run(f"{output}.shards", temporary=True, **several):
            yield as_path(f"{output}.shards")
        return
    if jax.process_count() > 1:
        raise ValueError(
            "several processes need --json FILE, in a folder that all of them reach: they share their work there"
        )
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "shards"
