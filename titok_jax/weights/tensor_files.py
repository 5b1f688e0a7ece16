"""Weights files, read one tensor at a time: safetensors, PyTorch pickles, Flax msgpack.

The format is detected from the contents of the file. No part of a file is trusted: headers are checked completely before a
tensor is read, code in a pickle never runs, and every problem is a WeightsError that names the file. If a file has checksums
(safetensors written here, PyTorch's zip archives), the tensors are checked against them. Without checksums, a changed number
cannot be detected.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from titok_jax.runtime.paths import local_copy
from titok_jax.weights.convert import WeightsError
from titok_jax.weights.flax_file import FlaxFile
from titok_jax.weights.safetensors_file import read_header
from titok_jax.weights.torch_file import read_torch

FORMATS = ("safetensors", "torch", "flax")


class Weights(NamedTuple):
    format: str  # one of FORMATS
    tensors: dict[str, Any]  # name -> Tensor, or another object with .shape and .dtype that np.asarray reads


@contextlib.contextmanager
def open_weights(path: str | os.PathLike) -> Iterator[Weights]:
    """Opens the tensors of a file in any of the formats, also in a bucket. Names in a Flax tree are paths joined by "/".

    Raises:
      FileNotFoundError: there is no such file.
      WeightsError: the file is damaged, has another format, or contains more than tensors.
    """
    path = local_copy(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    with open(path, "rb") as file:
        format = _detect_format(path, file.read(16))
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if format == "safetensors":
            yield Weights(format, read_header(path, file, size)[1])
        elif format == "flax":
            yield Weights(format, FlaxFile(path, file, size).tensors)
        else:
            yield Weights(format, read_torch(path))


_OTHERS = {
    b"\x89PNG": "an image (PNG)",
    b"\xff\xd8\xff": "an image (JPEG)",
    b"GIF8": "an image (GIF)",
    b"RIFF": "an image or a sound (RIFF)",
    b"version https://": "the place of a file that Git LFS has not downloaded (git lfs pull)",
    b"<": "a page of the web, not the file",
    b"\x1f\x8b": "compressed (gzip)",
}


def _detect_format(path: Path, start: bytes) -> str:
    for beginning, what in _OTHERS.items():
        if start.startswith(beginning):
            raise WeightsError(f"{path} holds no weights: it is {what}")
    if start[8:9] == b"{":
        return "safetensors"
    if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        return "torch"
    if start[:1] and (0x81 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF)):
        return "flax"
    # The first bytes are damaged, or the file is something else. If the name ends in .safetensors, read it as such.
    if path.suffix == ".safetensors":
        return "safetensors"
    raise WeightsError(
        f"{path} is no file of weights: expected safetensors, a PyTorch file (.bin, .pth) or a Flax msgpack checkpoint; "
        f"it starts with {start!r}" + ("" if start else " (it is empty)")
    )


def safetensors_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The metadata in the header of a safetensors file; {} for a file in another format. Errors as in `open_weights`."""
    path = Path(path)
    with open(path, "rb") as file:
        if _detect_format(path, file.read(16)) != "safetensors":
            return {}
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        return read_header(path, file, size)[0]
