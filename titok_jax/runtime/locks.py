"""Locks on local files and folders. Imports no JAX."""

import contextlib
import fcntl
import os
from collections.abc import Iterator


@contextlib.contextmanager
def file_lock(path: str | os.PathLike, *, wait: bool = True, go_on: bool = False) -> Iterator[bool]:
    """Holds a lock on a folder or a file; the file is created if it does not exist.

    The lock is released when the block ends, at the latest when the process ends. Some clusters have file systems without
    locks.

    Args:
      wait: wait until no other process holds the lock. If False, return at once.
      go_on: on a file system without locks, print a warning and act as if the lock were held.

    Yields:
      Whether the lock is held.
    """
    folder = os.path.isdir(path)
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except BlockingIOError:
            held = False
        except OSError as error:
            held = go_on
            if go_on:
                place = path if folder else os.path.dirname(path)
                print(f"warning: {place} cannot be locked ({error}): nothing stops a second run there", flush=True)
        yield held
    finally:
        os.close(descriptor)
