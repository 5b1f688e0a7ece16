"""Paths that users give: local paths, paths in a bucket, gs://BUCKET/..., and files on the web. Imports no JAX.

An object in a bucket appears only when it is completely written. It replaces an object of the same name, and can be read
from any offset. A bucket has no folders, no links, no locks and no renaming of many objects at once. `etils.epath` accesses
it through TensorFlow if that is installed, otherwise through gcsfs, or s3fs for s3://. Files on the web, https://..., are
only read, by `open_bytes` and `read_bytes`.
"""

import atexit
import contextlib
import errno
import functools
import importlib.util
import os
import shutil
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import fsspec
import fsspec.config
from etils import epath

HUB_PREFIX = "hf://"  # hf://owner/name is a repository on the Hugging Face hub, not a path
_SCHEMES = ("gs", "s3", "az")  # the storages that `etils.epath` knows
_WEB = ("http", "https")
_INSTALL = {"gs": "'etils[epath-gcs]'", "s3": "'titok_jax[s3]'", "az": "adlfs"} | dict.fromkeys(_WEB, "'titok_jax[http]'")

# By default, fsspec caches folder listings. It would miss what other processes, or TensorStore in this one, write or remove.
for _scheme in _SCHEMES:
    fsspec.config.conf.setdefault(_scheme, {}).setdefault("use_listings_cache", False)


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is in a storage such as gs://. False for the hub."""
    return "://" in os.fspath(path) and not os.fspath(path).startswith(HUB_PREFIX)


def is_web(path: str | os.PathLike) -> bool:
    """Whether a path is the address of a file on the web."""
    return os.fspath(path).startswith(tuple(f"{scheme}://" for scheme in _WEB))


def as_path(path: str | os.PathLike) -> Path | epath.Path:
    """Returns a `pathlib.Path`, or for a bucket an `epath.Path`, which has the methods that a bucket can support.

    Raises:
      ValueError: an unknown storage, or the web, of which a file can only be read.
      OSError: the package for that storage is not installed; the message says how to install it.
    """
    if not is_remote(path):
        return Path(path)
    scheme = os.fspath(path).partition("://")[0]
    if scheme in _WEB:
        raise ValueError(f"{os.fspath(path)}: {scheme}:// is only for tars (webdataset) and Parquet files that are read")
    if scheme not in _SCHEMES:
        raise ValueError(f"{os.fspath(path)}: unknown storage {scheme}://, expected a path of this machine or gs://")
    if importlib.util.find_spec("tensorflow") is None:  # etils would use TensorFlow
        _check_installed(path, scheme)
    return epath.Path(path)


def _check_installed(path: str | os.PathLike, scheme: str) -> None:
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise OSError(f"{os.fspath(path)} cannot be reached ({error}): pip install {_INSTALL[scheme]}") from None


@contextlib.contextmanager
def _web_storage(path: str | os.PathLike) -> Iterator[tuple[fsspec.AbstractFileSystem, str]]:
    """Yields (what reads the web, the address). Errors of aiohttp in the block become OSErrors that name `path`."""
    _check_installed(path, os.fspath(path).partition("://")[0])
    try:
        yield fsspec.url_to_fs(os.fspath(path))
    except Exception as error:
        if not type(error).__module__.startswith("aiohttp"):
            raise
        raise OSError(f"{os.fspath(path)} cannot be read: {error or type(error).__name__}") from error


def is_file(path: str | os.PathLike) -> bool:
    """Whether there is such a file: on this machine, in a bucket or on the web. No name is too long to ask for."""
    if not is_remote(path):
        return os.path.isfile(path)
    if not is_web(path):
        return as_path(path).is_file()
    with _web_storage(path) as (storage, name):
        return storage.isfile(name)


def check_bucket_output(path: str | os.PathLike) -> None:
    """Raises ValueError if the name of an output in a bucket has characters of globs.

    By such a name fsspec would remove and rename all that it matches.
    """
    path = os.fspath(path)
    if any(char in path for char in "*?["):
        raise ValueError(f"cannot write {path}: names in a bucket may have no *, ? or [ to be written; choose another")


def file_size(path: str | os.PathLike) -> int:
    """The size of a file in bytes: on this machine, in a bucket or on the web. 0 if a web server does not tell it."""
    if is_web(path):
        with _web_storage(path) as (storage, name):
            return storage.info(name).get("size") or 0
    found = as_path(path).stat()
    return found.length if is_remote(path) else found.st_size


