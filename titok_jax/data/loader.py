"""From a random-access source to batches, on every process of a run, in an order that only the seed and the step decide.

The order and the augmentation draws belong to the position in the stream of all examples, before it is cut into batches
and shared among processes. So a run on one process and a run on many see the same global batches, row by row (process p
holds the p-th block of rows), and a run that resumes at step s continues with the batch it would have seen: the position
of the data is the step, and no iterator state is ever saved.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, Self

import grain
import jax
import numpy as np
from absl import flags

from titok_jax.data.transforms import Example

Batch = dict[str, Any]  # the arrays of the examples, stacked: "image" uint8 [B, H, W, 3], "label" int32 [B], ...


class Loader(Iterator[Batch]):
    """Batches as numpy dicts. Close it, or use it in a `with` block: that ends its threads and worker processes."""

    def __init__(self, batches: grain.MapDataset, num_threads: int, num_workers: int):
        # One batch of read-ahead per thread, and never less than two.
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(2, num_threads) if num_threads else 0)
        dataset = batches.to_iter_dataset(options)
        if num_workers:
            # Grain's workers read absl flags, which no command here parses.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)
            dataset = dataset.mp_prefetch(options, worker_init_fn=_end_with_parent)
        self._iterator = iter(dataset)

    def __next__(self) -> Batch:
        return next(self._iterator)

    def close(self) -> None:
        """Ends threads and workers; the loader gives no more batches. Closing twice is allowed."""
        self._iterator.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _end_with_parent(worker: int, num_workers: int) -> None:
    """Lets a worker process end when the one that started it has been killed; Grain's own would wait for it for ever."""
    del worker, num_workers

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def make_loader(
    source,
    *,
    seed: int,
    global_batch_size: int,
    start_step: int = 0,
    train_transform: Callable[[Example, np.random.Generator], Example] | None = None,
    shuffle: bool = True,
    repeat: bool = True,
    num_workers: int = 0,
    num_threads: int = 2,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Loader:
    """Training batches.

    Args:
      source: anything with `__len__` and `__getitem__` that gives examples (see sources.py).
      seed: decides the order and the augmentation; not negative.
      global_batch_size: over all processes; batches here have `global_batch_size // process_count` rows.
      start_step: how many global batches to skip, at no cost.
      train_transform: augmentation, given a generator that belongs to the position in the stream.
      shuffle: a new permutation of all examples in every epoch; otherwise the order of the source.
      repeat: for ever, batches running on from one epoch into the next; otherwise one epoch without its last partial batch.
      num_workers: processes that prepare batches; 0 for none. The program then needs an `if __name__ == "__main__"` guard.
      num_threads: threads that prepare batches, in each worker or in this process.
      process_index, process_count: which of how many parts of a batch are given, see `sharding.batch_part`; by default one
        for each of this run's JAX processes.

    Raises:
      ValueError: the batch does not divide among processes, or the source is smaller than one global batch.
    """
    index, count, local_batch_size = _share(global_batch_size, process_index, process_count)
    if len(source) < global_batch_size:
        raise ValueError(
            f"the source has {len(source)} examples, fewer than one global batch of {global_batch_size}; "
            f"lower the global batch size to at most {len(source)}"
        )
    dataset = grain.MapDataset.source(source).seed(seed)
    if shuffle:
        dataset = dataset.shuffle()
    if repeat:
        dataset = dataset.repeat()
    else:
        dataset = dataset[: len(source) // global_batch_size * global_batch_size]
    if train_transform is not None:
        dataset = dataset.random_map(train_transform)
    # Processes take whole local batches in turn, so that the rows of a global batch keep their order.
    batches = dataset.batch(local_batch_size, drop_remainder=True)[index::count][start_step:]
    return Loader(batches, num_threads, num_workers)


def make_eval_loader(
    source,
    *,
    global_batch_size: int,
    transform: Callable[[Example], Example] | None = None,
    num_workers: int = 0,
    num_threads: int = 2,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Loader:
    """Every example once, in the order of the source.

    All batches are full and every process has equally many, so that one compiled step serves and no process waits
    for another: the last global batch is filled up with copies of the last example. Each batch has `valid`, bool [B], false
    for those copies.

    Arguments and errors as in `make_loader`; the source may be smaller than a batch, but not empty.
    """
    index, count, local_batch_size = _share(global_batch_size, process_index, process_count)
    if len(source) == 0:
        raise ValueError("the source has no examples; there is nothing to evaluate")
    dataset = grain.MapDataset.source(_FilledUp(source, global_batch_size))
    if transform is not None:
        dataset = dataset.map(transform)
    return Loader(dataset.batch(local_batch_size)[index::count], num_threads, num_workers)


class _FilledUp:
    """A source lengthened to a multiple of the batch size by repeating its last example, marked not `valid`."""

    def __init__(self, source, batch_size: int):
        self._source = source
        self._length = -(-len(source) // batch_size) * batch_size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        last = len(self._source) - 1
        return self._source[min(index, last)] | {"valid": np.bool_(index <= last)}


def _share(global_batch_size: int, process_index: int | None, process_count: int | None) -> tuple[int, int, int]:
    """This process's index, how many there are, and its number of rows in a global batch."""
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    if global_batch_size < 1 or global_batch_size % count:
        raise ValueError(
            f"global batch size {global_batch_size} does not divide among {count} processes; "
            f"make it a positive multiple of {count}"
        )
    return index, count, global_batch_size // count
