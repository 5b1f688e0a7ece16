"""Writing files and folders that are complete or absent, and checking outputs before any work is done. Imports no JAX."""

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from etils import epath

from titok_jax.runtime.locks import file_lock
from titok_jax.runtime.paths import as_path, check_bucket_output, is_remote, objects_below, short_name, writing

# The names of what is being written, beside its place. Nothing else has 16 random digits there, so leftovers of killed
# writers are known by them.
_FILE = re.compile(r"\.(.+)\.partial-[0-9a-f]{16}(\.[^.]*)?", re.DOTALL)
_FOLDER = re.compile(r"\.(.+)\.(partial|old)-[0-9a-f]{16}", re.DOTALL)
_NOREPLACE, _EXCHANGE = 1, 2  # of renameat2; no Python module defines them


def check_output(path: str | os.PathLike, overwrite: bool, *, folder_of: str | None = None) -> Path | epath.Path:
    """Rejects an output that cannot or must not be written, before any work is done for it.

    Args:
      path: the file or folder to write, also in a bucket.
      overwrite: allow an existing output. A folder is replaced as a whole, so it must hold no other files.
      folder_of: the output is a folder of files whose names in it match this regular expression.

    Returns:
      The path.

    Raises:
      FileExistsError: the output exists and `overwrite` is not set, or it is a folder with other files in it.
      FileNotFoundError: the parent folder does not exist.
      PermissionError: the parent folder, or the bucket, is not writable.
      ValueError: the path is a folder where a file is wanted, or the other way round; it cannot be replaced, because it is
        a device, a mount point or the current folder; or its name is too long.
    """
    path = as_path(path)
    if is_remote(path):
        _try_bucket(path)
    else:
        _check_place(path)
    if not path.exists():
        return path
    if not is_remote(path) and folder_of is not None and path.is_dir() and Path.cwd().is_relative_to(path.resolve()):
        raise ValueError(f"cannot write {path}: it is the current folder or holds it; name a folder in it")
    if path.is_dir() != (folder_of is not None):
        raise ValueError(
            f"cannot write {path}: it is a {'folder, expected a file' if path.is_dir() else 'file, not a folder'}"
        )
    if not overwrite and (folder_of is None or next(_names_in(path), None)):
        raise FileExistsError(f"{path} exists and nothing was overwritten; choose another output or add --overwrite")
    foreign = find_foreign(path, folder_of) if folder_of is not None else None
    if foreign:
        raise FileExistsError(
            f"{path} holds files of other origin ({foreign}), so it is not replaced; choose another output"
        )
    return path


def find_foreign(folder: Path | epath.Path, files: str) -> str | None:
    """The first file in a folder and below whose name in it does not match `files`, a regular expression; None if all do."""
    return next((name for name in _names_in(folder) if not re.fullmatch(files, name)), None)


def _names_in(folder: Path | epath.Path) -> Iterator[str]:
    """The files in a folder, by their names in it, such as "a" and "b/c". Links are files; an empty folder is "d/"."""
    if is_remote(folder):
        yield from sorted("/".join(names) for names in objects_below(folder))
        return

    def fail(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, onerror=fail):
        files += [name for name in folders if os.path.islink(os.path.join(place, name))]
        between = "" if os.path.samefile(place, folder) else os.path.relpath(place, folder)
        yield from sorted(os.path.join(between, name) for name in files)
        if between and not files and not folders:
            yield f"{between}/"


