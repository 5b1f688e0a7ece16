"""Loaders that turn a random-access source into batches, on every process of a run. Only seed and step decide the order.

The order and the random numbers of the augmentation depend on the position in the stream of all examples, before the stream
is split into batches and processes. So a run on one process and a run on many see the same global batches, row by row
(a process holds some blocks of the rows). A run that resumes at step s continues with the batch it would have seen: the step
is the position in the data, and no iterator state is saved.

Batches are put together last. Workers and threads read parts of batches ahead. The size of the parts keeps what is read
ahead within a number of examples, whatever the size of the batch and the number of workers and threads.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import grain
import numpy as np
from absl import flags

from titok_jax.data import workers
from titok_jax.data.transforms import REPLACED, Example

Batch = dict[str, Any]  # the arrays of the examples, stacked: "image" uint8 [B, H, W, 3], "label" int32 [B], ...


class Loader(Iterator[Batch]):
    """Iterator over batches of numpy arrays. Close it, or use it in a `with` block, to end its threads and processes.

    Args:
      examples: all examples of this process, in order, with the global batches one after another.
      start_step: the batch to begin with.
      read_ahead: how many examples may be read ahead, over the batch that is put together.

    Raises:
      ValueError: `read_ahead` is less than one example for each part that is read ahead.
    """

    def __init__(self, examples: "_Blocks", start_step: int, read_ahead: int, num_threads: int, num_workers: int):
        self._rows, self._num_parts = examples.rows, 1
        if ahead := workers.parts_ahead(num_workers, num_threads):
            if read_ahead < ahead:
                readers = workers.named(num_workers, num_threads)
                raise ValueError(f"read_ahead is {read_ahead}, expected at least {ahead} examples for {readers}")
            self._num_parts = -(-self._rows // min(self._rows, read_ahead // ahead))
        parts = _Parts(examples, self._num_parts)[start_step * self._num_parts :]
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(2, num_threads) if num_threads else 0)
        dataset = parts.to_iter_dataset(options)
        if num_workers:
            # Grain's workers read absl flags, but our commands do not parse them.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=workers.QUEUED)
            dataset = dataset.mp_prefetch(options, worker_init_fn=workers.end_with_parent)
        self._iterator, self._replaced = iter(dataset), []

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        if self._num_parts > 1:
            batch = self._joined(batch)
        self._replaced += [index for index in batch.pop(REPLACED, np.zeros(0)).tolist() if index >= 0]
        return batch

    def _joined(self, first: Batch) -> Batch:
        """The batch that begins with the part `first`. The memory of each part is free as soon as its rows are copied."""
        batch = {name: np.empty((self._rows, *array.shape[1:]), array.dtype) for name, array in first.items()}
        row = 0
        for part in itertools.chain([first], itertools.islice(self._iterator, self._num_parts - 1)):
            _check_alike(batch, part, axis=1)
            end = row + len(next(iter(part.values())))
            for name, array in batch.items():
                array[row:end] = part[name]
            row = end
        return batch

    def take_replaced(self) -> list[int]:
        """The examples that could not be decoded and were replaced in the batches since the last call, by their indices in
        the source (`checked.CheckedSource`). Of several processes, each knows those of its own rows."""
        taken, self._replaced = self._replaced, []
        return taken

    def close(self) -> None:
        """Ends threads and workers. The loader then yields no more batches. Closing twice is allowed."""
        self._iterator.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


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
    read_ahead: int = 1000,
    blocks: Sequence[int] | None = None,
    num_blocks: int | None = None,
) -> Loader:
    """Makes a loader of training batches.

    Args:
      source: an object with `__len__` and `__getitem__` that returns examples (see sources.py).
      seed: decides the order and the augmentation; not negative.
      global_batch_size: rows over all processes.
      start_step: number of global batches to skip, at no cost.
      train_transform: the augmentation. It gets a random generator that depends on the position in the stream.
      shuffle: use a new permutation of all examples in every epoch. Otherwise keep the order of the source.
      repeat: continue for ever, with batches that may span two epochs. Otherwise stop after one epoch, without its last
        partial batch.
      num_workers: processes that prepare batches; 0 for none. The program then needs an `if __name__ == "__main__"` guard.
      num_threads: threads that prepare batches, in each worker or in this process.
      read_ahead: how many examples all workers and threads together may read ahead, over the batch that is put together.
        Each of the parts that they hold (`workers.parts_ahead`) has an equal share of it, and at most a whole batch.
      blocks, num_blocks: the blocks of rows of each batch to load, in increasing order, and the number of equal blocks in a
        batch (see `sharding.batch_part`). By default one block for each of this run's JAX processes, in their order.

    Raises:
      ValueError: the batch does not divide into blocks, the source is smaller than one global batch, or `read_ahead` is less
        than one example for each of these parts.
    """
    blocks, num_blocks = _own_blocks(global_batch_size, blocks, num_blocks)
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
    own = _Blocks(dataset, global_batch_size // num_blocks, blocks, num_blocks)
    return Loader(own, start_step, read_ahead, num_threads, num_workers)


def make_eval_loader(
    source,
    *,
    global_batch_size: int,
    transform: Callable[[Example], Example] | None = None,
    num_workers: int = 0,
    num_threads: int = 2,
    read_ahead: int = 1000,
    blocks: Sequence[int] | None = None,
    num_blocks: int | None = None,
) -> Loader:
    """Makes a loader that yields every example once, in the order of the source.

    All batches are full, and every process gets the same number, so one compiled step is enough and no process waits for
    another. The last global batch is filled with copies of the last example. Each batch has `valid`, bool [B], which is
    False for these copies.

    Arguments and errors are those of `make_loader`. The source may be smaller than a batch, but not empty.
    """
    blocks, num_blocks = _own_blocks(global_batch_size, blocks, num_blocks)
    if len(source) == 0:
        raise ValueError("the source has no examples; there is nothing to evaluate")
    dataset = grain.MapDataset.source(_FilledUp(source, global_batch_size))
    if transform is not None:
        dataset = dataset.map(transform)
    own = _Blocks(dataset, global_batch_size // num_blocks, blocks, num_blocks)
    return Loader(own, 0, read_ahead, num_threads, num_workers)


class _FilledUp:
    """A source extended to a multiple of the batch size by repeating its last example; the copies are not `valid`."""

    def __init__(self, source, batch_size: int):
        self._source = source
        self._length = -(-len(source) // batch_size) * batch_size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        last = len(self._source) - 1
        return self._source[min(index, last)] | {"valid": np.bool_(index <= last)}


class _Blocks(grain.MapDataset):
    """The examples of some blocks of each global batch, in order.

    Attributes:
      rows: how many of each batch.
    """

    def __init__(self, examples: grain.MapDataset, block_size: int, blocks: Sequence[int], num_blocks: int):
        super().__init__(examples)
        self._block_size, self._blocks, self._num_blocks = block_size, tuple(blocks), num_blocks
        self.rows = block_size * len(self._blocks)

    def __len__(self) -> int:
        return len(self._parent) // (self._block_size * self._num_blocks) * self.rows

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        block, row = divmod(index, self._block_size)
        batch, block = divmod(block, len(self._blocks))
        return self._parent[(batch * self._num_blocks + self._blocks[block]) * self._block_size + row]


class _Parts(grain.MapDataset):
    """The batches in parts of nearly the same size, in order; each part has some examples of one batch, stacked."""

    def __init__(self, examples: _Blocks, num_parts: int):
        super().__init__(examples)
        self._rows, self._num_parts = examples.rows, num_parts

    def __len__(self) -> int:
        return len(self._parent) // self._rows * self._num_parts

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        batch, part = divmod(index, self._num_parts)
        begin, end = (batch * self._rows + self._rows * i // self._num_parts for i in (part, part + 1))
        examples = [self._parent[i] for i in range(begin, end)]
        for example in examples[1:]:
            _check_alike(examples[0], example)
        return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def _check_alike(first: dict[str, Any], other: dict[str, Any], axis: int = 0) -> None:
    """Raises ValueError if two examples, or two batches from `axis` on, cannot be in one batch."""
    if first.keys() != other.keys():
        raise ValueError(f"the examples of a batch differ: one has {sorted(first)}, another {sorted(other)}")
    for name, array in first.items():
        shapes = [list(np.shape(found)[axis:]) for found in (array, other[name])]
        if shapes[0] != shapes[1]:
            raise ValueError(f"the examples of a batch differ: {name} of shapes {shapes[0]} and {shapes[1]}")


def _own_blocks(global_batch_size: int, blocks: Sequence[int] | None, num_blocks: int | None) -> tuple[Sequence[int], int]:
    """The blocks of this process in a global batch, and the number of all blocks."""
    if blocks is None or num_blocks is None:
        import jax  # workers import this module, and no JAX

        blocks = (jax.process_index(),) if blocks is None else blocks
        num_blocks = jax.process_count() if num_blocks is None else num_blocks
    if global_batch_size < 1 or global_batch_size % num_blocks:
        raise ValueError(
            f"global batch size {global_batch_size} does not divide into {num_blocks} blocks for the devices or processes; "
            f"make it a positive multiple of {num_blocks}"
        )
    return blocks, num_blocks