@contextlib.contextmanager
def open_bytes(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Opens a file of this machine, of a bucket or of the web, for reading at any offset, until the block ends."""
    if not is_web(path):
        with as_path(path).open("rb") as file:
            yield file
        return
    with _web_storage(path) as (storage, name), storage.open(name, "rb") as file:
        yield file


def read_bytes(path: str | os.PathLike, offset: int = 0, length: int | None = None, *, most: int | None = None) -> bytes:
    """Reads a part of a file. From a bucket only this part is sent. (An open file in a bucket reads megabytes ahead.)

    Raises:
      OSError: it cannot be read, or a web server sends whole files only.
      ValueError: it is no regular file, or the part has more than `most` bytes (not known of whole files elsewhere).
    """
    _check_length(path, length, most)
    try:
        return _read_bytes(path, offset, length, most)
    except OSError as error:
        name_file(error, path)
        raise


def _read_bytes(path: str | os.PathLike, offset: int, length: int | None, most: int | None) -> bytes:
    end = None if length is None else offset + length
    if is_web(path):
        with _web_storage(path) as (storage, name):
            data = storage.cat_file(name, start=offset or None, end=end)
        if length is not None and len(data) > length:
            raise OSError(f"{os.fspath(path)}: this server sends whole files, not parts of them; copy the file")
        return data
    if is_remote(path):
        storage, name = fsspec.url_to_fs(os.fspath(path))
        return storage.cat_file(name, start=offset or None, end=end)
    # Opened on each call, so that threads share no file handle and pickles hold none.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        found = os.fstat(file.fileno())
        check_regular(path, found)  # a pipe would wait for ever, and a device might never end
        _check_length(path, min(found.st_size - offset, found.st_size if length is None else length), most)
        file.seek(offset)
        return file.read(length)


def name_file(error: BaseException | None, path: str | os.PathLike) -> None:
    """Makes an OSError name the file if it names none: a failing disk gives only "Input/output error"."""
    if isinstance(error, OSError) and error.filename is None and error.errno is not None:
        error.filename = os.fspath(path)


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Makes the error that a full or failing disk raises in the block say what was being written. By itself it does not.

    Raises:
      OSError: "cannot write PATH: No space left on device" and the like.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
        reason = error.strerror
        if error.errno == errno.EIO:
            reason += ", of its disk or of what is read for it"
        raise OSError(f"cannot write {os.fspath(path)}: {reason}") from error


def short_name(name: str) -> str:
    """Shortens a long name, to leave room for additions within the 255 bytes that a file name may have."""
    data = os.fsencode(name)
    return name if len(data) <= 100 else f"{data[:80].decode(errors='ignore')}-{zlib.crc32(data):08x}"


def _check_length(path: str | os.PathLike, length: int | None, most: int | None) -> None:
    if length is not None and most is not None and length > most:
        raise ValueError(f"{os.fspath(path)}: {length:,} bytes to read at once, expected at most {most:,}")


def check_regular(path: str | os.PathLike, found: os.stat_result) -> None:
    """Raises ValueError if `found` is not of a regular file."""
    kinds = {stat.S_IFIFO: "pipe", stat.S_IFCHR: "device", stat.S_IFBLK: "device", stat.S_IFSOCK: "socket"}
    if not stat.S_ISREG(found.st_mode):
        kind = kinds.get(stat.S_IFMT(found.st_mode), "folder")
        raise ValueError(f"{os.fspath(path)}: it is a {kind}, expected a file")


def files_below(folder: str | os.PathLike, wanted: Callable[[str], bool] | None = None) -> Iterator[tuple[str, ...]]:
    """Yields the files in a folder and its sub-folders, in no particular order, each as a tuple of path components.

    Links are followed, except those to a folder that they are in. Hidden folders and those of operating systems
    (`is_system_name`) are left out.

    Args:
      wanted: says by the name which files to yield. These must be regular files. A link may then not lead to a file out of
        the folder: of a folder that came from elsewhere, it could name any file of this machine.

    Raises:
      OSError: a folder that cannot be read; the message names it.
      ValueError: a file that is not as `wanted` says.
    """
    if is_remote(folder):
        for names in objects_below(folder):
            if not any(map(is_system_name, names[:-1])) and (wanted is None or wanted(names[-1])):
                yield names
        return
    top = os.fspath(folder)
    for between, entry in _local_files(top, (), _identities(os.path.realpath(top))):
        if wanted is None or wanted(entry.name):
            if wanted is not None:
                _check_found(entry, top)
            yield (*between, entry.name)


def objects_below(folder: str | os.PathLike) -> Iterator[tuple[str, ...]]:
    """Yields all objects in a folder of a bucket, also hidden ones, in the form of `files_below`."""

    def stem(place: str | os.PathLike) -> str:
        return os.fspath(place).rpartition("://")[2].strip("/")  # etils may leave out the scheme

    top = as_path(folder)
    for place, _, names in top.walk():
        between = tuple(filter(None, stem(place).removeprefix(stem(top)).split("/")))
        yield from ((*between, name) for name in names if name)


def _check_found(entry: os.DirEntry, top: str) -> None:
    """Raises ValueError if a file found below `top` is no regular file, or a link to a file out of its folder and `top`."""
    if entry.is_symlink():
        real = Path(os.path.realpath(entry.path))
        if not real.exists():
            raise ValueError(f"{entry.path}: it is a link to {os.readlink(entry.path)}, which does not exist")
        if not any(real.is_relative_to(os.path.realpath(folder)) for folder in (top, os.path.dirname(entry.path))):
            raise ValueError(f"{entry.path}: it is a link out of the folder, to {real}; copy the file, or link its folder")
    if not entry.is_file():  # asks the disk only about links
        check_regular(entry.path, entry.stat())


def is_system_name(name: str) -> bool:
    """Whether a folder is hidden, or one that operating systems and archives leave among a user's folders."""
    return name.startswith((".", "@")) or name in ("__MACOSX", "__pycache__", "lost+found", "$RECYCLE.BIN")


def folders_in(folder: str | os.PathLike) -> list[str]:
    """The sorted names of the folders directly in a local folder, without `is_system_name` and links to a folder above."""
    above = _identities(os.path.realpath(folder))
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and _is_entered(entry, above))


