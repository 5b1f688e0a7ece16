"""Counts and names the images of a training that could not be decoded, and ends a run that has too many of them."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from titok_jax.data.checked import CheckedSource, most_replaced

_NAMED = 20  # in the error that ends a run; the log has all


class ReplacedImages:
    """The images that were replaced by the next ones since this process began (`CheckedSource`), of all processes."""

    def __init__(self, source: CheckedSource, part: int):
        """
        Args:
          part: the first block of each batch that this process reads (`sharding.batch_part`). It stands
            for all of them.
        """
        self._source, self._part = source, part
        self._count, self._reasons = 0, {}  # how often an image was replaced; index -> why

    def check(self, new: Sequence[int], examples: int) -> None:
        """Adds images, and prints those that are not named yet. Every process calls it after the same steps.

        Args:
          new: the images replaced since the last call, in this process's part of the batches (`Loader.take_replaced`).
          examples: the examples in all batches since this process began.

        Raises:
          ValueError: more than `most_replaced` of the examples; the message names the images.
        """
        found = _of_all_processes(new, self._part)
        if not found:
            return
        self._count += len(found)
        fresh = [index for index in dict.fromkeys(found) if index not in self._reasons]
        self._reasons |= {index: self._source.damage(index) for index in fresh}
        if jax.process_index() == 0 and fresh:
            print(
                f"WARNING: {self._count:,} of {examples:,} images could not be decoded, and the next one took the place of "
                "each. Found now:\n" + "\n".join(f"  {self._reasons[index]}" for index in fresh),
                flush=True,
            )
        if self._count > most_replaced(examples):
            reasons = list(self._reasons.values())
            more = f"\n  and {len(reasons) - _NAMED:,} more" if len(reasons) > _NAMED else ""
            raise ValueError(
                f"{self._count:,} of the {examples:,} images since the start could not be decoded, at most "
                f"{most_replaced(examples):,} may be (1 %, at least 10): stopped. Repair or remove these:\n"
                + "\n".join(f"  {reason}" for reason in reasons[:_NAMED])
                + more
            )


def _of_all_processes(new: Sequence[int], part: int) -> list[int]:
    """Joins what the processes have found. Of several that read the same part of the batches, one counts."""
    if jax.process_count() == 1:
        return list(new)
    counts = multihost_utils.process_allgather(np.array([part, len(new)], np.int32))  # [processes, 2]
    if not counts[:, 1].any():
        return []
    padded = np.full(counts[:, 1].max(), -1, np.int32)
    padded[: len(new)] = new
    parts = {int(number): row for (number, _), row in zip(counts, multihost_utils.process_allgather(padded), strict=True)}
    return [int(index) for number in sorted(parts) for index in parts[number] if index >= 0]
