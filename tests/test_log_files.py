"""The log of a training whose workdir is in a bucket: copied in a thread, each file while it changes, and never a reason to
end the training."""

import threading

import numpy as np
import pytest
from etils import epath
from tensorboardX.proto.event_pb2 import Event
from test_metric_log import FIGURES
from test_remote import _Bucket, bucket, objects  # noqa: F401 (a fixture)

from titok_jax.training.log import MetricLog, TextLog
from titok_jax.training.log_files import EventFiles, LogFolder


@pytest.fixture
def folder(bucket, monkeypatch):  # noqa: F811
    monkeypatch.setattr(LogFolder, "EVERY", 1e6)
    monkeypatch.setattr(LogFolder, "PAUSES", (0.0, 0.0))
    with LogFolder(bucket / "run") as folder:
        yield folder


def events(path) -> list[Event]:
    """The events of a file, whose records are: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    data, found = path.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (128, 128, 3), np.uint8)


def test_a_picture_is_copied_once_and_only_what_changes_again(folder):
    log, copied = MetricLog(folder, first_step=0, num_steps=99), []
    for step in range(1, 13):
        log.write(step, {"loss": 1.0}, shown="loss", figures=FIGURES)
        log.picture(step, "preview", noise(step))
        (log.folder / f"{step}.png").write_bytes(noise(step).tobytes())
        assert folder.copy()
        copied.append(sum(len(file.getvalue()) for file in _Bucket.store.values()))
        _Bucket.store.clear()  # what is copied again is there again
    assert copied[0] > 2 * noise(0).nbytes
    assert max(copied) < 1.1 * copied[0]
    log.close()


def test_event_files_follow_one_another_and_hold_all_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(EventFiles, "LARGE", 1000)
    log = MetricLog(LogFolder(epath.Path(tmp_path)), first_step=0, num_steps=99)
    for step in range(1, 41):
        log.write(step, {"loss": 1.0}, shown="loss", figures=FIGURES)
        if step == 20:
            log.picture(step, "preview", noise(0))
    log.close()
    files = sorted((tmp_path / "tensorboard").iterdir())
    assert len(files) >= 4
    parts = [events(path) for path in files]
    assert (
        max(
            path.stat().st_size
            for path in files
            if not any(v.tag == "preview" for e in events(path) for v in e.summary.value)
        )
        < 4000
    )
    # TensorBoard drops what it has of later steps at such an event, so only the first file of a process has one.
    assert [sum(event.HasField("session_log") for event in part) for part in parts] == [1] + [0] * (len(files) - 1)
    losses = [event.step for part in parts for event in part for value in event.summary.value if value.tag == "loss"]
    assert losses == list(range(1, 41))


def test_a_copy_that_fails_is_a_warning_and_is_made_later(folder, monkeypatch, capsys):
    put, failures = _Bucket._open, [PermissionError("403 for now"), RuntimeError("the client's own\nerror")]

    def fail(self, path, mode="rb", **options):
        if "w" in mode and failures:
            raise failures.pop()
        return put(self, path, mode, **options)

    monkeypatch.setattr(_Bucket, "_open", fail)
    (folder.path / "log.txt").write_text("a line")
    assert [folder.copy(), folder.copy()] == [False, False]
    assert objects("run/") == []
    said = capsys.readouterr().out
    assert said.count("\n") == 1  # once for both
    assert said.startswith("WARNING: the log cannot be copied to gs://bucket/run (RuntimeError: the client's own\\nerror); ")
    assert folder.copy()
    assert capsys.readouterr().out == "The log is copied to gs://bucket/run again\n"
    assert (folder.workdir / "log.txt").read_text() == "a line"
    failures[:] = [OSError("503")] * 2
    (folder.path / "log.txt").write_text("a line more")
    folder.close()
    assert (folder.workdir / "log.txt").read_text() == "a line more"
    assert "not complete" not in capsys.readouterr().out


def test_a_bucket_that_never_answers_ends_with_a_warning(folder, monkeypatch, capsys):
    answer = threading.Event()
    monkeypatch.setattr(LogFolder, "LONGEST", 0.05)
    monkeypatch.setattr(_Bucket, "_open", lambda *arguments, **options: answer.wait())
    text = TextLog()
    text.open(folder)
    text.write("a line\n")
    log = MetricLog(folder, first_step=0, num_steps=9)
    log.write(1, {"loss": 1.0}, shown="loss", figures=FIGURES)  # waits for no copy
    log.close()
    folder.close()
    assert "WARNING: the log in gs://bucket/run is not complete (no answer for 0.05 s)" in capsys.readouterr().out
    answer.set()
