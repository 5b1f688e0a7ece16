"""Training checkpoints: the complete state and the configuration, written by Orbax in the background.

A checkpoint `<folder>/<step>` is either complete or absent. Orbax writes to a temporary folder and renames it. In a bucket,
it finally adds an object that marks the checkpoint as complete. Every process writes its own shards. A checkpoint can be
restored on any mesh and by any number of processes.
"""

import contextlib
import json
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath
from jax.experimental import multihost_utils

from titok_jax.runtime.paths import is_remote

State = Any

# TensorStore's ValueErrors contain these words if the storage fails, rather than the stored files being damaged.
_STORAGE_FAILS = (
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "RESOURCE_EXHAUSTED",
    "ABORTED",
)
# Orbax and etils reach a bucket through these modules. Their exceptions do not mean that a checkpoint is damaged.
_CLIENTS = ("aiohttp.", "gcsfs.", "google.api_core.", "google.auth.", "google.cloud.", "requests.", "urllib3.")

_CHECKSUMS = "checksums"  # the entry beside the configuration
_PARTS = {"state", "config", "_CHECKPOINT_METADATA"}  # every checkpoint has some of these, also a damaged one


class Checkpoints:
    """The checkpoints of one run. Call `close` or use a `with` block; both wait for the last write."""

    def __init__(self, folder: str | epath.Path, keep: int = 2):
        """
        Args:
          folder: absolute path; created if necessary.
          keep: number of the newest checkpoints to keep.

        Raises:
          OSError: if the checkpoints in the folder cannot be listed.
          FileExistsError: if a folder in it is named like a checkpoint and is none. Orbax would remove it.
        """
        # Removes incomplete checkpoints of a killed run. No other run writes here.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        self._folder = epath.Path(folder)
        try:
            if str(self._folder).startswith("gs://"):
                # Orbax makes the same request later, to read or remove checkpoints. A missing permission fails here instead.
                from google.cloud import storage

                storage.Client().get_bucket(str(self._folder).split("/")[2])
            foreign = self._foreign()
            self._manager = None if foreign else ocp.CheckpointManager(self._folder, options=options)
        except Exception as error:
            raise OSError(
                f"the checkpoints in {self._folder} cannot be listed ({_one_line(error)}). Is the storage reachable, with "
                "permission to read? Of a bucket that is storage.buckets.get too (docs/tpu.md). The same command tries again"
            ) from error

        if foreign:
            raise FileExistsError(
                f"{foreign} is named like a checkpoint, but is none, and older checkpoints are removed; move it away"
            )

    def _foreign(self) -> epath.Path | None:
        """A folder that is named like a checkpoint and holds other things."""
        for place in self._folder.iterdir() if self._folder.exists() else ():
            if place.name.isdigit() and place.is_dir():
                names = {path.name for path in place.iterdir()}
                if names and not names & _PARTS:
                    return place
        return None

    def latest(self) -> int | None:
        """The step of the newest checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: State, config: Mapping[str, Any]) -> None:
        """Writes a checkpoint in the background, after waiting for the previous one.

        Raises:
          OSError: if this checkpoint or the previous one cannot be written. Complete checkpoints are not changed.
          RuntimeError: if Orbax declines because there is a checkpoint of this or a later step.
        """
        stored = json.loads(json.dumps({**config, _CHECKSUMS: checksums(state)}))
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), config=ocp.args.JsonSave(stored))
        with self._writing():
            saved = step == self.latest() or self._manager.save(step, args=args)
        if not saved:
            raise RuntimeError(f"the checkpoint of step {step} was not written: a later one, {self.latest()}, exists")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns any error of writing into one line that also says which checkpoint is safe."""
        try:
            yield
        except Exception as error:
            kept = "complete ones are as they were"
            with contextlib.suppress(Exception):  # listing may fail too
                complete = ocp.path.step.checkpoint_steps(self._folder)
                kept = f"the newest complete one, of step {max(complete)}, is intact" if complete else "there is none yet"
            why = "may this run write in that bucket?" if is_remote(self._folder) else "is the disk full?"
            raise OSError(
                f"a checkpoint cannot be written to {self._folder} ({_one_line(error)}); {why} {kept}; "
                "the same command continues"
            ) from error

    def restore_newest(
        self, abstract: State, shardings: State, check: Callable[[int, dict[str, Any]], None]
    ) -> tuple[int, State] | None:
        """Restores the newest readable checkpoint directly onto its shards. Returns None if there are no checkpoints.

        Newer checkpoints that are damaged are reported and moved to the folder `damaged` beside the checkpoints. They are
        moved only after an older one has been read. If the storage fails, that is an error and nothing is moved.

        Args:
          abstract: shapes and dtypes.
          shardings: a NamedSharding for each array, on any mesh.
          check: called with the step and the configuration in the checkpoint; raises to reject it.

        Raises:
          ValueError: if there are checkpoints, but none of them can be read; or if one holds arrays of other shapes.
          OSError: if the storage fails.
        """
        target = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)
        as_json, as_state = ocp.JsonCheckpointHandler(), ocp.StandardCheckpointHandler()
        args = ocp.args.StandardRestore(target)
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            config, problem = self._read(step, "config", lambda path: as_json.restore(path, args=ocp.args.JsonRestore()))
            if not problem and not isinstance(config, dict):
                problem = f"its configuration is {type(config).__name__}, expected a JSON object"
            if not problem:
                sums = config.pop(_CHECKSUMS, None)  # older checkpoints have none
                check(step, config)
                stored, problem = self._read(step, "state", lambda path: as_state.metadata(path).tree)
            if not problem:
                self._check_shapes(step, stored, abstract)
                state, problem = self._read(step, "state", lambda path: as_state.restore(path, args=args))
            if not problem and sums is not None:
                wrong = [n for n, value in checksums(state).items() if not isinstance(sums, dict) or sums.get(n) != value]
                problem = f"{len(wrong)} arrays are not as they were saved, e.g. {wrong[0]}" if wrong else ""
            if not problem:
                self._put_aside(damaged)
                return step, state
            damaged[step] = problem
        if damaged:
            listed = "".join(f"\n  step {step}: {problem}" for step, problem in damaged.items())
            raise ValueError(f"none of the checkpoints in {self._folder} can be read:{listed}")
        return None

    def _check_shapes(self, step: int, stored: State, abstract: State) -> None:
        """Raises ValueError if the state of a checkpoint has other arrays than this run, as after a change of the model."""
        sizes = [
            {name: tuple(leaf.shape) for name, leaf in ocp.tree.to_flat_dict(tree, sep="/").items()}
            for tree in (stored, abstract)
        ]
        different = [n for n in dict.fromkeys([*sizes[0], *sizes[1]]) if sizes[0].get(n) != sizes[1].get(n)]
        if different:
            name = different[0]
            found, expected = (list(size[name]) if name in size else "absent" for size in sizes)
            raise ValueError(
                f"the checkpoint of step {step} in {self._folder} holds the state of another network or optimizer: "
                f"{len(different)} arrays differ, e.g. {name}: {found}, expected {expected}; such a change needs another "
                "workdir, where --config.init_from can start from the weights of this run"
            )

    def _read(self, step: int, item: str, read: Callable[[epath.Path], Any]) -> tuple[Any, str]:
        """Returns (the item, "") or (None, what is wrong with its files). All processes return the same case.

        Args:
          read: reads the item's folder by its handler, not by the manager. With the manager, processes that can read the
            item would wait for one that cannot.

        Raises:
          OSError: if the storage fails on this or another process.
        """
        found, error = None, None
        try:
            found = read(self._folder / str(step) / item)
        except Exception as caught:  # damaged files make the libraries raise anything
            error = caught
        fine, damaged, fails = range(3)
        outcome = fine if error is None else fails if _storage_fails(error) else damaged
        if jax.process_count() > 1:
            outcome = int(np.max(multihost_utils.process_allgather(np.int32(outcome))))
        problem = "another process cannot read it" if error is None else _one_line(error)
        if outcome == fails:
            raise OSError(
                f"the checkpoint of step {step} in {self._folder} cannot be read now ({problem}); nothing was changed. Is "
                "the storage reachable, with permission to read? The same command tries again"
            ) from error
        return (found, "") if outcome == fine else (None, problem)

    def _put_aside(self, damaged: Mapping[int, str]) -> None:
        """Moves damaged checkpoints {step: what is wrong} to the folder `damaged`."""
        if not damaged:
            return
        if jax.process_index() == 0:
            for step, problem in damaged.items():
                place = self._folder.parent / "damaged" / str(step)
                while place.exists() or place.with_name(place.name + ".txt").exists():
                    place = place.with_name(place.name + "_again")
                place.parent.mkdir(parents=True, exist_ok=True)
                # Write this file first, because a bucket cannot rename into an empty folder.
                place.with_name(place.name + ".txt").write_text(problem + "\n")
                (self._folder / str(step)).rename(place)
                print(f"warning: the checkpoint of step {step} cannot be read ({problem}); moved to {place}", flush=True)
        multihost_utils.sync_global_devices("moved")
        self._manager.reload()

    def close(self) -> None:
        """Waits until everything is written.

        Raises:
          OSError: if the last checkpoint cannot be written. Complete checkpoints are not changed.
        """
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def quiet_checkpointing() -> None:
    """Silences the storage libraries, so that a full disk ends a command with only the one line from `Checkpoints`.

    Without this, Orbax logs every file as information and every array that it could not write as an error. asyncio logs
    these errors again, and TensorStore complains that nobody waits for the rest. The errors are still raised.
    """
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    report = sys.unraisablehook

    def unraisable(found) -> None:
        if str(found.exc_value) != "Event loop is closed":
            report(found)

    sys.unraisablehook = unraisable


