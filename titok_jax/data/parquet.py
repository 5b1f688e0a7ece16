"""Parquet files of images, as the Hugging Face hub keeps ImageNet. Only here pyarrow is imported, and only when needed."""

import collections
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from titok_jax.data.contents import sized_files
from titok_jax.data.files import Paths, find_files
from titok_jax.data.transforms import Example, decode_example
from titok_jax.runtime.paths import is_remote, name_file, open_bytes

CACHE_BYTES = 128 * 2**20  # of encoded images that a source keeps


class ParquetSource:
    """Parquet files with a column of encoded images and a column of class indices, one file after the other.

    An image is read with its whole row group (usually 100 images). The row groups read last are kept: up to CACHE_BYTES for
    all threads, and the last one of each thread. So examples are read fast in order, by many threads together or by each in
    its own part. Shuffled over all files, nearly every example reads a row group.

    Args:
      image_key: name of a column of structs with a field "bytes", as the hub has it, or of bytes.
      label_key: name of a column of integers. If it is None, every label is -1. A label that is missing (null) is -1.

    Attributes:
      class_names: the names of the classes, if the first file states them, as the hub's do; otherwise empty.
    """

    def __init__(self, paths: Paths, image_key: str = "image", label_key: str | None = "label"):
        self._paths = find_files(paths, "Parquet files (*.parquet)")
        self._columns = image_key, label_key
        with ThreadPoolExecutor() as threads:
            footers = list(threads.map(lambda path: _footer(path, image_key, label_key), self._paths))
        self._groups = np.array(  # [n, 3]: file, row group, its first row in the file
            [
                (file, group, first)
                for file, (rows, _) in enumerate(footers)
                for group, first in enumerate(np.cumsum([0, *rows])[:-1])
            ],
            np.int64,
        ).reshape(-1, 3)
        self._ends = np.cumsum([count for rows, _ in footers for count in rows])  # [n]
        if len(self) == 0:
            raise ValueError(f"{', '.join(self._paths[:3])}: no rows; expected a row for each image")
        self.class_names = footers[0][1]
        self._rows = [sum(rows) for rows, _ in footers]
        self._cache = _Cache(CACHE_BYTES)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Example:
        data, label, name = self.encoded(index)
        classes = len(self.class_names) or 2**31
        if not -1 <= label < classes:
            raise ValueError(f"{name}: its label is {label}, expected 0 to {classes - 1}, or -1 for none")
        return decode_example(data, label, name)

    def files(self) -> Iterator[tuple[str, int, int]]:
        """Yields (path, number of rows, size in bytes) of each file."""
        yield from sized_files(self._paths, self._rows)

    def encoded(self, index: int) -> tuple[bytes, int, str]:
        """Returns the bytes of an image file (empty if it is null), its label, and its location for error messages."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        place = int(np.searchsorted(self._ends, index, side="right"))
        images, labels = self._cache.get(place, lambda: self._read(place))
        row = len(images) - int(self._ends[place]) + index
        file, _, first = self._groups[place].tolist()
        return images[row].as_py() or b"", int(labels[row]), f"{self._paths[file]}, row {first + row}"

    def _read(self, place: int) -> tuple[Any, np.ndarray]:
        """Reads a row group: the images, a pyarrow array of bytes, and int64 labels."""
        import pyarrow as pa
        import pyarrow.compute as pc

        file, group, _ = self._groups[place].tolist()
        image_key, label_key = self._columns
        with _ParquetFile(self._paths[file]) as parquet:
            struct = pa.types.is_struct(parquet.schema_arrow.field(image_key).type)
            names = [f"{image_key}.bytes" if struct else image_key, *([] if label_key is None else [label_key])]
            table = parquet.read_row_group(group, columns=names, use_threads=False)
            images = pc.struct_field(table[image_key], "bytes") if struct else table[image_key]
            if label_key is None:
                return images, np.full(len(images), -1)
            return images, pc.fill_null(table[label_key].cast(pa.int64()), -1).to_numpy()


class _Cache:
    """The row groups read last: up to `limit` bytes for all threads of a process, and the last one of each thread. Of the
    threads that want the same one, the first reads it."""

    def __init__(self, limit: int):
        self._limit = limit
        self._lock = threading.RLock()
        self._kept: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._reading: dict[int, threading.Lock] = {}
        self._last = threading.local()

    def __reduce__(self):
        return _Cache, (self._limit,)  # a copy begins empty

    def get(self, key: int, read: Callable[[], Any]) -> Any:
        if getattr(self._last, "key", None) != key:
            self._last.key = self._last.value = None  # frees its memory before more is read
            self._last.value = self._shared(key, read)
            self._last.key = key
        return self._last.value

    def _shared(self, key: int, read: Callable[[], Any]) -> Any:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            alone = self._reading.setdefault(key, threading.Lock())
        with alone:
            with self._lock:
                if key in self._kept:
                    return self._kept[key]
            try:
                value = read()
                with self._lock:
                    self._kept[key] = value
                    while self._kept and self.size() > self._limit:
                        self._kept.popitem(last=False)
            finally:
                with self._lock:
                    self._reading.pop(key, None)
            return value

    def size(self) -> int:
        """Bytes of the images that are kept for all threads."""
        with self._lock:
            return sum(images.nbytes for images, _ in self._kept.values())


class _ParquetFile:
    """`pyarrow.parquet.ParquetFile` in a `with` block, opened anew because threads cannot share one. Its errors become
    ValueErrors that name the file."""

    def __init__(self, path: str):
        self._path, self._files = path, contextlib.ExitStack()

    def __enter__(self):
        import pyarrow.parquet

        try:
            file = self._files.enter_context(open_bytes(self._path)) if is_remote(self._path) else self._path
            return self._files.enter_context(pyarrow.parquet.ParquetFile(file))
        except Exception as error:
            self.__exit__(type(error), error, None)
            raise

    def __exit__(self, kind, error, trace) -> None:
        import pyarrow

        self._files.__exit__(kind, error, trace)
        name_file(error, self._path)
        if str(error).startswith(self._path):  # by `open_bytes`
            return
        # pyarrow raises OSErrors without a number for what it cannot decode. fsspec raises ValueErrors.
        if isinstance(error, pyarrow.ArrowException | ValueError) or (type(error) is OSError and error.errno is None):
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"{self._path}: cannot read this as Parquet (is it complete?): {reason}") from error


def _footer(path: str, image_key: str, label_key: str | None) -> tuple[list[int], list[str]]:
    """Reads the end of a file: (number of rows in each row group, names of the classes).

    Raises:
      ValueError: not such a file; the message begins with `path`.
    """
    import pyarrow as pa

    with _ParquetFile(path) as parquet:
        schema, metadata = parquet.schema_arrow, parquet.metadata
        rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def column(key: str, option: str, hint: str) -> pa.DataType:
        if key not in schema.names:
            has = ", ".join(schema.names) or "none"
            raise ValueError(f"{path}: no column {key!r}; it has {has}; {option} names it{hint}")
        return schema.field(key).type

    def is_bytes(kind: pa.DataType) -> bool:
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    image = column(image_key, "image_key", "")
    inner = image.field("bytes").type if pa.types.is_struct(image) and image.get_field_index("bytes") >= 0 else image
    if not is_bytes(inner):
        raise ValueError(f"{path}: column {image_key!r} is {image}, expected bytes, or structs with a field 'bytes'")
    if label_key is None:
        return rows, []
    label = column(label_key, "label_key", ", label_key=none for no labels")
    if not pa.types.is_integer(label):
        raise ValueError(f"{path}: column {label_key!r} is {label}, expected integers")
    try:  # what the library `datasets` writes
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label_key]["names"]
        return rows, list(map(str, names))
    except (KeyError, ValueError, TypeError):
        return rows, []
