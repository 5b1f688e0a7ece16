"""Paths that users give: of this machine, or of a bucket, gs://BUCKET/... Imports no JAX.

In a bucket an object appears whole when it has been written, replaces what had its name, and is read at any place; there
are no folders, links, locks or renames of many at once. `etils.epath` reaches it: by gcsfs, or TensorFlow if there is one.
"""

import atexit
import functools
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import fsspec.config
from etils import epath

HUB_PREFIX = "hf://"  # before owner/name of a repository of the Hugging Face hub, which is no path
_SCHEMES = ("gs", "s3", "az")  # that `etils.epath` knows

# Left to itself, fsspec lists a folder once and remembers: it sees nothing that other processes, or TensorStore in this one,
# write or remove there.
for _scheme in _SCHEMES:
    fsspec.config.conf.setdefault(_scheme, {}).setdefault("use_listings_cache", False)


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is of a storage like "gs://"; not of the hub."""
    return "://" in os.fspath(path) and not os.fspath(path).startswith(HUB_PREFIX)


def as_path(path: str | os.PathLike) -> Path | epath.Path:
    """A `pathlib.Path`, or of a bucket its like from etils, which has the same methods as far as a bucket can.

    Raises:
      ValueError: an unknown storage.
      OSError: what reaches that storage is not installed; the message says how to install it.
    """
    if not is_remote(path):
        return Path(path)
    scheme = os.fspath(path).partition("://")[0]
    if scheme not in _SCHEMES:
        raise ValueError(f"{os.fspath(path)}: unknown storage {scheme}://, expected a path of this machine or gs://")
    if importlib.util.find_spec("tensorflow") is None:  # which etils would use
        try:
            fsspec.get_filesystem_class(scheme)
        except ImportError as error:
            raise OSError(f"{os.fspath(path)} cannot be reached ({error}): pip install 'etils[epath-gcs]'") from None
    return epath.Path(path)


def read_bytes(path: str | os.PathLike, offset: int = 0, length: int | None = None) -> bytes:
    """A part of a file; of one in a bucket nothing else is sent. (A file opened there reads megabytes ahead.)"""
    if is_remote(path):
        end = None if length is None else offset + length
        storage, name = fsspec.url_to_fs(os.fspath(path))
        return storage.cat_file(name, start=offset or None, end=end)
    # Opened anew each time: no file handles to share between threads or to leave out of a pickle.
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(length)


def files_below(folder: str | os.PathLike) -> Iterator[tuple[str, ...]]:
    """The files in a folder and below, in no order: the names on the way to each, its own last. Links are followed."""

    def stem(place: str | os.PathLike) -> str:
        return os.fspath(place).rpartition("://")[2].strip("/")  # which etils may leave out

    top = as_path(folder)
    for place, _, names in top.walk() if is_remote(top) else os.walk(top, followlinks=True):
        between = stem(place).removeprefix(stem(top)).split("/")
        yield from (tuple(filter(None, (*between, name))) for name in names if name)


@functools.cache
def _local_root() -> Path:
    """A folder for copies of remote files, removed when the process ends."""
    root = Path(tempfile.mkdtemp(prefix="titok_jax-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


@functools.cache
def _copied(path: str, length: int, mtime: int) -> Path:
    local = _local_root() / path.replace("://", "/")
    local.parent.mkdir(parents=True, exist_ok=True)
    local.unlink(missing_ok=True)  # whoever still reads a former one keeps it
    as_path(path).copy(local, overwrite=True)
    return local


def local_copy(path: str | os.PathLike) -> Path:
    """For what needs a file of this machine: the path itself or, of a file in a bucket, that of a copy, made once by a
    process (again if the file has changed) and removed at its end. It is named as the original is, for messages about it.

    Raises:
      FileNotFoundError: there is no such file in the bucket.
    """
    if not is_remote(path):
        return Path(path)
    if not as_path(path).is_file():
        raise FileNotFoundError(f"{os.fspath(path)} is not a file")
    found = as_path(path).stat()
    return _copied(os.fspath(path), found.length, found.mtime)


def needs_mount(path: str | os.PathLike, what: str) -> ValueError:
    """The error for what can be read from files of this machine only."""
    return ValueError(
        f"{os.fspath(path)}: {what} is read from files, not from a bucket; mount it (tpu_scripts/with_bucket.sh BUCKET "
        "CMD..., docs/tpu.md) and name the file below /tmp/BUCKET"
    )
