"""Command lines: a parser whose errors are one line, and the limits of numbers. Imports no JAX."""

import argparse
import dataclasses
import math
from typing import ClassVar

MOST_SHARDS = 99_999  # their names have five digits
MOST_THREADS = 1024


class Parser(argparse.ArgumentParser):
    """A parser that prints its texts as they are written. A wrong argument is a ValueError, which `command` prints."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> None:
        raise ValueError(message.removeprefix("argument ").replace(": is ", " is ", 1))


@dataclasses.dataclass(frozen=True)
class Real:
    """The `type` of an argument that is a number from `least` to `most`. There is always a limit, so that a zero too many is
    found at once, not after hours or when the memory is full."""

    least: float = 0
    most: float = 10_000_000

    kind: ClassVar[type] = float
    name: ClassVar[str] = "a number"

    def __call__(self, text: str) -> float:
        try:
            number = self.kind(text)
        except ValueError:
            number = math.nan
        if not self.least <= number <= self.most:  # also of NaN
            expected = f"expected {self.name} from {self.least:,} to {self.most:,}"
            raise argparse.ArgumentTypeError(f"is {text[:80]}, {expected}")
        return number


@dataclasses.dataclass(frozen=True)
class Whole(Real):
    """The `type` of an argument that is a whole number from `least` to `most`."""

    least: int = 1
    most: int = 10_000_000

    kind: ClassVar[type] = int
    name: ClassVar[str] = "a whole number"


@dataclasses.dataclass(frozen=True)
class Reals(Real):
    """The `type` of an argument that is up to 100 such numbers, separated by commas."""

    def __call__(self, text: str) -> list[float]:
        if text.count(",") > 99:
            raise argparse.ArgumentTypeError(f"is {text[:80]}..., expected at most 100 numbers")
        return [super(Reals, self).__call__(part) for part in text.split(",")]


IMAGES = Whole()
BATCH = Whole(1, 1_000_000)
SEED = Whole(0, 2**32 - 1)
