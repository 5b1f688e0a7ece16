"""Records of tokens and images: our own compact encoding for ArrayRecord, and the published JSON lines.

A record is an 8-byte little-endian header and a payload:

    uint16 kind    1: tokens, 2: image
    int32  label   class index, -1 if there is none
    uint16 n       tokens: how many; image: 0
    payload        tokens: n uint16, or n int32 if one of them exceeds 65535; image: the encoded file (JPEG, PNG, WebP)

256 tokens from a codebook of 1,024 take 520 bytes, a fifth of their size in JSON.
"""

import contextlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from titok_jax.data.transforms import Example, decode_image
from titok_jax.runtime.outputs import check_absent, new_file
from titok_jax.runtime.paths import as_path

_HEADER = struct.Struct("<HiH")
_TOKENS, _IMAGE = 1, 2


def encode_tokens(tokens: np.ndarray, label: int) -> bytes:
    """Encodes token ids [N], 0 <= id < 2^31, and a label as one record.

    Raises:
      ValueError: the ids are not one-dimensional, none or more than 65535, out of range, or not integers; or the label does
        not fit int32.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not 0 < tokens.size < 2**16 or tokens.dtype.kind not in "iu":
        raise ValueError(f"a record holds 1 to 65535 integer tokens [N]; got {tokens.dtype} {list(tokens.shape)}")
    if tokens.min() < 0 or tokens.max() >= 2**31:
        raise ValueError(f"tokens must be in 0..2^31-1; got {tokens.min()}..{tokens.max()}")
    dtype = "<u2" if tokens.max() < 2**16 else "<i4"
    return _header(_TOKENS, label, tokens.size) + tokens.astype(dtype).tobytes()


def encode_image(data: bytes, label: int) -> bytes:
    """Makes one record from the bytes of an image file and a label. Raises ValueError if the label does not fit int32."""
    return _header(_IMAGE, label, 0) + data


def _header(kind: int, label: int, n: int) -> bytes:
    if not -(2**31) <= label < 2**31:
        raise ValueError(f"label {label}, expected a class index below 2^31, or -1 for none")
    return _HEADER.pack(kind, label, n)


def decode_record(record: bytes, name: str = "record") -> Example:
    """Decodes a record to {"tokens": int32 [N], "label": int32 []} or {"image": uint8 [H, W, 3], "label": int32 []}.

    Raises:
      ValueError: not one of our records. The message begins with `name`, the origin of the record.
    """
    kind, label, n = _HEADER.unpack_from(record) if len(record) >= _HEADER.size else (0, 0, 0)
    payload = record[_HEADER.size :]
    if kind == _TOKENS and n and len(payload) in (2 * n, 4 * n):
        tokens = np.frombuffer(payload, "<u2" if len(payload) == 2 * n else "<i4")
        return {"tokens": tokens.astype(np.int32), "label": np.int32(label)}
    if kind == _IMAGE and n == 0:
        return {"image": decode_image(payload, name), "label": np.int32(label)}
    raise ValueError(
        f"{name}: {len(record)} bytes that are no record of this project (kind {kind}, n {n}); expected the header "
        "described in titok_jax/data/records.py. Was the file written by another program?"
    )


def decode_json_tokens(line: bytes | str, name: str = "line") -> Example:
    """Decodes a published line, {"class_id": 207, "tokens": [240, ...]}, to {"tokens": int32 [N], "label": int32 []}.

    Raises:
      ValueError: not such a line. The message begins with `name`, the origin of the line.
    """
    try:
        fields = json.loads(line)
        tokens, label = np.asarray(fields["tokens"]), fields["class_id"]
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not tokens.size:
            raise TypeError(f"tokens are {tokens.dtype} {list(tokens.shape)}")
        if type(label) is not int:
            raise TypeError(f"class_id is {str(label)[:40]!r}")
        for number in (label, int(tokens.min()), int(tokens.max())):
            if not -(2**31) <= number < 2**31:
                raise OverflowError(f"{number} is not in the range of int32")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f'{name}: expected {{"class_id": int, "tokens": [int, ...]}}; {error!r}') from error
    return {"tokens": tokens.astype(np.int32), "label": np.int32(label)}


@contextlib.contextmanager
def token_writer(path: str | os.PathLike) -> Iterator[Callable[[np.ndarray, int], None]]:
    """Writes token records to `*.array_record`, or to `*.jsonl` for the published code.

        with token_writer("train.array_record") as write:
            write(tokens, label)  # ids [N] and a class index

    The file appears under its name when the block ends without an exception, so an interrupted run leaves no file that
    looks complete. Until then it is a hidden file beside it, or a local file if the output is in a bucket. A file that is
    there is not replaced.

    Raises:
      FileExistsError: there is such a file, or one has appeared during the work.
      ValueError: the path has neither suffix, or `encode_tokens` rejects the tokens.
    """
    suffix = Path(path).suffix
    if suffix == ".array_record":
        with _array_record_writer(path, "zstd:3") as write:
            yield lambda tokens, label: write(encode_tokens(tokens, label))
    elif suffix == ".jsonl":
        with _whole_or_nothing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            yield lambda tokens, label: file.write(_encode_json_tokens(tokens, label))
    else:
        raise ValueError(f"{path}: token files end in .array_record or .jsonl")


@contextlib.contextmanager
def image_writer(path: str | os.PathLike) -> Iterator[Callable[[bytes, int], None]]:
    """Writes encoded images and labels to an ArrayRecord file, which is complete or absent, as with `token_writer`."""
    with _array_record_writer(path, "uncompressed") as write:  # the images are already compressed
        yield lambda data, label: write(encode_image(data, label))


def _encode_json_tokens(tokens: np.ndarray, label: int) -> str:
    encode_tokens(tokens, label)  # only for its checks
    return json.dumps({"class_id": int(label), "tokens": np.asarray(tokens).tolist()}) + "\n"


@contextlib.contextmanager
def _array_record_writer(path: str | os.PathLike, compression: str) -> Iterator[Callable[[bytes], None]]:
    from array_record.python.array_record_module import ArrayRecordWriter  # JSON lines do not need it

    def checked(function: Callable, *record: bytes) -> None:
        try:
            function(*record)
        except RuntimeError as error:  # the library raises it for everything, such as a full disk
            raise OSError(f"cannot write {path}: {error}") from error

    with _whole_or_nothing(path) as temporary:
        # With groups of one record, random access is 15 times as fast as with groups of 64.
        file = ArrayRecordWriter(str(temporary), f"group_size:1,{compression}")
        try:
            yield lambda record: checked(file.write, record)
        finally:
            checked(file.close)


@contextlib.contextmanager
def _whole_or_nothing(path: str | os.PathLike) -> Iterator[Path]:
    """`outputs.new_file`, but creates the parent folder if it does not exist, and refuses a file that does."""
    check_absent(path)
    as_path(path).parent.mkdir(parents=True, exist_ok=True)
    with new_file(path, replace=False) as partial:
        yield partial
