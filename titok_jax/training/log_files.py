"""The files that a training logs into: the folder of all, its copy in a bucket, and the event files of TensorBoard."""

import tempfile
import threading
import time
from pathlib import Path
from typing import Self

from etils import epath
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from titok_jax.runtime.messages import escaped
from titok_jax.runtime.paths import is_remote, writing


class LogFolder:
    """The folder that log files are written to: the workdir, or for a remote workdir, whose files cannot be appended to, a
    local folder. A thread of its own copies the files of that folder which have changed, once a minute and at the end.

    A copy that fails is a warning, and is tried again: no training ends because its log cannot be copied.

    Attributes:
      workdir: where the files are in the end, and where those of earlier processes are.
      path: the folder to write to.
    """

    EVERY = 60  # seconds between two copies
    PAUSES = (1, 5, 15)  # seconds before the last copy is tried again
    LONGEST = 120  # seconds that `close` waits

    def __init__(self, workdir: epath.Path):
        self.workdir = self.path = workdir
        self._thread = None
        if not is_remote(workdir):
            return
        self._temporary = tempfile.TemporaryDirectory(prefix="titok_jax-")
        self.path = epath.Path(self._temporary.name)
        self._copied: dict[Path, tuple[int, int]] = {}  # file -> its size and time of change when it was copied
        self._failure, self._closing, self._alone = "", threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run, name="copies of the log", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closing.wait(self.EVERY):
            self.copy()
        for pause in self.PAUSES:
            if self.copy():
                return
            time.sleep(pause)
        self.copy()

    def copy(self) -> bool:
        """Copies the files that have changed since their last copy. Returns whether all could be copied; prints it when this
        changes. Does nothing for a local workdir."""
        if self._thread is None:
            return True
        with self._alone:
            former = self._failure
            try:
                self._copy_changed()
                self._failure = ""
            except Exception as error:  # of the storage's client, which may raise any
                self._failure = f"{type(error).__name__}: {escaped(str(error))}"[:300]
        if self._failure and not former:
            print(
                f"WARNING: the log cannot be copied to {self.workdir} ({self._failure}); the training goes on, and it is "
                f"tried again every {self.EVERY} s",
                flush=True,
            )
        elif former and not self._failure:
            print(f"The log is copied to {self.workdir} again", flush=True)
        return not self._failure

    def _copy_changed(self) -> None:
        local = Path(self.path)
        for path in sorted(filter(Path.is_file, local.rglob("*"))):
            found = path.stat()  # before the copy: what is appended meanwhile belongs to the next one
            state = (found.st_size, found.st_mtime_ns)
            if self._copied.get(path) != state:
                place = self.workdir / path.relative_to(local)
                place.parent.mkdir(parents=True, exist_ok=True)
                epath.Path(path).copy(place, overwrite=True)
                self._copied[path] = state

    def close(self) -> None:
        """Copies what has changed, with new tries and for two minutes at most. Prints a warning if that fails."""
        if self._thread is None or self._closing.is_set():
            return
        self._closing.set()
        self._thread.join(self.LONGEST)
        if self._thread.is_alive() or self._failure:
            reason = self._failure or f"no answer for {self.LONGEST} s"
            print(f"WARNING: the log in {self.workdir} is not complete ({reason})", flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class EventFiles:
    """Events for TensorBoard, in files that follow one another. A file ends with a picture, or when it is large, and never
    changes after that: a bucket gets it once more and then never again.

    `tensorboardX.SummaryWriter` writes in a thread. If the disk is full, that thread dies, and the training waits for it for
    ever. So the events are written here, where an error ends the training.
    """

    LARGE = 4 * 2**20  # bytes

    def __init__(self, folder: epath.Path, first_step: int):
        """TensorBoard hides the events of earlier files from `first_step` on."""
        self._folder, self._number = folder, 0
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._open()
        with writing(folder):
            self._file.write_event(Event(step=first_step, file_version="brain.Event:2"))
            self._file.write_event(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def _open(self) -> None:
        # The name has the time in seconds, then the host. TensorBoard reads the files in the order of their names.
        with writing(self._folder):
            self._file = EventsWriter(str(self._folder / "events"), f".{self._number:05d}")
        self._number, self._size = self._number + 1, 0

    def add(self, step: int, values: summary.Summary, *, last: bool = False) -> None:
        """Adds the values of a step.

        Args:
          last: end this file with them.
        """
        event = Event(step=step, wall_time=time.time(), summary=values)
        with writing(self._folder):
            self._file.write_event(event)
        self._size += event.ByteSize()
        if last or self._size > self.LARGE:
            self.close()
            self._open()

    def flush(self) -> None:
        with writing(self._folder):
            self._file.flush()

    def close(self) -> None:
        with writing(self._folder):
            self._file.close()
