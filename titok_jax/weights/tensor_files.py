"""Weights files, read one tensor at a time: safetensors, PyTorch pickles, Flax msgpack.

The format is detected from the contents of the file. No part of a file is trusted: headers are checked completely before a
tensor is read, code in a pickle never runs, and every problem is a WeightsError that names the file. If a file has checksums
(safetensors written here, PyTorch's zip archives), the tensors are checked against them. Without checksums, a changed number
cannot be detected.
"""

import contextlib
import json
import os
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from titok_jax.runtime.messages import first_lines, say_once, shown
from titok_jax.runtime.paths import local_copy
from titok_jax.weights import kinds
from titok_jax.weights.config_files import INDEX
from titok_jax.weights.convert import WeightsError
from titok_jax.weights.flax_file import FlaxFile
from titok_jax.weights.safetensors_file import read_header
from titok_jax.weights.torch_file import read_torch

FORMATS = ("safetensors", "torch", "flax")
EXPECTED = "safetensors, a PyTorch file (.bin, .pth) or a Flax msgpack checkpoint"
_PREFIXES = ("module.", "_orig_mod.")  # before each name, of torch's data parallel and compiled modules
_MOST_PARTS = 1000


class Weights(NamedTuple):
    format: str  # one of FORMATS
    tensors: dict[str, Any]  # name -> Tensor, or another object with .shape and .dtype that np.asarray reads


@contextlib.contextmanager
def open_weights(path: str | os.PathLike) -> Iterator[Weights]:
    """Opens the tensors of a file in any of the formats, also in a bucket. Names in a Flax tree are paths joined by "/".

    Of an index (`model.safetensors.index.json`) the tensors of all its files are opened. A prefix that PyTorch's wrappers
    put before every name is removed, which is said.

    Raises:
      FileNotFoundError: there is no such file, or a part of an index is missing.
      WeightsError: the file is damaged, has another format, or contains more than tensors.
    """
    path = local_copy(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    with contextlib.ExitStack() as stack:
        if is_index(path):
            weights = _open_parts(path, stack)
        else:
            weights = _open_one(path, stack)
        yield weights._replace(tensors=_without_prefix(path, weights.tensors))


def _open_one(path: Path, stack: contextlib.ExitStack) -> Weights:
    file = stack.enter_context(path.open("rb"))
    format = _detect_format(path, file.read(16))
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if format == "safetensors":
        return Weights(format, read_header(path, file, size)[1])
    if format == "flax":
        return Weights(format, FlaxFile(path, file, size).tensors)
    return Weights(format, read_torch(path))


def _without_prefix(path: Path, tensors: dict[str, Any]) -> dict[str, Any]:
    removed = ""
    while tensors and (prefix := next((p for p in _PREFIXES if all(n.startswith(removed + p) for n in tensors)), "")):
        removed += prefix
    if removed:
        say_once(f"{path}: removing the prefix {removed} from the names of its {len(tensors)} tensors")
    return {name.removeprefix(removed): tensor for name, tensor in tensors.items()}


def is_index(path: Path) -> bool:
    """Whether a file is the index of weights in several parts, by its name."""
    return path.name.endswith(INDEX)


def part_names(index: Path) -> dict[str, set[str]]:
    """The files beside an index that hold its tensors, each with their names.

    Raises:
      WeightsError: it is no index, or it names a file elsewhere.
    """
    try:
        if index.stat().st_size > 20_000_000:
            raise ValueError("it is too large")
        parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(parts, dict) or not parts or not all(isinstance(part, str) for part in parts.values()):
            raise ValueError("its weight_map gives no files")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WeightsError(f"{index} is no index of weights: {shown(error or type(error).__name__)}") from None
    names: dict[str, set[str]] = {}
    for name, part in parts.items():
        names.setdefault(part, set()).add(name)
    wrong = next((part for part in names if part in ("", "..") or Path(part).name != part or set(part) & {"\\", "\0"}), None)
    if wrong is not None:
        raise WeightsError(f"{index} names the file '{shown(wrong)}', expected files in its own folder")
    if len(names) > _MOST_PARTS:
        raise WeightsError(f"{index} names {len(names)} files, expected at most {_MOST_PARTS}")
    return names


def parts(path: Path) -> list[Path]:
    """A file of weights; of an index, itself and the files that it names. Errors as in `part_names`."""
    return [path, *(path.with_name(part) for part in part_names(path))] if is_index(path) else [path]


def tensor_names(path: Path) -> Collection[str] | None:
    """The names of the tensors of a file; None for a PyTorch file, which would have to be loaded. Errors as in
    `open_weights`."""
    if is_index(path):
        return set().union(*part_names(path).values())
    with open(path, "rb") as file:
        if _detect_format(path, file.read(16)) == "torch":
            return None
    with open_weights(path) as (_, tensors):
        return list(tensors)


def _open_parts(index: Path, stack: contextlib.ExitStack) -> Weights:
    names = part_names(index)
    paths = {part: local_copy(index.with_name(part)) for part in names}
    missing = [shown(part) for part, path in paths.items() if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{index}: of its {len(names)} files there are missing: {', '.join(first_lines(missing))}")
    formats, tensors = set(), {}
    for part, path in paths.items():
        format, found = _open_one(path, stack)
        if found.keys() != names[part]:
            name = min(found.keys() ^ names[part])
            where = "is there" if name in found else "is not there"
            raise WeightsError(
                f"{path} does not fit {index.name}: tensor {shown(name)} {where}, and the index says otherwise"
            )
        formats.add(format)
        tensors |= found
    if len(formats) > 1:
        raise WeightsError(f"{index}: its files are of several formats, {', '.join(sorted(formats))}")
    return Weights(formats.pop(), tensors)


def _detect_format(path: Path, start: bytes) -> str:
    if start[6:9] == b"\0\0{":  # the end of a length of 8 bytes, and the header
        return "safetensors"
    what = kinds.other_file(start)
    if what is None and start[:4] == b"PK\x03\x04" and not _is_torch_archive(path):
        what = "a zip archive, such as arrays (.npz)"
    if what is not None:
        raise WeightsError(f"{path} holds no weights: it is {what}; expected {EXPECTED}")
    if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        return "torch"
    if start[:1] and (0x81 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF)):
        return "flax"
    # The first bytes are damaged, or the file is something else. If the name ends in .safetensors, read it as such.
    if path.suffix == ".safetensors":
        return "safetensors"
    raise WeightsError(
        f"{path} is no file of weights: expected {EXPECTED}; it starts with {start!r}" + ("" if start else " (it is empty)")
    )


def _is_torch_archive(path: Path) -> bool:
    """Whether a zip archive has what PyTorch writes into one, or is damaged so that this is not known."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return True


def safetensors_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The metadata in the header of a safetensors file; {} for a file in another format. Errors as in `open_weights`."""
    path = Path(path)
    if is_index(path):
        return {}
    with open(path, "rb") as file:
        if _detect_format(path, file.read(16)) != "safetensors":
            return {}
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        return read_header(path, file, size)[0]