def _check_place(path: Path) -> None:
    """The part of `check_output` that checks a local file system."""
    real = Path(os.path.realpath(path))  # the file that is written; a link stays a link
    parent = real.parent
    if not parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: {parent} is not an existing folder; create it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write {path}: no permission to write in {parent}")
    longest = os.pathconf(parent, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    if len(os.fsencode(real.name)) > longest:
        raise ValueError(f"cannot write {path}: its name has {len(os.fsencode(real.name))} bytes, at most {longest} can be")
    if path.exists() and (os.path.ismount(real) or not (real.is_dir() or real.is_file())):
        raise ValueError(f"cannot write {path}: it is a device or a mount point, which cannot be replaced; choose another")


def _try_bucket(path: epath.Path) -> None:
    """Writes an object beside `path` and removes it. There is no other way to find out whether the bucket is writable."""
    check_bucket_output(path)
    trial = _beside(path)
    try:
        trial.write_bytes(b"")
        trial.unlink()
    except Exception as error:  # each storage raises its own exceptions
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise PermissionError(
            f"cannot write {path}: {lines[0]}; does the bucket exist, with permission to write in it?"
        ) from error


def check_absent(path: str | os.PathLike) -> None:
    """Raises FileExistsError if there is a file or folder of that name."""
    if as_path(path).exists():
        raise FileExistsError(f"{path} exists and nothing was overwritten; choose another output or remove it")


@contextlib.contextmanager
def new_file(path: str | os.PathLike, *, replace: bool) -> Iterator[Path]:
    """Yields a temporary file beside `path`. It takes the name `path` if the block succeeds and is removed otherwise.

    If `path` is a link, the file that it points to is written. A file that is replaced keeps its permissions. For a bucket,
    the temporary file is local and is uploaded at the end. A file that a killed writer left is removed by the next one.

    Args:
      replace: replace what is at `path` in the end. Otherwise nothing is replaced, even if it appears during the work.

    Raises:
      FileExistsError: there is something at `path` that may not be replaced; the message says where the new file is.
      OSError: the disk is full; the message names `path`.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="titok_jax-") as folder, writing(f"{path} by way of {folder}"):
            local = Path(folder) / os.path.basename(path)
            yield local
            _upload_new(local, as_path(path), replace)
        return
    path = Path(os.path.realpath(path))
    remove_leftovers(path.parent, re.escape(short_name(path.stem) + path.suffix))
    partial = _beside(path)
    with writing(path):
        # Others cannot read it meanwhile if they cannot read the file to be replaced.
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _mode(path, 0o666) | 0o600))
        try:
            with file_lock(partial):  # marks it as in use
                yield partial
                _place_file(partial, path, replace)
        finally:
            partial.unlink(missing_ok=True)


def remove_leftovers(folder: Path, names: str) -> None:
    """Removes what killed writers of files left in a local folder, files whose names match a regular expression."""
    with contextlib.suppress(OSError):  # a folder that cannot be listed
        for name in os.listdir(folder):
            found = _FILE.fullmatch(name)
            if not found or not re.fullmatch(names, found[1] + (found[2] or "")):
                continue
            if stat.S_ISREG((folder / name).lstat().st_mode):
                with file_lock(folder / name, wait=False) as unused:
                    if unused:
                        (folder / name).unlink()


def _beside(path: Path | epath.Path, kind: str = "partial", *, folder: bool = False) -> Path | epath.Path:
    """A new name beside `path`: "partial" for what is being written, "old" for a folder that is replaced, "new" for finished
    work that cannot have its name. It is hidden, so that no pattern of a data source matches it. A file's suffix stays the
    same because Pillow chooses the format by it."""
    stem, suffix = (path.name, "") if folder else (path.stem, path.suffix)
    return path.with_name(f".{short_name(stem)}.{kind}-{secrets.token_hex(8)}{suffix}")


def _mode(path: Path, default: int) -> int:
    """The permissions of a file, or those of a folder and how files in it inherit theirs; `default` if there is none."""
    return stat.S_IMODE(path.stat().st_mode) & (0o7777 if path.is_dir() else 0o777) if path.exists() else default


def _place_file(partial: Path, path: Path, replace: bool) -> None:
    """Moves a finished file to its place."""
    if replace and path.exists():
        partial.chmod(_mode(path, 0))
    try:
        if replace:
            os.replace(partial, path)
        elif not _renameat2(partial, path, _NOREPLACE):
            _link(partial, path)
    except OSError as error:
        kept = _beside(path, "new")
        os.rename(partial, kept)
        raise _not_placed(error, path, kept) from None


def _link(partial: Path, path: Path) -> None:
    """Gives a file a new name, which another file must not have. The former name may stay."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links: the name is looked at and taken in two steps
        if os.path.lexists(path):
            raise _exists(path) from None
        os.rename(partial, path)


def _not_placed(error: OSError, path: Path | epath.Path, kept: Path | epath.Path) -> OSError:
    """The error to raise for finished work that could not be moved to `path` and is `kept`."""
    if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR):
        return FileExistsError(f"{path} has appeared during the work and is not replaced; what was made is {kept}")
    return OSError(f"{path} cannot be written ({error.strerror}); what was made is {kept}")


def _exists(path: Path | epath.Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(path))


def _upload_new(local: Path, path: epath.Path, replace: bool) -> None:
    """`_place_file` for a bucket. There the place is looked at and taken in two steps."""
    if not replace and path.exists():
        kept = _beside(path, "new")
        _upload(local, kept)
        raise _not_placed(_exists(path), path, kept)
    _upload(local, path)


def _upload(local: Path, path: epath.Path) -> None:
    """Copies a file to a bucket, first under a temporary name: an interrupted upload would leave an incomplete object."""
    partial = _beside(path)
    try:
        epath.Path(local).copy(partial, overwrite=True)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(Exception):
            partial.unlink()
        raise


