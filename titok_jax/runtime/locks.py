"""Locks on files and folders of this machine. Imports no JAX."""

import contextlib
import fcntl
import os
from collections.abc import Iterator


@contextlib.contextmanager
def file_lock(path: str | os.PathLike, *, wait: bool = True, go_on: bool = False) -> Iterator[bool]:
    """Holds a lock on a folder, or on a file that is made for it, which ends with the process at the latest.

    Gives whether it does. Without `wait` another process may have it. Where a file system has no locks, as that of some
    clusters, it does not, or with `go_on` it says so and goes on as if it did.
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
