"""The examples of a source, checked against what a model takes. Others take the place of images that cannot be decoded."""

import contextlib
import dataclasses
import time
from typing import Any

import numpy as np

from titok_jax.data.contents import source_contents
from titok_jax.data.transforms import REPLACED, Example, Undecodable
from titok_jax.runtime.messages import escaped

# How many seconds pass before an example is read again whose storage failed. After the last try the run ends.
PAUSES = (1, 3, 10, 30)
_SAY_EVERY = 10  # seconds; every thread of a loader meets the same failure


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a model takes; None for what it does not read.

    Attributes:
      num_classes: labels are 0 .. num_classes - 1.
      num_tokens, codebook_size: number of tokens of an example, which are 0 .. codebook_size - 1.
    """

    num_classes: int | None = None
    num_tokens: int | None = None
    codebook_size: int | None = None


def most_replaced(num: int) -> int:
    """How many of `num` examples may be replaced: 1 %, but at least 10, so that a few at the start end no run."""
    return max(10, num // 100)


class CheckedSource:
    """A source whose examples are checked one by one when they are read. Only the first wrong one is reported.

    Args:
      replace: the next example takes the place of one that cannot be decoded, which it names by its entry REPLACED. Which
        one that is depends on the files only.

    A read that the storage refuses (OSError) is tried again after each of `PAUSES`, with a message.

    Raises on reading:
      OSError: the storage refuses it each time; the message names the file.
      ValueError: a label or token out of range, or another number of tokens; the message has the value, what is allowed, and
        the record with its file.
      Undecodable: an example that cannot be decoded; with `replace`, only if there are more than `most_replaced` in a row.
    """

    def __init__(self, source: Any, limits: Limits, *, replace: bool = False):
        self._source, self._limits, self._replace, self._said = source, limits, replace, -np.inf

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, indexed by label; empty if the source does not know them."""
        return list(getattr(self._source, "class_names", []))

    def __len__(self) -> int:
        return len(self._source)

    def contents(self) -> dict[str, Any]:
        """See `contents.source_contents`."""
        return source_contents(self._source)

    def __getitem__(self, index: int) -> Example:
        if not self._replace:
            return self._checked(index)
        reason, row = None, min(most_replaced(len(self)) + 1, len(self))
        for place in range(index, index + row):
            try:
                example = self._checked(place % len(self))
            except Undecodable as error:
                reason = reason or str(error)
            else:
                return example | {REPLACED: np.int64(-1 if reason is None else index)}
        raise Undecodable(f"{row:,} examples in a row cannot be decoded, the first: {reason}")

    def _checked(self, index: int) -> Example:
        example, limits = self._read(index), self._limits
        label, tokens = int(example["label"]), example.get("tokens")
        if limits.num_classes is not None and not 0 <= label < limits.num_classes:
            hint = "; are the labels counted from 1?" if label == limits.num_classes else ""
            raise ValueError(f"{self.where(index)}: label {label}, expected 0 to {limits.num_classes - 1}{hint}")
        if tokens is not None and limits.num_tokens is not None:
            if tokens.shape != (limits.num_tokens,):
                raise ValueError(f"{self.where(index)}: {tokens.size} tokens, expected {limits.num_tokens}")
            wrong = tokens[(tokens < 0) | (tokens >= limits.codebook_size)]
            if wrong.size:
                raise ValueError(f"{self.where(index)}: token {wrong[0]}, expected 0 to {limits.codebook_size - 1}")
        return example

    def _read(self, index: int) -> Example:
        for pause in PAUSES:
            try:
                return self._source[index]
            except OSError as error:
                if time.monotonic() - self._said > _SAY_EVERY:
                    self._said = time.monotonic()
                    failure = escaped(self._failure(index, error))
                    print(f"WARNING: the data cannot be read now, trying again in {pause} s: {failure}", flush=True)
                time.sleep(pause)
        try:
            return self._source[index]
        except OSError as error:
            raise OSError(
                f"the data cannot be read, also not at {len(PAUSES)} more tries in {sum(PAUSES)} s: "
                f"{self._failure(index, error)}. Is the disk, the mount or the bucket still there?"
            ) from error

    def _failure(self, index: int, error: OSError) -> str:
        """What failed, with the file."""
        named = error.filename is not None or error.errno is None  # without a number it is of our own or a library's making
        where = ""
        if not named:
            with contextlib.suppress(Exception):  # it may have to read as well
                where = f"{self.where(index)}: "
        return f"{where}{error}"

    def damage(self, index: int) -> str:
        """Why an example was replaced, beginning with its place."""
        try:
            self._checked(index)
        except Undecodable as error:
            return str(error)
        return f"{self.where(index)}: it could not be decoded before, now it can"

    def where(self, index: int) -> str:
        """The place of an example, for error messages."""
        if hasattr(self._source, "where"):
            return self._source.where(index)
        if hasattr(self._source, "encoded"):
            return self._source.encoded(index)[2]
        return f"example {index}"
