"""Files of tensors, read and written one tensor at a time: safetensors, PyTorch pickles, Flax msgpack.

Which form a file has is told from its content. Nothing of a file is trusted: headers are checked whole before a tensor is
read, no code in a pickle runs, and whatever is wrong is a WeightsError that names the file. Where a file has checksums
(safetensors written here, PyTorch's zip archives), the tensors are compared with them; elsewhere a changed number is a
number like any other.
"""

import contextlib
import ctypes
import functools
import json
import math
import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from titok_jax.convert import WeightsError
from titok_jax.storage import local_copy

FORMS = ("safetensors", "torch", "flax")
_LARGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors library
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Tensor:
    """A tensor in a file, read when it becomes an array.

    Args:
      verify: takes the array's bytes, raises WeightsError if they are not what was written.
    """

    def __init__(
        self,
        file: BinaryIO,
        offset: int,
        shape: tuple[int, ...],
        dtype: np.dtype,
        verify: Callable[[np.ndarray], None] | None = None,
    ):
        self._file, self._offset, self._verify = file, offset, verify
        self.shape, self.dtype = shape, dtype

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = np.empty(self.shape, self.dtype)
        raw = array.reshape(-1).view(np.uint8)
        if array.nbytes:
            self._file.seek(self._offset)
            if self._file.readinto(raw) != array.nbytes:
                raise WeightsError(f"{self._file.name} became shorter while it was read")
        if self._verify is not None:
            self._verify(raw)
        return array if dtype is None else array.astype(dtype)


class Weights(NamedTuple):
    form: str  # one of FORMS
    tensors: dict[str, Any]  # name -> Tensor, or something else with .shape and .dtype that np.asarray reads


@contextlib.contextmanager
def open_weights(path: str | os.PathLike) -> Iterator[Weights]:
    """The tensors of a file in any of the forms, also in a bucket. A Flax tree's names are its paths joined by "/".

    Raises:
      FileNotFoundError: there is no such file.
      WeightsError: the file is damaged, of another form, or contains more than tensors.
    """
    path = local_copy(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    with open(path, "rb") as file:
        form = _form(path, file.read(16))
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if form == "safetensors":
            yield Weights(form, _header(path, file, size)[1])
        elif form == "flax":
            yield Weights(form, _Msgpack(path, file, size).tensors)
        else:
            yield Weights(form, _torch(path))


_OTHERS = {
    b"\x89PNG": "an image (PNG)",
    b"\xff\xd8\xff": "an image (JPEG)",
    b"GIF8": "an image (GIF)",
    b"RIFF": "an image or a sound (RIFF)",
    b"version https://": "the place of a file that Git LFS has not downloaded (git lfs pull)",
    b"<": "a page of the web, not the file",
    b"\x1f\x8b": "compressed (gzip)",
}


def _form(path: Path, start: bytes) -> str:
    for beginning, what in _OTHERS.items():
        if start.startswith(beginning):
            raise WeightsError(f"{path} holds no weights: it is {what}")
    if start[8:9] == b"{":
        return "safetensors"
    if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        return "torch"
    if start[:1] and (0x81 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF)):
        return "flax"
    # Damaged in the first bytes, or something else: what it should be says the name, if it says anything.
    if path.suffix == ".safetensors":
        return "safetensors"
    raise WeightsError(
        f"{path} is no file of weights: expected safetensors, a PyTorch file (.bin, .pth) or a Flax msgpack checkpoint; "
        f"it starts with {start!r}" + ("" if start else " (it is empty)")
    )


# ---------------------------------------------------------------------------------------------------------------------
# safetensors: 8 bytes length of the header, the header in JSON, the tensors without gaps. In the header's metadata we write
# the CRC-32 of every tensor, in the order of the header; other programs do not read them.

_CHECKSUMS = "crc32"


def safetensors_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The metadata in a safetensors file's header; {} of a file of another form. Errors as of `open_weights`."""
    path = Path(path)
    with open(path, "rb") as file:
        if _form(path, file.read(16)) != "safetensors":
            return {}
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        return _header(path, file, size)[0]