def _checksum(array: jax.Array) -> jax.Array:
    bits = array.astype(jnp.uint8) if array.dtype == bool else array
    bits = jax.lax.bitcast_convert_type(bits, jnp.dtype(f"uint{8 * min(bits.dtype.itemsize, 4)}")).astype(jnp.uint32)
    place = sum(jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * (2 * axis + 3) for axis in range(bits.ndim))
    return jnp.sum(bits * (2 * jnp.asarray(place, jnp.uint32) + 1), dtype=jnp.uint32)


# One program: the sums of several processes would otherwise meet in another order in each of them.
_checksums = jax.jit(lambda arrays: list(map(_checksum, arrays)))


def checksums(state: State) -> dict[str, int]:
    """A checksum of each array: its bits as whole numbers, weighted by their place and summed modulo 2^32.

    The arrays are summed where they are, and exactly, so the mesh makes no difference. (Orbax keeps no checksums of arrays:
    of 150 checkpoints with a changed file, 4 were restored with wrong numbers.)
    """
    named = ocp.tree.to_flat_dict(state, sep="/")
    return dict(zip(named, map(int, jax.device_get(_checksums(list(named.values())))), strict=True))


def config_changes(
    found: Mapping[str, Any], now: Mapping[str, Any], free: Iterable[str], *, later: Mapping[str, Any] | None = None
) -> list[str]:
    """Lists the fields in which two configurations differ, each with both values.

    Args:
      found: configuration of the checkpoint; now: configuration of this run.
      free: dotted names of the fields and sections that may differ.
      later: {dotted name: value} of fields that older checkpoints lack, with the value that was in effect without the field.
    """
    flat_found, flat_now = _flat(found), _flat(now)
    flat_found = {name: value for name, value in (later or {}).items() if name in flat_now} | flat_found
    different = []
    for name in sorted(flat_found.keys() | flat_now.keys()):
        a, b = flat_found.get(name, "absent"), flat_now.get(name, "absent")
        if a != b and not (_nan(a) and _nan(b)) and not any(name == f or name.startswith(f + ".") for f in free):
            different.append(f"{name}: {a!r} in the checkpoint, {b!r} now")
    return different


def _storage_fails(error: BaseException | None) -> bool:
    """Whether an error or one of its causes comes from the machine or its storage, so that the files may be intact."""
    while error is not None:
        if isinstance(error, OSError | MemoryError) or type(error).__module__.startswith(_CLIENTS):
            if not isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
                return True
        elif any(code in str(error) for code in _STORAGE_FAILS):
            return True
        error = error.__cause__ or error.__context__
    return False


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]


def _nan(x: Any) -> bool:
    return isinstance(x, float) and math.isnan(x)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, Mapping):
        items = [_flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in tree.items()]
        return {name: value for item in items for name, value in item.items()}
    return {prefix: list(tree) if isinstance(tree, tuple) else tree}
