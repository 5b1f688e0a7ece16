"""Reads .npz files of any origin: what a member claims is compared with what the file holds before anything is allocated."""

import contextlib
import math
import os
import weakref
import zipfile
from collections.abc import Iterator
from typing import IO, NamedTuple, Self

import numpy as np

from titok_jax.runtime.paths import as_path

MOST_BYTES = 2**28  # of an array that is read as a whole
_EXPANDED = 1032  # DEFLATE makes at most this of a byte


class Member(NamedTuple):
    """An array in a file, whose data is read from `stream`; `stream.tell() == start` at its first byte."""

    stream: IO[bytes]
    start: int
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool


class NpzFile:
    """An open .npz file.

    Attributes:
      path: the file, as it was given.
      names: the names of the arrays.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: on opening or reading: not such a file, damaged, encrypted, compressed in a way that NumPy does not write,
        or an array that claims more than the file holds, holds Python objects or has more than MOST_BYTES. The message is
        one sentence that begins with the path.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = path
        if not as_path(path).is_file():
            raise FileNotFoundError(f"{path} is not a file")
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(as_path(path).open("rb"))
            stack.enter_context(self._errors())
            if file.read(6) == b"\x93NUMPY":
                raise ValueError("it is a single array, as in .npy files")
            self._length = file.seek(0, os.SEEK_END)
            self._zip = stack.enter_context(zipfile.ZipFile(file))
            members = [name.removesuffix(".npy") for name in self._zip.namelist()]
            if len(set(members)) != len(members):
                raise ValueError(f"it holds {max(members, key=members.count)} twice")
            self.names = tuple(members)
            self._open = stack.pop_all()
        weakref.finalize(self, self._open.close)  # of a file that nobody closes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        self._open.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            raise
        except Exception as error:  # zipfile, zlib and NumPy's parser of headers raise many kinds
            reason = str(error).partition("\n")[0][:200] or type(error).__name__
            raise ValueError(f"{self.path} is no .npz file that can be read: {reason}") from None

    def open(self, name: str) -> Member:
        """Opens an array to read parts of its data. What it claims is checked."""
        with self._errors():
            if name not in self.names:
                raise ValueError(f"it holds {', '.join(self.names[:5]) or 'nothing'}, expected {name}")
            info = self._zip.getinfo(f"{name}.npy")
            if info.flag_bits & 1:
                raise ValueError(f"{name} is encrypted")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{name} is compressed by method {info.compress_type}, expected none or DEFLATE (8)")
            most = info.compress_size * (1 if info.compress_type == zipfile.ZIP_STORED else _EXPANDED) + 64
            if info.compress_size > self._length or info.file_size > most:
                raise ValueError(f"{name} claims {info.file_size:,} bytes, more than {info.compress_size:,} can hold")
            stream = self._zip.open(info)
            version = np.lib.format.read_magic(stream)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
            if read is None:
                raise ValueError(f"{name} is of version {version}")
            shape, fortran_order, dtype = read(stream)
            claimed, held = math.prod(shape) * dtype.itemsize, info.file_size - stream.tell()
            if dtype.hasobject:
                raise ValueError(f"{name} holds Python objects, which are not loaded")
            if claimed != held or min(shape, default=0) < 0 or not dtype.itemsize:
                raise ValueError(f"{name} claims to be {dtype} {list(shape)} of {claimed:,} bytes, but has {held:,}")
        return Member(stream, stream.tell(), shape, dtype, fortran_order)

    def read(self, name: str, most: int = MOST_BYTES) -> np.ndarray:
        """Reads an array as a whole, which may have `most` bytes."""
        member = self.open(name)
        with member.stream, self._errors():
            size = math.prod(member.shape) * member.dtype.itemsize
            if size > most:
                raise ValueError(f"{name} has {size:,} bytes, expected at most {most:,}")
            data = np.frombuffer(self.read_bytes(member, size), member.dtype)
            return data.reshape(member.shape, order="F" if member.fortran_order else "C")

    def text(self, name: str, most: int) -> str:
        """Reads a single text, which may have `most` bytes."""
        array = self.read(name, most)
        with self._errors():
            if array.shape != () or array.dtype.kind != "U":
                raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, expected a text")
            return str(array)

    def read_bytes(self, member: Member, size: int) -> bytes:
        """Reads the next bytes of a member."""
        with self._errors():
            data = member.stream.read(size)
            if len(data) != size:
                raise ValueError(f"it is cut short: {len(data):,} bytes in place of {size:,}")
            return data