def _header(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, str], dict[str, Tensor]]:
    def wrong(what: str) -> WeightsError:
        return WeightsError(f"{path} is not a whole safetensors file: {what}; download or write it again")

    if size < 10:
        raise wrong(f"it has {size} bytes")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(size - 8, _LARGEST_HEADER):
        raise wrong(f"its header should have {length} bytes, the file has {size}")
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:  # ValueError: bad UTF-8, bad JSON, a name twice, a number of 5,000 digits
        raise wrong(f"its header is not valid ({error})") from None
    if not isinstance(header, dict):
        raise wrong("its header is not valid (no object)")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise wrong("its header has bad metadata")
    checksums = metadata[_CHECKSUMS].split(" ") if _CHECKSUMS in metadata else [None] * len(header)
    if len(checksums) != len(header):
        raise wrong(f"its header has {len(checksums)} checksums for {len(header)} tensors")
    spans = []
    tensors = {}
    for (name, entry), checksum in zip(header.items(), checksums, strict=True):
        try:
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise wrong(f"its header has a bad entry for {name!r}") from None
        numbers = shape if isinstance(shape, list) else [None]
        if any(type(n) is not int or n < 0 for n in [*numbers, start, end]) or not isinstance(dtype, str):
            raise wrong(f"its header has a bad entry for {name!r}")
        if dtype not in _DTYPES:
            raise WeightsError(f"{path}: tensor {name} has dtype {dtype}, expected one of {', '.join(_DTYPES)}")
        if end - start != math.prod(shape) * _DTYPES[dtype].itemsize:
            raise wrong(f"{name} has {end - start} bytes, which do not make {dtype} {shape}")
        spans.append((start, end))
        verify = None if checksum is None else functools.partial(_verify, path, name, (dtype, shape), checksum)
        tensors[name] = Tensor(file, 8 + length + start, tuple(shape), _DTYPES[dtype], verify)
    position = 0
    for start, end in sorted(spans):
        if start != position:
            raise wrong(f"its tensors overlap or leave a gap at byte {position}")
        position = end
    if 8 + length + position != size:
        raise wrong(f"it should have {8 + length + position} bytes, it has {size}")
    return metadata, tensors


def _checksum(name: str, dtype: str, shape: list[int], raw: np.ndarray) -> str:
    """Of a tensor's name, dtype, shape and bytes, so that no two tensors can be mistaken for each other either."""
    return f"{zlib.crc32(raw, zlib.crc32(f'{name} {dtype} {shape}'.encode())):08x}"


