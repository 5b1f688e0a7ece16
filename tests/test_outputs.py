"""Files and folders that commands write: complete or absent, and nothing of the user's is replaced or removed."""

import errno
import fcntl
import os
import re
import stat
from pathlib import Path

import pytest

from titok_jax.runtime import outputs

FOLDER = {"files": r"(sub/)?\d\.txt"}  # what the folders here hold


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def write(path, text="new", *, replace=False, folder=False, during=lambda: None):
    """Writes a file, or a folder with the file 1.txt, and calls `during` just before the end."""
    with outputs.new_folder(path, replace=replace, **FOLDER) if folder else outputs.new_file(path, replace=replace) as new:
        (new / "1.txt" if folder else new).write_text(text)
        during()


@pytest.fixture(params=["renameat2", "links", "neither"])
def system(request, monkeypatch):
    """What the file system can do."""
    if request.param != "renameat2":
        monkeypatch.setattr(outputs, "_renameat2", lambda one, two, flag: False)
    if request.param == "neither":

        def link(*args):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "link", link)


@pytest.mark.parametrize("folder", [False, True])
def test_an_output_appears_whole_or_not_at_all(folder, system, tmp_path):
    def fail():
        raise RuntimeError

    place = tmp_path / "a.b"
    with pytest.raises(RuntimeError):
        write(place, folder=folder, during=fail)
    assert not list(tmp_path.iterdir())
    write(place, "old", folder=folder)
    with pytest.raises(RuntimeError):
        write(place, folder=folder, replace=True, during=fail)
    whole = "a.b/1.txt" if folder else "a.b"
    assert files(tmp_path) == {whole: b"old"}
    write(place, folder=folder, replace=True)
    assert files(tmp_path) == {whole: b"new"}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("mine", ["file", "folder"])
def test_what_appears_during_the_work_is_not_replaced(folder, mine, system, tmp_path):
    place = tmp_path / "a.b"
    other = place / "notes.txt" if mine == "folder" else place

    def appear():
        other.parent.mkdir(exist_ok=True)
        other.write_text("mine")

    # With leave to replace something, a file still is no folder, and a folder of other files is not replaced.
    for replace in (False, True) if folder or mine == "folder" else (False,):
        with pytest.raises(FileExistsError, match=r"a\.b\S* has appeared .* not replaced; what was made is (\S+)$") as error:
            write(place, folder=folder, replace=replace, during=appear)
        kept = Path(re.search(r"\S+$", str(error.value))[0])
        assert kept.name.startswith(".a." if not folder else ".a.b.")
        assert folder or kept.suffix == ".b"
        assert (kept / "1.txt" if folder else kept).read_text() == "new"
        assert other.read_text() == "mine"
        assert {path.name for path in tmp_path.iterdir()} == {place.name, kept.name}
        (kept / "1.txt" if folder else kept).unlink()
        kept.rmdir() if folder else None
        other.unlink()
        place.rmdir() if mine == "folder" else None


@pytest.mark.parametrize("name", ["notes.txt", "sub/notes.txt", ".hidden/1.txt", "12.txt", "other/"])
def test_a_folder_with_files_of_other_origin_is_not_replaced(name, tmp_path):
    write(tmp_path / "a", folder=True)
    (tmp_path / "a" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "a" / name).mkdir() if name.endswith("/") else (tmp_path / "a" / name).write_text("mine")
    before = files(tmp_path)
    with pytest.raises(FileExistsError, match=re.escape(f"holds files of other origin ({name})")):
        outputs.check_output(tmp_path / "a", True, folder_of=FOLDER["files"])
    with pytest.raises(FileExistsError, match=re.escape(f"{tmp_path / 'a' / name}") + r"/? has appeared during the work"):
        write(tmp_path / "a", folder=True, replace=True)
    assert before.items() <= files(tmp_path).items()
    assert (tmp_path / "a" / name).exists()


