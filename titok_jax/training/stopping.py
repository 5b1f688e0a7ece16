"""What ends a run before its last step: SIGTERM, and steps that are not finite."""

import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


def check_finite(state: Any, step: int, limit: int) -> None:
    """Raises FloatingPointError if `limit` steps in a row were skipped (see `Task.step`)."""
    counts = jax.device_get(state["nonfinite"])
    if counts["longest"] >= limit:
        raise FloatingPointError(
            f"{counts['longest']} steps in a row, of the {step} until now, gave a loss or gradient norm that is not finite: "
            "stopped. They changed nothing, and the newest checkpoint is from before. Try a lower learning rate, or "
            "--config.compute_dtype=float32; look for broken data; or allow more of them by --config.max_nonfinite_steps"
        )


class StopSignal:
    """Watches for SIGTERM, which a preempted machine receives. The run then writes a checkpoint and ends."""

    def __init__(self):
        self._received = False
        self._former = None
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            self._former = signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, *_) -> None:
        self._received = True

    def agreed(self, step: int) -> bool:
        """Whether to stop after `step`. With several processes, JAX's preemption service chooses one step for all."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received

    def close(self) -> None:
        if self._former is not None:
            signal.signal(signal.SIGTERM, self._former)
