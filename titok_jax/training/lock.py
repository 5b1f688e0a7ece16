"""One run at a time in a workdir, so that no two write each other's checkpoints."""

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

BEAT = 20.0  # seconds between two signs of life of a lock in a bucket
_PATIENCE = 3  # beats without one, after which its run is taken for dead


@contextlib.contextmanager
def lock_workdir(workdir: epath.Path) -> Iterator["BucketLock | None"]:
    """Holds a workdir for all processes of this run.

    On this machine the lock ends with the first process, however that ends. In a bucket there is none that does: see
    `BucketLock`, which is given. It waits for a minute if a run was killed there.

    Raises:
      ValueError: another run holds it; on every process.
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
    """An object that its holder, the first process of a run, writes anew every `BEAT` seconds, and removes in the end.

    Who finds one looks at it for three beats: if it changes, its holder lives; if it stays as it is, its holder was killed
    and it is taken over. So nobody has to remove it after a kill, and no clocks are compared. Of two that begin in the same
    moment the one that wrote last holds it. A holder that finds another's name in it, because it was cut off from the bucket
    for longer than those beats, has lost it: `check` says so, to all its processes, before a checkpoint is written.
    """

    def __init__(self, path: epath.Path):
        self._path, self._beats = path, 0
        self._name = f"{socket.gethostname()}, process {os.getpid()}, {uuid.uuid4().hex}"
        self._ended, self._other = threading.Event(), ""
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def acquire(self) -> bool:
        """Takes the lock, and keeps it until `release`; False if another run lives."""
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
            if not now:  # it has ended in order
                break
            if now != found:
                return False
        self._write()
        time.sleep(BEAT / 10)  # another that also found it free writes within this time
        if not self._read().startswith(self._name):
            return False
        self._thread.start()
        return True

    def check(self) -> None:
        """Raises OSError on every process, all of which must call it, if another run has taken the workdir."""
        if jax.process_index() == 0:
            with contextlib.suppress(Exception):  # as in `_keep`; without an answer, what the last beat found counts
                self._look()
        if multihost_utils.broadcast_one_to_all(bool(self._other)):
            raise OSError(
                f"another run ({self._other or 'see process 0'}) has taken {self._path.parent} over, while this one was "
                "cut off from it or began at the same moment; this one ends and writes nothing more there"
            )

    def beat(self) -> None:
        """Gives a sign of life, unless the lock is lost."""
        self._look()
        if not self._other:
            self._write()

    def release(self) -> None:
        """Removes the lock if it is still this run's."""
        self._ended.set()
        self._thread.join()
        if self._read().startswith(self._name):
            self._path.unlink(missing_ok=True)

    def _keep(self) -> None:
        while not self._other and not self._ended.wait(BEAT):
            with contextlib.suppress(Exception):  # a storage that fails for a while; each has its own errors
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