def test_what_comes_in_the_last_moment_stays_beside(system, tmp_path, monkeypatch, capsys):
    """A file that appears between the last look and the exchange of the folders."""
    write(tmp_path / "a", "old", folder=True)
    swap = outputs._swap

    def late(partial, path):
        (path / "notes.txt").write_text("mine")
        return swap(partial, path)

    monkeypatch.setattr(outputs, "_swap", late)
    write(tmp_path / "a", folder=True, replace=True)
    (left,) = tmp_path.glob(".a.*")
    assert f"warning: {left} is not removed, since it holds files of other origin" in capsys.readouterr().out
    assert files(tmp_path) == {"a/1.txt": b"new", f"{left.name}/notes.txt": b"mine"}
    write(tmp_path / "a", folder=True, replace=True)  # nor by the next writer
    assert (left / "notes.txt").read_text() == "mine"


def leave(place, kind, content, folder):
    """What a killed writer of `place` leaves."""
    stem, suffix = (place.name, "") if folder else (place.stem, place.suffix)
    left = place.with_name(f".{stem}.{kind}-0123456789abcdef{suffix}")
    if folder:
        left.mkdir()
        for name in ("1.txt", ".1.partial-00112233445566aa.txt"):
            (left / name).write_text(content)
    else:
        left.write_text(content)
    return left


@pytest.mark.parametrize("folder", [False, True])
def test_leftovers_of_killed_writers_are_removed_and_nothing_else(folder, tmp_path):
    place = tmp_path / "a.b"
    left = [leave(place, "partial", "half", folder)]
    left += [leave(place, "old", "replaced", True)] if folder else []
    stays = [".a.b.old-backup", ".a.b.partial-backup", ".a.b.partial-0123", ".aa.b.partial-0123456789abcdef", ".a.b.old-1"]
    stays += [
        ".a.partial-0123456789abcdeg.b",
        ".a.partial-17.b",
        ".a.partial-0123456789abcdef.c",
        ".aXb.old-0123456789abcdef",
    ]
    for name in stays:
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.txt").write_text("mine")
        (tmp_path / f"{name}-file").write_text("mine")
    if folder:
        place.mkdir()
        (place / "1.txt").write_text("before")
    (tmp_path / "target").write_text("mine")
    (tmp_path / ".a.partial-fedcba9876543210.b").symlink_to("target")
    (tmp_path / ".a.b.partial-fedcba9876543210").symlink_to(".a.b.old-backup")
    write(place, folder=folder, replace=True)
    assert not [path for path in left if path.exists()]
    for name in stays:
        assert (tmp_path / name / "1.txt").read_text() == "mine"
        assert (tmp_path / f"{name}-file").read_text() == "mine"
    assert (tmp_path / "target").read_text() == "mine"
    assert (tmp_path / ".a.partial-fedcba9876543210.b").is_symlink()


def test_a_file_that_is_being_written_is_no_leftover(tmp_path):
    with outputs.new_file(tmp_path / "a", replace=True) as first:
        write(tmp_path / "a", "second")
        first.write_text("first")
    assert files(tmp_path) == {"a": b"first"}


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(tmp_path, monkeypatch):
    """Two processes with one number, in two containers, do not share a file either."""
    (tmp_path / "target").write_text("mine")
    for name in (f".a.partial-{os.getpid()}.txt", ".a.partial-0011223344556677.txt"):
        (tmp_path / name).symlink_to("target")
    with (
        outputs.new_file(tmp_path / "a.txt", replace=True) as one,
        outputs.new_file(tmp_path / "a.txt", replace=True) as two,
    ):
        assert one != two
        one.write_text("one")
        two.write_text("two")
    assert (tmp_path / "a.txt").read_text() == "one"
    monkeypatch.setattr(outputs.secrets, "token_hex", lambda count: "0011223344556677")
    with pytest.raises(FileExistsError):
        write(tmp_path / "a.txt", replace=True)
    assert (tmp_path / ".a.partial-0011223344556677.txt").is_symlink()
    assert (tmp_path / "target").read_text() == "mine"


