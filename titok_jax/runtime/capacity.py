"""What a machine can hold, compared with what is asked for before any work is done. Imports no JAX."""

import os
import shutil
from pathlib import Path

from titok_jax.runtime.paths import is_remote


def machine_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(needed: int, what: str, there: int | None = None) -> None:
    """Checks that something can fit, by the least that it needs. What exceeds the memory of a machine would otherwise end in
    the system killing the process, perhaps after minutes.

    Args:
      needed: bytes, a lower bound.
      what: the subject of the message: "--batch-size 100000".
      there: bytes of memory; those of this machine if not given.

    Raises:
      ValueError: it cannot.
    """
    there = machine_memory() if there is None else there
    if needed > there:
        raise ValueError(f"{what} needs at least {_gigabytes(needed)} of memory, there are {_gigabytes(there)}")


def check_batch(size: int, image_size: int, what: str) -> None:
    """`check_memory` of a batch of images and of what a model makes of them, both as uint8 and as float32.

    Args:
      size: number of images.
      image_size: pixels per side.
    """
    check_memory(2 * (1 + 4) * 3 * size * image_size**2, what)


def check_space(path: str | os.PathLike, needed: int, what: str) -> None:
    """Checks that a disk can hold an output, by the least that it needs in bytes. Of buckets nothing is known.

    Raises:
      ValueError: it cannot.
    """
    if is_remote(path):
        return
    folder = next(place for place in (Path(path).absolute(), *Path(path).absolute().parents) if place.is_dir())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{what} needs at least {_gigabytes(needed)} on the disk of {folder}, {_gigabytes(free)} are free")


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
