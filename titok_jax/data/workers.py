"""The processes that prepare parts of batches for a loader: how much they read ahead, and what each does when it starts.

Nothing in them imports JAX, which would take about 140 MiB in each.
"""

import faulthandler
import importlib.abc
import multiprocessing
import os
import signal
import sys
import threading
from types import ModuleType

QUEUED = 1  # parts of each worker that wait in its queue


def parts_ahead(num_workers: int, num_threads: int) -> int:
    """How many parts of batches a loader reads ahead at most, in its workers and threads together."""
    in_threads = max(2, num_threads) if num_threads else 0  # each thread prepares one, and at least two are begun
    if not num_workers:
        return in_threads
    # The worker holds one more, which it puts into its queue; in the loader's process a thread takes one out of that
    # queue and puts it into another one.
    return num_workers * (in_threads + 1 + QUEUED + 1 + QUEUED)


def named(num_workers: int, num_threads: int) -> str:
    """Workers and threads as error messages name them."""
    threads = f"{num_threads} thread{'s' * (num_threads != 1)}"
    if not num_workers:
        return threads
    return f"1 worker with {threads}" if num_workers == 1 else f"{num_workers} workers with {threads} each"


def end_with_parent(worker: int, num_workers: int) -> None:
    """Ends a worker process when its parent has ended, however it did. Without this, Grain's workers would wait for ever.

    Nothing else ends it: a machine that is taken away sends SIGTERM to all processes, but a training needs its batches until
    all of its hosts have come to the step that they save.
    """
    del worker, num_workers
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1)  # of a training that makes no progress: where do its workers wait?

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _NoJax(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path=None, target: ModuleType | None = None) -> None:
        if name == "jax":
            raise ModuleNotFoundError("Grain is imported without JAX", name=name)


def import_grain_without_jax() -> None:
    """Imports Grain, which imports JAX if it can, for the functions for trees alone; it has its own of the same kind.

    A worker imports Grain before it runs any function of ours. Only the main module of the program comes first: there a
    program calls this if its `__name__` is "__mp_main__", the name that it has in a worker. Afterwards JAX can be imported.
    """
    from absl import logging

    hidden, verbosity = _NoJax(), logging.get_verbosity()
    sys.meta_path.insert(0, hidden)
    logging.set_verbosity(logging.ERROR)  # Grain warns that it cannot load JAX's profiler
    try:
        import grain  # noqa: F401
    finally:
        logging.set_verbosity(verbosity)
        sys.meta_path.remove(hidden)