def test_permissions_follow_the_umask_and_stay(tmp_path):
    former = os.umask(0o027)
    try:
        write(tmp_path / "file")
        write(tmp_path / "folder", folder=True)
        assert (mode(tmp_path / "file"), mode(tmp_path / "folder")) == (0o640, 0o750)
        assert mode(tmp_path / "folder" / "1.txt") == 0o640
        for bits in (0o600, 0o666, 0o440):
            (tmp_path / "file").chmod(bits)
            with outputs.new_file(tmp_path / "file", replace=True) as partial:
                assert not mode(partial) & ~(bits | 0o600)  # nor can others read what is being written
                partial.write_text("new")
            assert mode(tmp_path / "file") == bits
        for bits in (0o700, 0o775, 0o2770):
            (tmp_path / "folder").chmod(bits)
            write(tmp_path / "folder", folder=True, replace=True)
            assert mode(tmp_path / "folder") == bits
        (tmp_path / "empty").mkdir(0o700)
        write(tmp_path / "empty", folder=True)
        assert mode(tmp_path / "empty") == 0o700
    finally:
        os.umask(former)


@pytest.mark.parametrize("folder", [False, True])
def test_a_full_disk_says_of_which_file(folder, tmp_path, full_disk):
    def fail(number):
        raise OSError(number, os.strerror(number))

    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        message = f"cannot write {tmp_path / 'a'}: {os.strerror(number)}"
        with pytest.raises(OSError, match=f"^{re.escape(message)}"):
            write(tmp_path / "a", folder=folder, during=lambda number=number: fail(number))
    with pytest.raises(PermissionError, match=r"^\[Errno 13\] Permission denied$"):  # may be of another file
        write(tmp_path / "a", folder=folder, during=lambda: fail(errno.EACCES))
    with full_disk(1000), pytest.raises(OSError, match=f"^cannot write {tmp_path / 'a'}: File too large$"):
        write(tmp_path / "a", "new" * 1000, folder=folder)
    assert not list(tmp_path.iterdir())


def test_outputs_that_cannot_be_replaced(tmp_path, monkeypatch):
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    long = "ä" * 128  # 256 bytes
    for output, folder_of, message in (
        (".", ".*", "it is the current folder or holds it"),
        ("..", ".*", "it is the current folder or holds it"),
        ("/", ".*", "device or a mount point"),
        ("/dev/null", None, "device or a mount point"),
        (tmp_path / long, None, "its name has 256 bytes, at most 255"),
        (tmp_path / "nothing" / "a", None, "is not an existing folder"),
    ):
        with pytest.raises((ValueError, OSError), match=rf"^cannot write .*{message}"):
            outputs.check_output(output, True, folder_of=folder_of)


def test_names_as_long_as_can_be(tmp_path):
    for folder, name in ((False, "ä" * 125 + ".png"), (True, "ö" * 127)):
        path = outputs.check_output(tmp_path / name, False, folder_of=".*" if folder else None)
        left = path.with_name(outputs._beside(path, folder=folder).name)
        left.mkdir() if folder else left.write_text("half")
        write(path, folder=folder)
    assert [len(path.name.encode()) for path in sorted(tmp_path.iterdir())] == [254, 254]


def test_a_folder_is_replaced_where_a_file_system_has_no_locks(tmp_path, monkeypatch, capsys):
    def flock(file, operation):
        raise OSError("no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    for text in ("old", "new"):
        write(tmp_path / "folder", text, folder=True, replace=True)
    assert files(tmp_path) == {"folder/1.txt": b"new"}
    assert capsys.readouterr().out == ""


def test_links_stay_links(tmp_path):
    """The target of a link is replaced, on the disk where it lies."""
    (tmp_path / "disk" / "folder").mkdir(parents=True)
    (tmp_path / "disk" / "folder" / "2.txt").write_text("old")
    for link, target in (("folder", "disk/folder"), ("file", "disk/file")):
        (tmp_path / link).symlink_to(target)
    write(outputs.check_output(tmp_path / "folder", True, folder_of=FOLDER["files"]), folder=True, replace=True)
    write(outputs.check_output(tmp_path / "file", False))
    assert (tmp_path / "folder").is_symlink()
    assert (tmp_path / "file").is_symlink()
    assert files(tmp_path / "disk") == {"folder/1.txt": b"new", "file": b"new"}
