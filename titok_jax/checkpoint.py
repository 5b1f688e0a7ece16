"""Training checkpoints: the whole state and the configuration, written by Orbax in the background.

A checkpoint `<folder>/<step>` is complete or absent: Orbax writes beside it and renames. It can be restored on any mesh.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

State = Any


class Checkpoints:
    """The checkpoints of one run. Close it, or use it in a `with` block: that waits for the last write."""

    def __init__(self, folder: str | epath.Path, keep: int = 2):
        """
        Args:
          folder: absolute; made if need be.
          keep: how many of the newest are kept.
        """
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._folder = epath.Path(folder)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def latest(self) -> int | None:
        """The step of the newest checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: State, config: Mapping[str, Any]) -> None:
        """Writes a checkpoint in the background; waits for the one before.

        Raises:
          RuntimeError: Orbax declined (there is one of this or a later step).
        """
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), config=ocp.args.JsonSave(json.loads(json.dumps(config)))
        )
        if step != self.latest() and not self._manager.save(step, args=args):
            raise RuntimeError(f"the checkpoint of step {step} was not written: a later one, {self.latest()}, exists")

    def restore_newest(
        self, abstract: State, shardings: State, check: Callable[[dict[str, Any]], None]
    ) -> tuple[int, State] | None:
        """The newest checkpoint that can be read, straight onto its shards, or None if there is none at all.

        A newer one that is damaged is reported and, once an older one has been read, moved out of the way, into the folder
        `damaged` beside the checkpoints.

        Args:
          abstract: shapes and dtypes; shardings: a NamedSharding for each, of any mesh.
          check: is given the configuration that the checkpoint was made with; raises to refuse.

        Raises:
          ValueError: there are checkpoints, but none of them can be read.
        """
        target = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                config = self._read(step, "config", ocp.args.JsonRestore())
            except Exception as error:  # whatever a damaged file makes the libraries below raise
                damaged[step] = _one_line(error)
                continue
            check(config)
            try:
                state = self._read(step, "state", ocp.args.StandardRestore(target))
            except Exception as error:
                damaged[step] = _one_line(error)
                continue
            for bad, problem in damaged.items():
                place = self._folder.parent / "damaged" / str(bad)
                while place.exists():
                    place = place.with_name(place.name + "_again")
                print(f"warning: the checkpoint of step {bad} cannot be read ({problem}); moved to {place}", flush=True)
                if jax.process_index() == 0:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    (self._folder / str(bad)).rename(place)
            if damaged:
                self._manager.reload()
            return step, state
        if damaged:
            listed = "".join(f"\n  step {step}: {problem}" for step, problem in damaged.items())
            raise ValueError(f"none of the checkpoints in {self._folder} can be read:{listed}")
        return None

    def _read(self, step: int, item: str, args: Any) -> Any:
        return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def check_config(found: Mapping[str, Any], now: Mapping[str, Any], free: Iterable[str], where: str) -> None:
    """Refuses to continue a run with another configuration.

    Args:
      found: of the checkpoint; now: of this run.
      free: dotted names of the fields (and sections) that may differ.

    Raises:
      ValueError: listing every other field that differs.
    """
    flat_found, flat_now = _flat(found), _flat(now)
    different = []
    for name in sorted(flat_found.keys() | flat_now.keys()):
        a, b = flat_found.get(name, "absent"), flat_now.get(name, "absent")
        if a != b and not (_nan(a) and _nan(b)) and not any(name == f or name.startswith(f + ".") for f in free):
            different.append(f"  {name}: {a!r} in the checkpoint, {b!r} now")
    if different:
        raise ValueError(
            f"the configuration does not fit the checkpoint in {where}:\n"
            + "\n".join(different)
            + "\nUse the former values, or another workdir for a new run."
        )


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]


def _nan(x: Any) -> bool:
    return isinstance(x, float) and math.isnan(x)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, Mapping):
        items = [_flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in tree.items()]
        return {name: value for item in items for name, value in item.items()}
    return {prefix: list(tree) if isinstance(tree, tuple) else tree}
