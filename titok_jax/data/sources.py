"""Random-access sources of examples: digits, image folders, TFDS, ArrayRecord, WebDataset tars, token files.

An example is a dict: "label", int32 [] (-1 where there is none), and either "image", uint8 [H, W, 3] RGB, decoded, or
"tokens", int32 [N]. Sources are picklable (worker processes get a copy) and safe to read from many threads.
"""

import glob
import inspect
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import grain
import numpy as np

from titok_jax.data.digits import load_digits
from titok_jax.data.records import decode_json_tokens, decode_record
from titok_jax.data.transforms import Example

Paths = str | os.PathLike | Iterable[str | os.PathLike]  # one path or glob pattern, or several


def make_source(spec: Mapping[str, Any]):
    """The source named by `spec`: {"name": "digits", "split": "train"}; the other entries are its constructor's arguments.

    Raises:
      ValueError: unknown name or option, or what the files hold is not what is expected.
      FileNotFoundError: a path or pattern that matches nothing.
    """
    options = dict(spec)
    name = options.pop("name", None)
    if name not in _SOURCES:
        raise ValueError(f"unknown data source {name!r}; known: {', '.join(_SOURCES)}")
    signature = inspect.signature(_SOURCES[name])
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ValueError(f"data source {name}: {error}; it takes {', '.join(signature.parameters)}") from None
    return _SOURCES[name](**options)


class DigitsSource:
    """The embedded handwritten digits (digits.py); split "train", "test" or "all"."""

    def __init__(self, split: str = "train", image_size: int = 32):
        self._images, self._labels = load_digits(split, image_size)  # uint8 [n, S, S], int32 [n]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        return {"image": np.repeat(self._images[index][..., None], 3, axis=-1), "label": self._labels[index]}


class ArrayRecordSource:
    """Files of this project's records (records.py), of tokens or of images, one after the other."""

    def __init__(self, paths: Paths):
        self._paths = _expand(paths, "ArrayRecord files")
        try:
            self._records = grain.sources.ArrayRecordDataSource(self._paths)
        except RuntimeError as error:
            raise ValueError(f"cannot open as ArrayRecord (was the writer closed?): {error}") from error

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        return decode_record(self._records[index], f"record {index} of {self._paths[0]} ({len(self._paths)} files)")


class JsonLinesSource:
    """Published token files, {"class_id": int, "tokens": [int, ...]} per line.

    Every file is read once here to find where its lines begin. For large sets write ArrayRecord with
    `records.TokenWriter`: that is a fifth of the size and opens at once.
    """

    def __init__(self, paths: Paths):
        self._paths = _expand(paths, "JSON lines of tokens")
        spans = []  # file, line number, offset, length
        for number, path in enumerate(self._paths):
            offset = 0
            with open(path, "rb") as file:
                for line_number, line in enumerate(file, 1):
                    if not line.isspace():
                        spans.append((number, line_number, offset, len(line)))
                    offset += len(line)
        if not spans:
            raise ValueError(f"{', '.join(self._paths)}: empty; expected a line of JSON per image")
        self._spans = np.array(spans, np.int64)  # [n, 4]

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Example:
        file, line_number, offset, length = self._spans[index].tolist()
        path = self._paths[file]
        return decode_json_tokens(_read(path, offset, length), f"{path}, line {line_number}")


def tokens_source(paths: Paths) -> ArrayRecordSource | JsonLinesSource:
    """Pretokenized images from `*.array_record` or `*.jsonl` files, told apart by their suffix.

    Raises:
      ValueError: another suffix, or both kinds at once; records of images.
    """
    files = _expand(paths, "token files (*.array_record or *.jsonl)")
    suffixes = {Path(path).suffix for path in files}
    if suffixes == {".jsonl"}:
        return JsonLinesSource(files)
    if any(".array_record" in Path(path).name for path in files) and ".jsonl" not in suffixes:
        source = ArrayRecordSource(files)
        if "tokens" not in source[0]:
            raise ValueError(f"{files[0]}: holds images, expected tokens; use the source array_record for images")
        return source
    raise ValueError(f"{paths}: found {', '.join(sorted(suffixes))}; token files are all *.array_record or all *.jsonl")


def _expand(paths: Paths, what: str) -> list[str]:
    """The files that paths and glob patterns name, in the order given, those of one pattern sorted."""
    patterns = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    files = []
    for pattern in map(os.fspath, patterns):
        matches = (
            [pattern] if os.path.isfile(pattern) else sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
        )
        if not matches:
            raise FileNotFoundError(f"{pattern}: no such file, and no file matches it as a pattern; expected {what}")
        files += matches
    if not files:
        raise ValueError(f"no paths given; expected {what}")
    return files


def _read(path: str, offset: int, length: int) -> bytes:
    # Opened anew each time: no file handles to share between threads or to leave out of a pickle.
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(length)


_SOURCES = {
    "digits": DigitsSource,
    "array_record": ArrayRecordSource,
    "tokens": tokens_source,
}