@contextlib.contextmanager
def new_folder(path: str | os.PathLike, *, files: str, replace: bool, last: str | None = None) -> Iterator[Path]:
    """Yields a new empty folder beside `path`. It takes the name `path` if the block succeeds and is removed otherwise.

    If `path` is a link, the folder that it points to is replaced. A folder that is replaced keeps its permissions.

    A folder in a bucket cannot be replaced atomically. There the new folder is local, and its files are uploaded at the end.
    The file `last` (by default the last by name) is removed before the others change and written after them, so a folder
    that holds it is complete.

    If the process is killed at any time, the old folder or the new one remains at `path`. (Where the file system cannot
    exchange two names, the old one may remain beside it, see `moved_aside`.) The next call for this path removes other
    leftovers.

    Args:
      files: a regular expression of the names of all files in such a folder, such as "a" and "b/c". Only such files are
        ever removed.
      replace: replace a folder of such files in the end. Otherwise nothing is replaced, even if it appears during the work.

    Raises:
      FileExistsError: there is something at `path` that may not be replaced; the message says where the new folder is. Or
        a killed writer had left nothing at `path`, and the old folder has been restored.
      OSError: the disk is full; the message names `path`.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="titok_jax-") as folder, writing(f"{path} by way of {folder}"):
            yield Path(folder)
            _upload_folder(Path(folder), as_path(path), files, replace, last)
        return
    path = Path(os.path.realpath(path))
    with contextlib.ExitStack() as stack:
        stack.enter_context(writing(path))
        with file_lock(path.parent) as locked:
            existed = path.exists()
            if locked:
                _clean(path, files)
            if path.exists() and not existed:
                raise FileExistsError(f"{path} is back, which a killed process had moved aside; try again to replace it")
            partial = _beside(path, folder=True)
            partial.mkdir(_mode(path, 0o777) | stat.S_IRWXU)
            stack.enter_context(file_lock(partial))  # marks it as in use
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _place_folder(partial, path, files, replace)


def moved_aside(path: Path) -> Path | None:
    """The folder that a killed writer has moved away from `path` and not yet replaced; None if there is none."""
    if not path.parent.is_dir():
        return None
    for other in path.parent.iterdir():
        found = _FOLDER.fullmatch(other.name)
        if found and found.groups() == (short_name(path.name), "old") and other.is_dir() and not other.is_symlink():
            return other
    return None


def _place_folder(partial: Path, path: Path, files: str, replace: bool) -> None:
    """Moves a finished folder to its place and removes the folder that it replaces."""
    foreign = old = None
    try:
        if path.is_dir():
            partial.chmod(_mode(path, 0))
            foreign = find_foreign(path, files) if replace else None
        if foreign:
            raise _exists(path)
        if replace and path.is_dir():
            old = _swap(partial, path)
        else:
            os.rename(partial, path)  # fails if there is a file, or a folder that is not empty
    except OSError as error:
        kept = _beside(path, "new", folder=True)
        os.rename(partial, kept)
        raise _not_placed(error, path / (foreign or ""), kept) from None
    if old is not None:
        _remove(old, files)


def _swap(partial: Path, path: Path) -> Path:
    """Puts a folder in the place of another one -> where that one is now."""
    if _renameat2(partial, path, _EXCHANGE):
        return partial
    with file_lock(path.parent):
        old = _beside(path, "old", folder=True)
        os.rename(path, old)
        os.rename(partial, path)
    return old


def _remove(folder: Path, files: str) -> None:
    """Removes a folder, of its files only those whose names match a regular expression. If others are in it, it stays."""
    for name in list(_names_in(folder)):
        between, _, last = name.rpartition("/")
        temporary = _FILE.fullmatch(last)
        meant = f"{between}/{temporary[1]}{temporary[2] or ''}".lstrip("/") if temporary else name
        if re.fullmatch(files, meant):
            with contextlib.suppress(OSError):
                (folder / name).unlink()
    for place, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(place)
    if folder.exists():
        print(f"warning: {folder} is not removed, since it holds files of other origin", flush=True)


def _upload_folder(local: Path, folder: epath.Path, files: str, replace: bool, last: str | None) -> None:
    """`_place_folder` for a bucket. There the place is looked at and taken in many steps."""
    new, old = set(_names_in(local)), set(_names_in(folder)) if folder.exists() else set()
    last = last or max(new)
    foreign = next((name for name in sorted(old) if not (replace and re.fullmatch(files, name))), None)
    place = _beside(folder, "new", folder=True) if foreign else folder
    if foreign:
        old = set()
    if last in old:
        (place / last).unlink()
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda name: epath.Path(local / name).copy(place / name, overwrite=True), new - {last}))
        list(threads.map(lambda name: (place / name).unlink(), old - new - {last}))
    _upload(local / last, place / last)
    if foreign:
        raise _not_placed(_exists(folder), folder / foreign, place)


def _clean(path: Path, files: str) -> None:
    """Removes the leftovers of killed writers of `path`. The old folder is restored if `path` does not exist."""
    old = moved_aside(path)
    if old is not None and not path.exists():
        os.rename(old, path)
    for other in path.parent.iterdir():
        found = _FOLDER.fullmatch(other.name)
        if found and found[1] == short_name(path.name) and other.is_dir() and not other.is_symlink():
            with file_lock(other, wait=False) as unused:
                if unused:
                    _remove(other, files)


def _renameat2(one: Path, two: Path, flag: int) -> bool:
    """Renames atomically: to a name that must not exist, or with the names exchanged.

    Returns False if the system or the file system cannot (not Linux, NFS).

    Raises:
      FileExistsError: the new name exists.
    """
    library = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    renameat2 = getattr(library, "renameat2", None)
    here = -100  # AT_FDCWD
    if renameat2 is None or renameat2(here, os.fsencode(one), here, os.fsencode(two), flag) != 0:
        if renameat2 is not None and ctypes.get_errno() == errno.EEXIST:
            raise _exists(two)
        return False
    return True


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with as_path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