def _is_entered(folder: os.DirEntry, above: tuple[tuple[int, int], ...]) -> bool:
    """Whether a folder is looked into: it is no `is_system_name`, and no link to one of the folders `above`."""
    return not is_system_name(folder.name) and _identity(folder.path) not in above


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _identities(path: str) -> tuple[tuple[int, int], ...]:
    """The identities of a folder and of all folders above it."""
    return tuple(_identity(str(place)) for place in (Path(path), *Path(path).parents))


def _local_files(
    folder: str, between: tuple[str, ...], above: tuple[tuple[int, int], ...]
) -> Iterator[tuple[tuple[str, ...], os.DirEntry]]:
    """The files below a folder, each with the names of the folders between; `above` has the identities of the folder and of
    all folders above it."""
    try:
        with os.scandir(folder) as scanned:
            entries = list(scanned)
    except OSError as error:
        raise type(error)(f"{folder}: the folder cannot be read ({error.strerror})") from None
    for entry in entries:
        if not entry.is_dir():
            yield between, entry
        elif _is_entered(entry, above):
            yield from _local_files(entry.path, (*between, entry.name), (*above, _identity(entry.path)))


@functools.cache
def _local_root() -> Path:
    """A local folder for copies of remote files. It is removed when the process ends."""
    root = Path(tempfile.mkdtemp(prefix="titok_jax-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


@functools.cache
def _copied(path: str, length: int, mtime: int) -> Path:
    local = _local_root() / path.replace("://", "/")
    local.parent.mkdir(parents=True, exist_ok=True)
    local.unlink(missing_ok=True)  # a reader that has the previous copy open keeps it
    # fsspec's own way copies what the name matches as a glob.
    with writing(local), open_bytes(path) as file, local.open("wb") as copy:
        shutil.copyfileobj(file, copy, 2**20)
    return local


def local_copy(path: str | os.PathLike) -> Path:
    """Returns a local path for code that needs one: the path itself, or that of a copy if the file is in a bucket.

    A process copies a file once, and again if the file has changed. The copy is removed when the process ends. It has the
    name of the original, so that messages show it.

    Raises:
      FileNotFoundError: there is no such file in the bucket.
    """
    if not is_remote(path):
        return Path(path)
    if not as_path(path).is_file():
        raise FileNotFoundError(f"{os.fspath(path)} is not a file")
    found = as_path(path).stat()
    return _copied(os.fspath(path), found.length, found.mtime)


def cache_folder() -> Path | None:
    """The folder of what this package may remember between processes; it need not exist. None without a home folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "titok_jax" if os.path.isabs(base) else None


def needs_mount(path: str | os.PathLike, what: str) -> ValueError:
    """The error for formats that can only be read from local files."""
    return ValueError(
        f"{os.fspath(path)}: {what} is read from files, not from a bucket; mount it (tpu_scripts/with_bucket.sh BUCKET "
        "CMD..., docs/tpu.md) and name the file below /tmp/BUCKET"
    )
