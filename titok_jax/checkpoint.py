"""Training checkpoints: the whole state and the configuration, written by Orbax in the background.

A checkpoint `<folder>/<step>` is complete or absent: Orbax writes beside it and renames. It can be restored on any mesh.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding

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
        self._manager = ocp.CheckpointManager(epath.Path(folder), options=options)

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

    def config(self, step: int) -> dict[str, Any]:
        """The configuration that a checkpoint was made with."""
        return self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]

    def restore(self, step: int, abstract: State, shardings: State) -> State:
        """The state of a checkpoint, read straight onto its shards.

        Args:
          abstract: shapes and dtypes; shardings: a NamedSharding for each, of any mesh.
        """

        def target(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        args = ocp.args.StandardRestore(jax.tree.map(target, abstract, shardings))
        return self._manager.restore(step, args=ocp.args.Composite(state=args))["state"]

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


def _nan(x: Any) -> bool:
    return isinstance(x, float) and math.isnan(x)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, Mapping):
        items = [_flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in tree.items()]
        return {name: value for item in items for name, value in item.items()}
    return {prefix: list(tree) if isinstance(tree, tuple) else tree}
