"""Flax files: nested maps in msgpack. An array is an extension of type 1 that holds shape, dtype and bytes as msgpack."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from titok_jax.runtime.messages import shown
from titok_jax.weights.convert import WeightsError
from titok_jax.weights.tensors import DTYPE_NAMES, MOST_AXES, MOST_TENSORS, Tensor, num_bytes

# first byte -> (kind, number of bytes of the length that follows)
_MSGPACK = {
    **{0xC4 + i: ("bin", 1 << i) for i in range(3)},
    **{0xC7 + i: ("ext", 1 << i) for i in range(3)},
    **{0xCC + i: ("int", 1 << i) for i in range(4)},
    **{0xD9 + i: ("str", 1 << i) for i in range(3)},
    **{0xDC + i: ("array", 2 << i) for i in range(2)},
    **{0xDE + i: ("map", 2 << i) for i in range(2)},
}
_LONGEST_NAME = 1000  # bytes of one part of a path


class FlaxFile:
    """Finds the arrays of a Flax checkpoint without reading them. (The msgpack library would read all of them twice.)"""

    def __init__(self, path: Path, file: BinaryIO, size: int):
        self._path, self._file, self._size = path, file, size
        self.tensors: dict[str, Tensor] = {}
        self._entries = 0
        self._map("", self._head("map")[1], 0)
        if file.tell() != size:
            raise self._wrong(f"{size - file.tell()} bytes too many")

    def _wrong(self, what: str) -> WeightsError:
        return WeightsError(f"{self._path} is not a whole Flax checkpoint: {what} (at byte {self._file.tell()})")

    def _read(self, length: int) -> bytes:
        if length > self._size - self._file.tell():
            raise self._wrong("it ends too early")
        return self._file.read(length)

    def _head(self, *expected: str) -> tuple[str, int]:
        """Reads the kind and the length of the next item (for an int, its value). The kind must be an expected one."""
        byte = self._read(1)[0]
        if byte <= 0x7F:
            kind, length = "int", byte
        elif byte <= 0x8F:
            kind, length = "map", byte & 0x0F
        elif byte <= 0x9F:
            kind, length = "array", byte & 0x0F
        elif byte <= 0xBF:
            kind, length = "str", byte & 0x1F
        elif 0xD4 <= byte <= 0xD8:
            kind, length = "ext", 1 << (byte - 0xD4)
        elif byte in _MSGPACK:
            kind, width = _MSGPACK[byte]
            length = int.from_bytes(self._read(width), "big")
        else:
            kind, length = f"type {byte:#x}", 0
        if kind not in expected:
            raise self._wrong(f"expected {' or '.join(expected)}, found {kind}")
        return kind, length

    def _string(self) -> str:
        length = self._head("str")[1]
        if length > _LONGEST_NAME:
            raise self._wrong(f"a name of {length} bytes")
        try:
            return self._read(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self._wrong("a name is not UTF-8") from None

    def _map(self, prefix: str, entries: int, depth: int) -> None:
        if depth > 20:
            raise self._wrong("too deep")
        for _ in range(entries):
            name = prefix + self._string()
            kind, length = self._head("map", "ext")
            if name in self.tensors:
                raise self._wrong(f"{shown(name)} occurs twice")
            self._entries += 1  # maps too
            if self._entries > MOST_TENSORS:
                raise self._wrong(f"more than {MOST_TENSORS} entries")
            if kind == "ext":
                self.tensors[name] = self._array(name, length)
            else:
                self._map(name + "/", length, depth + 1)

    def _array(self, name: str, length: int) -> Tensor:
        code = self._read(1)[0]
        if code != 1:
            raise self._wrong(f"{shown(name)} is of extension type {code}, expected 1 (an array)")
        end = self._file.tell() + length
        if self._head("array")[1] != 3:
            raise self._wrong(f"{shown(name)} is no array")
        axes = self._head("array")[1]
        if axes > MOST_AXES:
            raise self._wrong(f"{shown(name)} has {axes} axes, expected at most {MOST_AXES}")
        shape = tuple(self._head("int")[1] for _ in range(axes))
        dtype_name = self._string()
        dtype = next((dtype for dtype in DTYPE_NAMES if dtype.name == dtype_name), None)
        if dtype is None:
            raise self._wrong(f"{shown(name)} has dtype {shown(dtype_name)}")
        given = self._head("bin")[1]
        if given != num_bytes(shape, dtype) or self._file.tell() + given != end or end > self._size:
            raise self._wrong(f"the bytes of {shown(name)} do not make {dtype_name} {list(shape)}")
        tensor = Tensor(self._file, self._file.tell(), shape, dtype)
        self._file.seek(end)
        return tensor


def write_flax(path: str | os.PathLike, tree: Mapping[str, Any]) -> None:
    """Writes a nested dict of arrays as `flax.serialization.to_bytes` does. Returns when it is on the disk."""
    from flax import serialization

    with open(path, "wb") as file:
        file.write(serialization.msgpack_serialize(tree))
        file.flush()
        os.fsync(file.fileno())
