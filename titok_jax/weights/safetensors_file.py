"""safetensors files: the length of the header in 8 bytes, the header in JSON, then the tensors without gaps.

Our metadata in the header holds the CRC-32 of every tensor, in the order of the header. Other programs ignore it.
"""

import functools
import json
import math
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from titok_jax.runtime.messages import shown
from titok_jax.weights.convert import WeightsError
from titok_jax.weights.tensors import DTYPE_NAMES, DTYPES, MOST_TENSORS, Tensor, num_bytes

# Bytes, for 200,000 tensors. The safetensors library allows 100 MB, which can take gigabytes of memory to read.
_LARGEST_HEADER = 20_000_000
_CHECKSUMS = "crc32"


def read_header(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, str], dict[str, Tensor]]:
    def wrong(what: str) -> WeightsError:
        return WeightsError(f"{path} is not a whole safetensors file: {what}; download or write it again")

    if size < 10:
        raise wrong(f"it has {size} bytes")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(size - 8, _LARGEST_HEADER):
        raise wrong(f"its header should have {length} bytes, the file has {size}")
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:  # ValueError: bad UTF-8 or JSON, a duplicate name, a 5,000-digit number
        raise wrong(f"its header is not valid ({error})") from None
    if not isinstance(header, dict):
        raise wrong("its header is not valid (no object)")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise wrong("its header has bad metadata")
    if len(header) > MOST_TENSORS:
        raise wrong(f"its header has {len(header)} tensors, expected at most {MOST_TENSORS}")
    checksums = metadata[_CHECKSUMS].split(" ") if _CHECKSUMS in metadata else [None] * len(header)
    if len(checksums) != len(header):
        raise wrong(f"its header has {len(checksums)} checksums for {len(header)} tensors")
    spans = []
    tensors = {}
    for (name, entry), checksum in zip(header.items(), checksums, strict=True):
        try:
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise wrong(f"its header has a bad entry for {shown(name)}") from None
        if any(type(n) is not int or not 0 <= n <= size for n in (start, end)) or not isinstance(dtype, str):
            raise wrong(f"its header has a bad entry for {shown(name)}")
        if dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise WeightsError(f"{path}: tensor {shown(name)} has dtype {shown(dtype)}, expected one of {known}")
        needed = num_bytes(shape, DTYPES[dtype])
        if needed is None:
            raise wrong(f"its header has a bad entry for {shown(name)}")
        if end - start != needed:
            raise wrong(f"{shown(name)} has {end - start} bytes, which do not make {dtype} {shape}")
        spans.append((start, end))
        verify = None if checksum is None else functools.partial(_verify, path, name, (dtype, shape), checksum)
        tensors[name] = Tensor(file, 8 + length + start, tuple(shape), DTYPES[dtype], verify)
    position = 0
    for start, end in sorted(spans):
        if start != position:
            raise wrong(f"its tensors overlap or leave a gap at byte {position}")
        position = end
    if 8 + length + position != size:
        raise wrong(f"it should have {8 + length + position} bytes, it has {size}")
    return metadata, tensors


def _checksum(name: str, dtype: str, shape: list[int], raw: np.ndarray) -> str:
    """The CRC-32 of a tensor's name, dtype, shape and bytes. It also detects tensors that were swapped."""
    return f"{zlib.crc32(raw, zlib.crc32(f'{name} {dtype} {shape}'.encode())):08x}"


def _verify(path: Path, name: str, kind: tuple[str, list[int]], checksum: str, raw: np.ndarray) -> None:
    if _checksum(name, *kind, raw) != checksum:
        raise WeightsError(
            f"{path}: tensor {shown(name)} is not what was written (checksum {shown(checksum)}); download or write it again"
        )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def write_safetensors(
    path: str | os.PathLike,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    arrays: Iterable[tuple[str, Any]] | None = None,
) -> None:
    """Writes {name: tensor} in the layout of the safetensors library. Returns when the file is on the disk.

    The header holds the metadata that PyTorch code expects, `metadata`, and checksums.

    Args:
      tensors: arrays, which are read one at a time; or only their shapes and dtypes, with `arrays`.
      arrays: (name, array) of each tensor, in any order. The file is the same in every order.
    """
    order = sorted(tensors, key=lambda name: (-np.dtype(tensors[name].dtype).itemsize, name))
    entries: dict[str, Any] = {}
    position = 0
    for name in order:
        tensor = tensors[name]
        end = position + math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
        entries[name] = {
            "dtype": DTYPE_NAMES[np.dtype(tensor.dtype)],
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
        file.write(header(["0" * 8] * len(order)))  # placeholder; the checksums are computed with the tensors
        begin, checksums = file.tell(), {}
        for name, array in tensors.items() if arrays is None else arrays:
            raw = np.ascontiguousarray(array, tensors[name].dtype).reshape(-1).view(np.uint8)
            file.seek(begin + entries[name]["data_offsets"][0])
            file.write(raw)
            checksums[name] = _checksum(name, entries[name]["dtype"], entries[name]["shape"], raw)
            del array, raw  # before the next one is made
        file.seek(0)
        file.write(header([checksums[name] for name in order]))
        file.flush()
        os.fsync(file.fileno())
