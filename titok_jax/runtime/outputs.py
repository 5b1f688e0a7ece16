"""Writing files and folders that are complete or absent, and checking outputs before any work is done. Imports no JAX."""

import contextlib
import ctypes
import glob
import hashlib
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from etils import epath

from titok_jax.runtime.locks import file_lock
from titok_jax.runtime.paths import as_path, files_below, is_remote


def check_output(path: str | os.PathLike, overwrite: bool, *, folder_of: str | None = None) -> Path | epath.Path:
    """Rejects an output that cannot or must not be written, before any work is done for it.

    Args:
      path: the file or folder to write, also in a bucket.
      overwrite: allow an existing output. A folder is replaced as a whole, so it must hold no other files.
      folder_of: the output is a folder of files whose names match this regular expression.

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
    names = sorted(child.name for child in path.iterdir()) if folder_of is not None else [path.name]
    if names and not overwrite:
        raise FileExistsError(f"{path} exists and nothing was overwritten; choose another output or add --overwrite")
    foreign = [name for name in names if folder_of is not None and not re.fullmatch(folder_of, name)]
    if foreign:
        raise FileExistsError(
            f"{path} holds files of other origin ({foreign[0]}), so it is not replaced; choose another output"
        )
    return path


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
    trial = _partial(path)
    try:
        trial.write_bytes(b"")
        trial.unlink()
    except Exception as error:  # each storage raises its own exceptions
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise PermissionError(
            f"cannot write {path}: {lines[0]}; does the bucket exist, with permission to write in it?"
        ) from error


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary name beside `path`. The file replaces `path` if the block succeeds and is removed otherwise.

    If `path` is a link, the file that it points to is replaced. For a bucket, the temporary file is local and is uploaded
    at the end.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="titok_jax-") as folder:
            local = Path(folder) / os.path.basename(path)
            yield local
            _upload(local, as_path(path))
        return
    path = Path(os.path.realpath(path))
    partial = _partial(path)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path | epath.Path) -> Path | epath.Path:
    # The suffix stays the same because Pillow chooses the format by it.
    return path.with_name(f".{_short(path.stem)}.partial-{os.getpid()}{path.suffix}")


def _upload(local: Path, path: epath.Path) -> None:
    """Copies a file to a bucket, first under a temporary name: an interrupted upload would leave an incomplete object."""
    partial = _partial(path)
    try:
        epath.Path(local).copy(partial, overwrite=True)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(Exception):
            partial.unlink()
        raise


@contextlib.contextmanager
def new_folder(path: str | os.PathLike, *, last: str | None = None) -> Iterator[Path]:
    """Yields a new empty folder beside `path`. It replaces `path` and all its contents if the block succeeds.

    If `path` is a link, the folder that it points to is replaced.

    A folder in a bucket cannot be replaced atomically. There the new folder is local, and its files are uploaded at the end.
    The file `last` (by default the last by name) is removed before the others change and written after them, so a folder
    that holds it is complete.

    If the process is killed at any time, the old folder or the new one remains at `path`. (Where the file system cannot
    exchange two names, the old one may remain beside it as `.NAME.old-...`.) The next call for this path removes other
    leftovers.

    Raises:
      FileExistsError: a killed writer had left nothing at `path`; the old folder has been restored.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="titok_jax-") as folder:
            yield Path(folder)
            _upload_folder(Path(folder), as_path(path), last)
        return
    path = Path(os.path.realpath(path))
    name = f".{_short(path.name)}"
    with contextlib.ExitStack() as stack:
        with file_lock(path.parent) as locked:
            existed = path.exists()
            if locked:
                _clean(path, name)
            if path.exists() and not existed:
                raise FileExistsError(f"{path} is back, which a killed process had moved aside; try again to replace it")
            partial = Path(tempfile.mkdtemp(prefix=f"{name}.partial-", dir=path.parent))
            stack.callback(shutil.rmtree, partial, ignore_errors=True)  # also when it holds the old folder
            stack.enter_context(file_lock(partial))  # marks it as in use
        yield partial
        partial.chmod(0o755)
        if not path.exists():
            os.replace(partial, path)
        elif not _exchange(partial, path):
            with file_lock(path.parent):
                old = Path(tempfile.mkdtemp(prefix=f"{name}.old-", dir=path.parent))
                os.replace(path, old)
                os.replace(partial, path)
            shutil.rmtree(old)


def _upload_folder(local: Path, folder: epath.Path, last: str | None) -> None:
    new = {"/".join(names) for names in files_below(local)}
    old = {"/".join(names) for names in files_below(folder)} if folder.exists() else set()
    last = last or max(new)
    if last in old:
        (folder / last).unlink()
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda name: epath.Path(local / name).copy(folder / name, overwrite=True), new - {last}))
        list(threads.map(lambda name: (folder / name).unlink(), old - new - {last}))
    _upload(local / last, folder / last)


def _short(name: str) -> str:
    """Shortens a long name, to leave room for additions within the 255 bytes that a file name may have."""
    data = os.fsencode(name)
    return name if len(data) <= 100 else f"{data[:80].decode(errors='ignore')}-{zlib.crc32(data):08x}"


def _clean(path: Path, name: str) -> None:
    """Removes the leftovers of killed writers of `path`. The old folder is restored if `path` does not exist."""
    for old in path.parent.glob(f"{glob.escape(name)}.old-*"):
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif any(old.iterdir()):
            os.replace(old, path)
    for partial in path.parent.glob(f"{glob.escape(name)}.partial-*"):
        if partial.is_dir():
            with file_lock(partial, wait=False) as unused:
                if unused:
                    shutil.rmtree(partial, ignore_errors=True)


def _exchange(one: Path, two: Path) -> bool:
    """Exchanges two folders atomically. Returns False if the system or the file system cannot (not Linux, NFS)."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if renameat2 is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE: no Python module defines them
    return renameat2(here, os.fsencode(one), here, os.fsencode(two), exchange) == 0


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with as_path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