def _verify(path: Path, name: str, kind: tuple[str, list[int]], checksum: str, raw: np.ndarray) -> None:
    if _checksum(name, *kind, raw) != checksum:
        raise WeightsError(
            f"{path}: tensor {name} is not what was written (checksum {checksum}); download or write it again"
        )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def write_safetensors(
    path: str | os.PathLike, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes {name: tensor}, each made an array when its turn comes; the layout is that of the safetensors library, with
    the metadata that PyTorch code expects, `metadata` and checksums. Returns when it is on the disk."""
    order = sorted(tensors, key=lambda name: (-np.dtype(tensors[name].dtype).itemsize, name))
    entries: dict[str, Any] = {}
    position = 0
    for name in order:
        tensor = tensors[name]
        end = position + math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
        entries[name] = {
            "dtype": _NAMES[np.dtype(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end

    def header(checksums: list[str]) -> bytes:
        everything = {"__metadata__": {"format": "pt", **(metadata or {}), _CHECKSUMS: " ".join(checksums)}, **entries}
        text = json.dumps(everything, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    with open(path, "wb") as file:
        file.write(header(["0" * 8] * len(order)))  # its place; the checksums come with the tensors
        checksums = []
        for name in order:
            raw = np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8)
            file.write(raw)
            checksums.append(_checksum(name, entries[name]["dtype"], entries[name]["shape"], raw))
        file.seek(0)
        file.write(header(checksums))
        file.flush()
        os.fsync(file.fileno())


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch: a pickle, in a zip archive since version 1.6


def import_torch(path: Path, purpose: str):
    """The module torch; without it a WeightsError that says what it is needed for: to "read" or "write" the file."""
    try:
        import torch
    except ImportError:
        raise WeightsError(
            f"{path} is a PyTorch file and PyTorch is not installed, which is needed to {purpose} it: "
            "pip install torch, or convert it to .safetensors where PyTorch is (tools/convert_weights.py)"
        ) from None
    return torch


class _TorchTensor:
    """A tensor of PyTorch, with numpy's dtype.

    Args:
      mapped: its memory is pages of the file, which are given back to the system once it is an array.
    """

    def __init__(self, tensor: Any, torch: Any, mapped: bool):
        self._tensor, self._bfloat16 = tensor, tensor.dtype == torch.bfloat16
        self._int16, self._mapped = torch.int16, mapped
        self.shape = tuple(tensor.shape)
        name = str(tensor.dtype).removeprefix("torch.")
        self.dtype = np.dtype(ml_dtypes.bfloat16) if self._bfloat16 else np.dtype(name)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        tensor = self._tensor.detach()
        array = tensor.view(self._int16).numpy().view(ml_dtypes.bfloat16) if self._bfloat16 else tensor.numpy()
        array = np.array(array, dtype)
        if self._mapped:
            storage = tensor.untyped_storage()
            _release(storage.data_ptr(), storage.nbytes())
        return array


def _release(address: int, length: int) -> None:
    """Drops the pages of a private, unchanged mapping of a file from memory; read again, they come from the file."""
    if length and hasattr(mmap, "MADV_DONTNEED"):
        start = address // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(address + length - start), ctypes.c_int(mmap.MADV_DONTNEED)
        )


def _check_archive(path: Path) -> None:
    """Reads a zip archive of PyTorch once, against its checksums (it may have been written without). PyTorch does not."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if compressed or sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("its archive is not one of PyTorch")
        for entry in entries:
            with archive.open(entry) as file:
                while entry.CRC and file.read(1 << 20):
                    pass


def _torch(path: Path) -> dict[str, _TorchTensor]:
    torch = import_torch(path, "read")
    mapped = zipfile.is_zipfile(path)  # a file of the old form (before PyTorch 1.6) cannot be mapped into memory
    try:
        if mapped:
            _check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (
        Exception
    ) as error:  # it fails in many ways: RuntimeError, UnpicklingError, EOFError, KeyError, AttributeError, ...
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = next((line for line in lines if "Unsupported" in line or "GLOBAL" in line), lines[0])
        raise WeightsError(
            f"{path} is damaged, or holds more than tensors, such as code, which is not run: {reason[:300]}"
        ) from None
    if not isinstance(state, Mapping):
        raise WeightsError(f"{path}: expected a state dict (names and tensors), found {type(state).__name__}")
    tensors = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise WeightsError(
                f"{path}: expected a state dict (names and tensors), found {type(tensor).__name__} under {name!r}; save "
                "only the state dict of the model"
            )
        try:
            tensors[name] = _TorchTensor(tensor, torch, mapped)
            if tensor.layout != torch.strided:
                raise TypeError
        except TypeError:
            raise WeightsError(f"{path}: tensor {name} is {tensor.dtype} and {tensor.layout}, which is not read") from None
    return tensors


def write_torch(path: str | os.PathLike, tensors: Mapping[str, Any]) -> None:
    """Writes {name: tensor} as `torch.save` writes a state dict. Returns when it is on the disk.

    Raises:
      WeightsError: PyTorch is not installed.
    """
    torch = import_torch(Path(path), "write")
    state = {}
    for name, tensor in tensors.items():
        array = np.array(tensor)  # a copy: PyTorch does not take read-only arrays
        if array.dtype == ml_dtypes.bfloat16:
            state[name] = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        else:
            state[name] = torch.from_numpy(array)
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


# ---------------------------------------------------------------------------------------------------------------------
# Flax: msgpack of nested maps; an array is extension type 1, in it msgpack again: (shape, name of the dtype, bytes)

# first byte -> (kind, bytes of the length that follow)
_MSGPACK = {
    **{0xC4 + i: ("bin", 1 << i) for i in range(3)},
    **{0xC7 + i: ("ext", 1 << i) for i in range(3)},
    **{0xCC + i: ("int", 1 << i) for i in range(4)},
    **{0xD9 + i: ("str", 1 << i) for i in range(3)},
    **{0xDC + i: ("array", 2 << i) for i in range(2)},
    **{0xDE + i: ("map", 2 << i) for i in range(2)},
}


class _Msgpack:
    """Finds the arrays of a Flax checkpoint without reading them. (The msgpack library would read them all, twice.)"""

    def __init__(self, path: Path, file: BinaryIO, size: int):
        self._path, self._file, self._size = path, file, size
        self.tensors: dict[str, Tensor] = {}
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
        """Kind and length (of an int: its value) of what comes next, which must be of an expected kind."""
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
        try:
            return self._read(self._head("str")[1]).decode("utf-8")
        except UnicodeDecodeError:
            raise self._wrong("a name is not UTF-8") from None

    def _map(self, prefix: str, entries: int, depth: int) -> None:
        if depth > 20:
            raise self._wrong("too deep")
        for _ in range(entries):
            name = prefix + self._string()
            kind, length = self._head("map", "ext")
            if name in self.tensors:
                raise self._wrong(f"{name} occurs twice")
            if kind == "ext":
                self.tensors[name] = self._array(name, length)
            else:
                self._map(name + "/", length, depth + 1)

    def _array(self, name: str, length: int) -> Tensor:
        code = self._read(1)[0]
        if code != 1:
            raise self._wrong(f"{name} is of extension type {code}, expected 1 (an array)")
        end = self._file.tell() + length
        if self._head("array")[1] != 3:
            raise self._wrong(f"{name} is no array")
        shape = tuple(self._head("int")[1] for _ in range(self._head("array")[1]))
        dtype_name = self._string()
        if dtype_name not in {dtype.name for dtype in _NAMES}:
            raise self._wrong(f"{name} has dtype {dtype_name!r}")
        dtype = next(dtype for dtype in _NAMES if dtype.name == dtype_name)
        num_bytes = self._head("bin")[1]
        if num_bytes != math.prod(shape) * dtype.itemsize or self._file.tell() + num_bytes != end or end > self._size:
            raise self._wrong(f"the bytes of {name} do not make {dtype_name} {list(shape)}")
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
