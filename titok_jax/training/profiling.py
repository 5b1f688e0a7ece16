"""A trace of some steps, for xprof and TensorBoard's profiler."""

import contextlib

import jax

from titok_jax.training.log_files import LogFolder


class Profile:
    """Traces the steps after step `start` up to step `stop`, on the first host, into `tensorboard/plugins/profile`. If the
    run continues after `start`, the trace begins with its first step."""

    def __init__(self, span: tuple[int, int] | None, folder: LogFolder | None):
        """
        Args:
          span: (start, stop), numbers of steps done; None for no trace.
          folder: None on all processes but the first, which trace nothing.
        """
        self._span = (0, 0) if span is None or folder is None else span
        self._folder, self._tracing = folder, False

    def step(self, done: int) -> contextlib.AbstractContextManager:
        """A block that runs the step after `done` steps."""
        start, stop = self._span
        if start <= done < stop and not self._tracing:
            jax.profiler.start_trace(str(self._folder.path / "tensorboard"))
            self._tracing = True
        return jax.profiler.StepTraceAnnotation("train", step_num=done + 1)

    def ends_after(self, done: int) -> bool:
        """Whether `close` must be called after `done` steps, when these have ended."""
        return self._tracing and done >= self._span[1]

    def close(self) -> None:
        """Writes the trace, if one is being made."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
            print(f"The trace is in {self._folder.workdir}/tensorboard/plugins/profile", flush=True)
