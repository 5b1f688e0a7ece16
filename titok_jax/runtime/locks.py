"""Locks: on local files and folders, and for one run at a time in a folder, also in a bucket.

JAX is imported only if a run has several processes.
"""

import contextlib
import fcntl
import os
import re
import socket
import stat
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from titok_jax.runtime.paths import as_path, check_bucket_output, is_remote, writing

BEAT = 20.0  # seconds between two heartbeats of a lock in a bucket
_PATIENCE = 3  # after this many beats without a heartbeat, the run counts as dead
# What a lock holds: host, process, id of the run; in a bucket also the number of heartbeats.
_HOLDER = re.compile(r"([^\n]+, process \d+), [0-9a-f]+(\n\d*\n?)?")


@contextlib.contextmanager
def file_lock(path: str | os.PathLike, *, wait: bool = True) -> Iterator[bool]:
    """Holds a lock on a folder or a file; the file is created if it does not exist.

    The lock is released when the block ends, at the latest when the process ends. Some clusters have file systems without
    locks.

    Args:
      wait: wait until no other process holds the lock. If False, return at once.

    Yields:
      Whether the lock is held.
    """
    descriptor, problem = _flock(path, wait)
    try:
        yield problem is None
    finally:
        os.close(descriptor)


def _flock(path: str | os.PathLike, wait: bool) -> tuple[int, OSError | None]:
    """Opens a file or folder, but no link, and locks it.

    Returns:
      (descriptor, why it is not locked: BlockingIOError if another process holds the lock).
    """
    while True:
        flags = os.O_RDONLY if os.path.isdir(path) else os.O_RDWR | os.O_CREAT
        descriptor = os.open(path, flags | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            return descriptor, error
        if _is_at(descriptor, path):
            return descriptor, None
        os.close(descriptor)  # its former holder has removed it since it was opened


def _is_at(descriptor: int, path: str | os.PathLike) -> bool:
    """Whether an open file is still the one that has this name."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    return False


@contextlib.contextmanager
def lock_run(
    place: str | os.PathLike,
    *,
    what: str = "output",
    beside: bool = False,
    temporary: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator["BucketLock | None"]:
    """Locks a folder for all processes of this run, so that no second run works there. The first process holds the lock.

    On a local disk the lock ends with that process, however it ends. A bucket has no such locks, so this yields a
    `BucketLock` there. It waits for a minute if a run was killed in that folder.

    Args:
      place: the folder to lock; made if it does not exist. The lock is the file `.lock` in it.
      what: what the user may choose another one of.
      beside: do not make the folder. The lock is `.NAME.lock` beside it.
      temporary: remove the folder in the end if it is empty.

    Raises:
      ValueError: on every process, if another run holds the lock; the message says which.
      FileExistsError: there is a file of other origin in the place of the lock.
    """
    place = as_path(place)
    path = place.with_name(f".{place.name}.lock") if beside else place / ".lock"
    if is_remote(path):
        check_bucket_output(path)
    lock = BucketLock(path) if is_remote(path) else _FileLock(path)
    held, problem = False, None
    if process_index == 0:
        try:
            held = lock.acquire()
        except OSError as error:
            problem = error
    mine = held
    try:
        if process_count > 1:
            from jax.experimental import multihost_utils

            held = bool(multihost_utils.broadcast_one_to_all(held))
        if problem is not None:
            raise problem
        if not held:
            holder = lock.holder if process_index == 0 else "see process 0"
            raise ValueError(f"another run ({holder}) is at work in {place}; wait for it, or choose another {what}")
        yield lock if isinstance(lock, BucketLock) else None
    finally:
        if mine:
            lock.release()
            if temporary:
                with contextlib.suppress(OSError, ValueError):  # etils raises ValueError
                    place.rmdir()


def _this_run() -> str:
    return f"{socket.gethostname()}, process {os.getpid()}, {uuid.uuid4().hex}"


def _holder(path: Path | epath.Path, text: str) -> str:
    """Host and process of the run that holds the lock.

    Raises:
      FileExistsError: this is not what a lock holds.
    """
    found = _HOLDER.fullmatch(text)
    if found is None:
        raise FileExistsError(f"{path} is of other origin, expected a lock or nothing; move it away")
    return found[1]


class _FileLock:
    """A local file that its holder has locked. It holds the holder's name.

    Attributes:
      holder: who holds the lock, if `acquire` has returned False.
    """

    def __init__(self, path: Path):
        self._path, self._descriptor, self.holder = path, -1, "unknown process"

    def acquire(self) -> bool:
        """Takes the lock. Returns False if another run holds it."""
        if os.path.lexists(self._path) and not stat.S_ISREG(os.lstat(self._path).st_mode):
            raise FileExistsError(f"{self._path} is no regular file, expected a lock or nothing; move it away")
        while True:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._descriptor, problem = _flock(self._path, wait=False)
                break
            except FileNotFoundError:  # the former holder has just removed the folder
                continue
        found, taken = os.pread(self._descriptor, 1000, 0).decode(errors="replace"), isinstance(problem, BlockingIOError)
        try:
            if found:
                self.holder = _holder(self._path, found)
            if not taken:
                with writing(self._path):
                    os.ftruncate(self._descriptor, 0)
                    os.pwrite(self._descriptor, _this_run().encode(), 0)
        except OSError:
            os.close(self._descriptor)
            raise
        if taken:
            os.close(self._descriptor)
        elif problem is not None:
            place = self._path.parent
            print(f"warning: {place} cannot be locked ({problem}): nothing stops a second run there", flush=True)
        return not taken

    def release(self) -> None:
        """Removes the lock."""
        if _is_at(self._descriptor, self._path):
            with contextlib.suppress(OSError):
                self._path.unlink()
        os.close(self._descriptor)


class BucketLock:
    """An object in a bucket. Its holder, the first process of a run, rewrites it every `BEAT` seconds and removes it at the
    end.

    A run that finds such an object watches it for three beats. If it changes, its holder is alive. If it does not change,
    its holder was killed, and the new run takes the lock over. So nobody has to remove the object after a kill, and no
    clocks are compared. If two runs start at the same moment, the one that wrote last holds the lock.

    A holder that was cut off from the bucket for longer than those beats may find another run's name in the object. It has
    then lost the lock. `check` reports this to all its processes before a checkpoint is written.

    Attributes:
      holder: who holds the lock, if `acquire` has returned False.
    """

    def __init__(self, path: epath.Path):
        self._path, self._beats, self.holder = path, 0, ""
        self._name = _this_run()
        self._ended, self._other = threading.Event(), ""
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def acquire(self) -> bool:
        """Takes the lock and keeps it until `release`. Returns False if another run is alive."""
        found = self._read()
        if found:
            self.holder = _holder(self._path, found)
            print(
                f"{self._path}: a run ({self.holder}) began here and has not ended in order; "
                f"looking for {_PATIENCE * BEAT:.0f} seconds whether it lives",
                flush=True,
            )
        for _ in range(_PATIENCE if found else 0):
            time.sleep(BEAT)
            now = self._read()
            if not now:  # the other run has ended normally
                break
            if now != found:
                return False
        self._write()
        time.sleep(BEAT / 10)  # another run that also found it free writes within this time
        now = self._read()
        if not now.startswith(self._name):
            self.holder = _holder(self._path, now) if now else "unknown process"
            return False
        self._thread.start()
        return True

    def check(self) -> None:
        """Raises OSError on every process if another run has taken the folder. All processes must call it."""
        import jax
        from jax.experimental import multihost_utils

        if jax.process_index() == 0:
            with contextlib.suppress(Exception):  # as in `_keep`; without an answer, the last beat counts
                self._look()
        if multihost_utils.broadcast_one_to_all(bool(self._other)):
            raise OSError(
                f"another run ({self._other or 'see process 0'}) has taken {self._path.parent} over, while this one was "
                "cut off from it or began at the same moment; this one ends and writes nothing more there"
            )

    def beat(self) -> None:
        """Writes a heartbeat unless the lock is lost."""
        self._look()
        if not self._other:
            self._write()

    def release(self) -> None:
        """Removes the lock if this run still holds it."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # a lock that stays counts as one of a killed run
            if self._read().startswith(self._name):
                self._path.unlink(missing_ok=True)

    def _keep(self) -> None:
        while not self._other and not self._ended.wait(BEAT):
            with contextlib.suppress(Exception):  # the storage may fail for a while; each kind has its own errors
                self.beat()

    def _look(self) -> None:
        holder = self._read().partition("\n")[0]
        if holder not in ("", self._name):
            self._other = holder

    def _read(self) -> str:
        try:
            return self._path.read_text()
        except FileNotFoundError:
            return ""

    def _write(self) -> None:
        self._beats += 1
        self._path.write_text(f"{self._name}\n{self._beats}\n")
