"""Ends a training that makes no progress: a read that blocks, a collective that one host never joins, a hung device."""

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Self

STUCK = 75  # exit status: a failure that may be gone at the next start (EX_TEMPFAIL). 2 would mean an impossible request
STAMP = "TITOK_JAX_PROGRESS"  # environment variable: the file that tells others until when silence is fine

# How many times the minutes of a step these may take. Compiling at full effort and reading large weights can take hours.
START, COMPILE, LONG = 12, 12, 4

_TICK = 10  # seconds between two looks
_TELL = 30  # seconds within which the stacks must be written, wherever they go
_STAMP_MARGIN = 600  # seconds after which a process that should have ended itself has not


class Watchdog:
    """Watches that the training goes on to something new before the time for it is over. If not, the process writes the
    stacks of all its threads and ends with the status `STUCK`, so that whoever has started it can start it again.

    While it watches, the file that the environment variable `STAMP` names, if it names one, holds a number: the time, in
    seconds since 1970, until which the training may be silent.

    Attributes:
      note: called with the stacks and the message, to write them into a log beside stderr.
    """

    def __init__(self, minutes: float):
        """
        Args:
          minutes: how long a step may take; 0 for no watch.
        """
        self._minutes, self._stamp, self.note = minutes, os.environ.get(STAMP), lambda text: None
        self._now, self._seen, self._silence = (0, "the start", START), 0, 0.0
        self._tick, self._closing = min(_TICK, 3 * minutes), threading.Event()
        if minutes:
            threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def at(self, what: str, times: float = 1) -> None:
        """Says what begins now. It may take `times` the minutes of a step."""
        self._now = (self._now[0] + 1, what, times)

    def close(self) -> None:
        self._closing.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _run(self) -> None:
        last = time.monotonic()
        self.expired(0)
        while not self._closing.wait(self._tick):
            now = time.monotonic()
            if self.expired(now - last):
                self._end()
            last = now

    def expired(self, seconds: float) -> bool:
        """Adds the time since the last look. Returns whether the training has been silent for too long.

        Of a long time without a look only a part counts: then the whole process was stopped, and nothing hung.
        """
        beat, _, times = self._now
        self._silence = self._silence + min(seconds, 2 * self._tick) if beat == self._seen else 0.0
        self._seen = beat
        left = 60 * times * self._minutes - self._silence
        if self._stamp:
            with contextlib.suppress(OSError):
                new = Path(f"{self._stamp}.new")
                new.write_text(f"{int(time.time() + left) + _STAMP_MARGIN}\n")
                new.replace(self._stamp)
        return left < 0

    def _end(self) -> None:
        # Whatever hangs may hold a lock that the telling needs, or be the disk that it writes to.
        teller = threading.Thread(target=self._tell, daemon=True)
        teller.start()
        teller.join(_TELL)
        os._exit(STUCK)

    def _tell(self) -> None:
        _, what, times = self._now
        for worker in multiprocessing.active_children():  # they write their stacks too, see data/loader.py
            with contextlib.suppress(OSError):
                os.kill(worker.pid, signal.SIGUSR1)
        if multiprocessing.active_children():
            time.sleep(1)
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            stacks = file.read()
        message = (
            f"error: no progress for {times * self._minutes:g} minutes at {what}; the stacks of all threads are above. The "
            f"same command continues (status {STUCK}). --config.watchdog_minutes sets the minutes of a step, 0: no watch"
        )
        print(f"{stacks}\n{message}", file=sys.stderr, flush=True)
        self.note(f"{stacks}\n{message}\n")
