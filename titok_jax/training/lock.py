"""Locks a workdir for one run at a time, so that no two runs overwrite each other's checkpoints."""

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator

import jax
from etils import epath
from jax.experimental import multihost_utils

from titok_jax.runtime.locks import file_lock
from titok_jax.runtime.paths import is_remote

BEAT = 20.0  # seconds between two heartbeats of a lock in a bucket
_PATIENCE = 3  # after this many beats without a heartbeat, the run counts as dead


@contextlib.contextmanager
def lock_workdir(workdir: epath.Path) -> Iterator["BucketLock | None"]:
    """Locks a workdir for all processes of this run.

    A lock on a local disk ends with the first process, however that process ends. A bucket has no such locks, so this yields
    a `BucketLock` there. It waits for a minute if a run was killed in that workdir.

    Raises:
      ValueError: on every process, if another run holds the lock.
    """
    with contextlib.ExitStack() as stack:
        lock, held = BucketLock(workdir / ".lock") if is_remote(workdir) else None, True
        if jax.process_index() == 0 and lock:
            held = lock.acquire()
            if held:
                stack.callback(lock.release)
        elif jax.process_index() == 0:
            held = stack.enter_context(file_lock(workdir / ".lock", wait=False, go_on=True))
        if not multihost_utils.broadcast_one_to_all(held):
            raise ValueError(f"another run is training in {workdir}; wait for it, or choose another workdir")
        yield lock


class BucketLock:
    """An object in a bucket. Its holder, the first process of a run, rewrites it every `BEAT` seconds and removes it at the
    end.

    A run that finds such an object watches it for three beats. If it changes, its holder is alive. If it does not change,
    its holder was killed, and the new run takes the lock over. So nobody has to remove the object after a kill, and no
    clocks are compared. If two runs start at the same moment, the one that wrote last holds the lock.

    A holder that was cut off from the bucket for longer than those beats may find another run's name in the object. It has
    then lost the lock. `check` reports this to all its processes before a checkpoint is written.
    """

    def __init__(self, path: epath.Path):
        self._path, self._beats = path, 0
        self._name = f"{socket.gethostname()}, process {os.getpid()}, {uuid.uuid4().hex}"
        self._ended, self._other = threading.Event(), ""
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def acquire(self) -> bool:
        """Takes the lock and keeps it until `release`. Returns False if another run is alive."""
        found = self._read()
        if found:
            print(
                f"{self._path}: a run ({found.splitlines()[0]}) began here and has not ended in order; "
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
        if not self._read().startswith(self._name):
            return False
        self._thread.start()
        return True

    def check(self) -> None:
        """Raises OSError on every process if another run has taken the workdir. All processes must call it."""
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
