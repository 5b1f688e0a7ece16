"""One run at a time in a folder of this machine. Of buckets see test_remote.py, of several processes test_distributed.py."""

import fcntl
import os
import re
import socket

import pytest

from titok_jax.runtime import locks


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("beside", [False, True])
def test_a_second_run_is_told_who_works_there(beside, tmp_path):
    place = tmp_path / "out"
    with locks.lock_run(place, beside=beside, temporary=True):
        assert names(tmp_path) == [".out.lock" if beside else "out"]
        message = (
            f"another run ({socket.gethostname()}, process {os.getpid()}) is at work in {place}; wait for it, or choose "
            "another output"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"), locks.lock_run(place, beside=beside):
            pass
    assert names(tmp_path) == []
    with locks.lock_run(place, beside=beside):
        pass
    assert names(tmp_path) == ([] if beside else ["out"])


def test_a_folder_with_files_is_not_removed(tmp_path):
    with locks.lock_run(tmp_path / "out", temporary=True):
        (tmp_path / "out" / "notes.txt").write_text("mine")
    assert names(tmp_path / "out") == ["notes.txt"]


def test_the_lock_of_a_killed_run_is_free(tmp_path):
    for left in ("host-3, process 17, 0123", ""):  # "": of an earlier version, or killed before it wrote
        (tmp_path / ".lock").write_text(left)
        with locks.lock_run(tmp_path):
            assert (tmp_path / ".lock").read_text().startswith(f"{socket.gethostname()}, process {os.getpid()}, ")
        assert names(tmp_path) == []


def test_what_is_no_lock_is_left_alone(tmp_path):
    (tmp_path / "precious").write_text("mine")
    lock = tmp_path / ".lock"
    for make in (
        lambda: lock.symlink_to("precious"),
        lambda: lock.symlink_to("nothing"),
        lambda: lock.mkdir(),
        lambda: os.mkfifo(lock),
        lambda: lock.write_text("mine"),
    ):
        make()
        with pytest.raises(FileExistsError, match=r"\.lock is (no regular file|of other origin).*move it away"):
            locks.lock_run(tmp_path).__enter__()
        assert names(tmp_path) == [".lock", "precious"]
        assert (tmp_path / "precious").read_text() == "mine"
        assert not lock.is_file() or lock.read_text() == "mine"
        lock.rmdir() if lock.is_dir() else lock.unlink()


@pytest.mark.parametrize("gone", ["file", "folder"])
def test_a_lock_that_its_holder_has_just_removed_is_made_anew(gone, tmp_path, monkeypatch):
    """The former holder ends between the opening of its file and its locking, or before the opening."""
    place, real = tmp_path / "out", fcntl.flock
    opened = os.open

    def flock(descriptor, operation):
        monkeypatch.setattr(fcntl, "flock", real)
        (place / ".lock").unlink()
        real(descriptor, operation)

    def open_(path, *arguments):
        monkeypatch.setattr(os, "open", opened)
        place.rmdir()
        return opened(path, *arguments)

    monkeypatch.setattr(fcntl, "flock", flock) if gone == "file" else monkeypatch.setattr(os, "open", open_)
    with locks.lock_run(place):
        with pytest.raises(ValueError, match="another run"), locks.lock_run(place):
            pass
        assert names(place) == [".lock"]


def test_a_link_is_not_locked(tmp_path):
    (tmp_path / "link").symlink_to("target")
    with pytest.raises(OSError, match="symbolic link"):
        locks.file_lock(tmp_path / "link").__enter__()
    assert names(tmp_path) == ["link"]
