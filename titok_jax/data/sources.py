"""Random-access sources of examples: digits, image folders, TFDS, ArrayRecord, WebDataset tars, Parquet, token files.

Folders, tars, Parquet and token files may be in a bucket, gs://BUCKET/...; tars and Parquet files also on the web.

An example is a dict with "label", int32 [] (-1 if there is none), and either "image", decoded uint8 [H, W, 3] RGB, or
"tokens", int32 [N]. Sources are picklable (worker processes get a copy) and safe to read from many threads.
"""

import inspect
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from titok_jax.data.contents import sized_files
from titok_jax.data.digits import load_digits
from titok_jax.data.files import Paths, find_files
from titok_jax.data.image_files import read_image
from titok_jax.data.parquet import ParquetSource
from titok_jax.data.records import decode_json_tokens, decode_record
from titok_jax.data.tfds_files import check_feature_classes
from titok_jax.data.transforms import IMAGE_SUFFIXES, Example, Undecodable, decode_example, image_files
from titok_jax.data.webdataset import WebDatasetSource
from titok_jax.runtime.messages import near, near_path
from titok_jax.runtime.paths import as_path, file_size, folders_in, is_remote, local_copy, needs_mount, read_bytes


def make_source(spec: Mapping[str, Any], flag: str = ""):
    """Makes the source that `spec` describes.

    Args:
      spec: "name" and the arguments of that source, e.g. {"name": "digits", "split": "train"}. Entries that are "" are
        ignored, and entries that are False if the source has no such argument. "none" as label_key means None.
      flag: the command-line flag that sets `spec`, for error messages: "--config.data.source".

    Raises:
      ValueError: unknown name or option, unexpected contents of the files, or no examples.
      FileNotFoundError: a path or pattern that matches nothing.
    """
    if flag:
        try:
            return make_source(spec)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{error} ({flag}.FIELD=VALUE sets a field of it)") from None
    name = spec.get("name")
    if name not in _SOURCES:
        raise ValueError(f"unknown data source {name!r}; known: {', '.join(_SOURCES)}{near(str(name), _SOURCES)}")
    signature = inspect.signature(_SOURCES[name])
    options = {
        option: None if (option, value) == ("label_key", "none") else value
        for option, value in spec.items()
        if option != "name" and value != "" and not (value is False and option not in signature.parameters)
    }
    try:
        signature.bind(**options)
    except TypeError as error:
        others = (f"{kind} ({', '.join(inspect.signature(_SOURCES[kind]).parameters)})" for kind in _SOURCES if kind != name)
        raise ValueError(
            f"data source {name}: {error}; it takes {', '.join(signature.parameters)}. The others: {', '.join(others)}"
        ) from None
    source = _SOURCES[name](**options)
    if len(source) == 0:
        raise ValueError(f"data source {name}: no examples ({', '.join(f'{k} {v}' for k, v in options.items())})")
    return source


class DigitsSource:
    """The embedded handwritten digits (digits.py); split "train", "held_out" (or "test") or "all"."""

    def __init__(self, split: str = "train", image_size: int = 32):
        self._images, self._labels = load_digits(split, image_size)  # uint8 [n, S, S], int32 [n]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        return {"image": np.repeat(self._images[index][..., None], 3, axis=-1), "label": self._labels[index]}


class FolderSource:
    """The images under a folder, at any depth, sorted by path.

    Attributes:
      paths: paths of the images, in order.
      class_names: sorted names of the first-level sub-folders, as text, as torchvision's ImageFolder sorts them ("10" is
        before "2"). An image's label is the index of its sub-folder. Hidden and system folders are no classes. If the
        images are directly in the folder, or with `labels=False`, this is empty and every label is -1.
    """

    def __init__(self, path: str | os.PathLike, labels: bool = True):
        root = os.fspath(path)
        if not as_path(root).is_dir():
            expected = "expected a folder of images, or of one sub-folder per class"
            raise FileNotFoundError(f"{root}: no such folder; {expected}{near_path(root)}")
        parts = image_files(root)
        if not parts:
            raise ValueError(f"{root}: no images in this folder or below; expected {', '.join(IMAGE_SUFFIXES)} files")
        loose = [name for name, *below in parts if not below]
        if labels and loose and len(loose) < len(parts):
            raise ValueError(
                f"{root}: images both in sub-folders and directly in the folder ({len(loose)}, e.g. {loose[0]}), so their "
                "classes are unclear; move these into sub-folders, or give labels=False to use all without labels"
            )
        if labels and not loose and not is_remote(root):
            empty = sorted(set(folders_in(root)) - {names[0] for names in parts})
            if empty:
                raise ValueError(
                    f"{root}: {len(empty)} class folders without images, e.g. {empty[0]}; put their images there, or remove "
                    "them: labels are the positions of the class folders in sorted order"
                )
        self.paths = ["/".join([root.rstrip("/"), *names]) for names in parts]
        self.class_names = sorted({names[0] for names in parts}) if labels and not loose else []
        numbers = {name: number for number, name in enumerate(self.class_names)}
        self._labels = np.array([numbers.get(names[0], -1) for names in parts], np.int32)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        return decode_example(*self.encoded(index))

    def files(self) -> Iterator[tuple[str, int, int]]:
        """Yields (path, number of examples, size in bytes) of each file, 0 in a bucket: each would be a request."""
        for path in self.paths:
            yield path, 1, 0 if is_remote(path) else file_size(path)

    def encoded(self, index: int) -> tuple[bytes, int, str]:
        """Returns the bytes of an image file, its label, and its location for error messages."""
        path = self.paths[index]
        return read_image(path), int(self._labels[index]), path


class TfdsSource:
    """A prepared TensorFlow Datasets dataset in ArrayRecord format, read without TensorFlow. Nothing is downloaded.

    Args:
      split: e.g. "train" or "validation[:10%]".
      dataset: name of a dataset in `data_dir`, e.g. "imagenet2012" or "imagenet2012:5.1.0".
      data_dir: folder of the TFDS datasets (default: `TFDS_DATA_DIR` or ~/tensorflow_datasets).
      path: instead of `dataset` and `data_dir`, the folder of one version, which holds dataset_info.json.
      image_key, label_key: names of the features. If `label_key` is None, every label is -1.
    """

    def __init__(
        self,
        split: str,
        dataset: str | None = None,
        data_dir: str | None = None,
        path: str | None = None,
        image_key: str = "image",
        label_key: str | None = "label",
    ):
        import tensorflow_datasets as tfds  # slow to import, and only this source needs it

        if (dataset is None) == (path is None):
            raise ValueError(
                f"tfds: give either dataset (a name) or path (a folder); got dataset={dataset!r}, path={path!r}"
            )
        self._name = f"{dataset or path}, split {split}"
        place = path or data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
        if is_remote(place):
            raise needs_mount(place, "a TensorFlow Datasets set")
        try:
            if path is not None:
                if not Path(path, "dataset_info.json").exists():
                    raise FileNotFoundError("this folder has no dataset_info.json")
                check_feature_classes(path)
                builder = tfds.builder_from_directory(path)
            else:
                name = tfds.core.naming.parse_builder_name_kwargs(dataset)[0].name
                check_feature_classes(Path(place).expanduser() / name)
                builder = tfds.builder(dataset, data_dir=data_dir, file_format="array_record")
            features = builder.info.features
            missing = [key for key in (image_key, label_key) if key is not None and key not in features]
            if missing:
                raise ValueError(f"tfds {self._name}: no feature {', '.join(missing)}; it has {', '.join(sorted(features))}")
            if not builder.info.splits:
                raise FileNotFoundError("it has not been prepared there")
            decoders = {image_key: tfds.decode.SkipDecoding()}  # TFDS would decode with TensorFlow or OpenCV
            self._examples = builder.as_data_source(split, decoders=decoders)
            self._files = builder.info.splits[split].file_instructions
        except (FileNotFoundError, AssertionError, NotImplementedError, tfds.core.DatasetNotFoundError) as error:
            raise FileNotFoundError(
                f"tfds {self._name}: found no set prepared with file_format='array_record' in {place}: {error}"
            ) from error
        files = list(map(os.fspath, builder.info.splits[split].filepaths))
        missing = [file for file in files if not os.path.isfile(file)]  # TFDS would find out when it reads from it
        if missing:
            raise FileNotFoundError(f"tfds {self._name}: {len(missing)} of {len(files)} files missing, first {missing[0]}")
        self._image_key, self._label_key = image_key, label_key

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return decode_example(*self.encoded(index))

    def files(self) -> Iterator[tuple[str, int, int]]:
        """Yields (path, number of examples, size in bytes) of each file."""
        for file in self._files:
            yield file.filename, file.take, file_size(file.filename)

    def encoded(self, index: int) -> tuple[bytes, int, str]:
        """Returns the bytes of an image file, its label, and its location for error messages."""
        name = f"tfds {self._name}, example {index}"
        try:
            example = self._examples[index]
        except Exception as error:  # of ArrayRecord, of protocol buffers and of TFDS's decoding
            _raise_if_unread(error)
            raise Undecodable(f"{name}: damaged ({error})") from error
        label = -1 if self._label_key is None else example[self._label_key]
        if not np.issubdtype(np.asarray(label).dtype, np.integer) or np.ndim(label):
            raise ValueError(f"{name}: feature {self._label_key} is {str(label)[:100]!r}, expected a class index")
        label = int(label)
        return example[self._image_key], label, name


class ArrayRecordSource:
    """ArrayRecord files with this project's token or image records (records.py), one after the other.

    The files must be local, because the ArrayRecord library cannot read from a bucket.
    """

    def __init__(self, paths: Paths):
        for path in [paths] if isinstance(paths, str | os.PathLike) else paths:
            if is_remote(path):
                raise needs_mount(path, "ArrayRecord")
        self._paths = find_files(paths, "ArrayRecord files")
        import grain  # of the packages that only some sources need

        try:
            self._records = grain.sources.ArrayRecordDataSource(self._paths)
        except RuntimeError as error:
            for path in self._paths:  # the message does not name the file
                _num_records(path)
            raise ValueError(f"{self._paths[0]}: cannot open as ArrayRecord: {error}") from error

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        try:
            return decode_record(self._records[index])
        except RuntimeError as error:
            _raise_if_unread(error)
            raise Undecodable(f"{self.where(index)}: damaged, replace the file ({error})") from error
        except ValueError as error:
            raise type(error)(f"{self.where(index)}: {str(error).removeprefix('record: ')}") from None

    def files(self) -> Iterator[tuple[str, int, int]]:
        """Yields (path, number of examples, size in bytes) of each file."""
        yield from sized_files(self._paths, map(_num_records, self._paths))

    def where(self, index: int) -> str:
        """The file and the record in it of an example, for error messages."""
        for path in self._paths:
            count = _num_records(path)
            if index < count:
                return f"{path}, record {index}"
            index -= count
        raise IndexError(f"record {index} after the last")


def _raise_if_unread(error: Exception) -> None:
    """Raises OSError if an error of ArrayRecord means that a file could not be read, not that it is damaged. It raises
    RuntimeError for both. Of the former it says "pread() failed: Input/output error; reading FILE"."""
    if isinstance(error, OSError):
        raise error
    if isinstance(error, RuntimeError) and re.match(r"\w+\(\) failed: ", str(error)):
        raise OSError(str(error)) from error


def _num_records(path: str) -> int:
    """The number of records in a file. Raises ValueError if it cannot be opened."""
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(path)
        count = reader.num_records()
        reader.close()
        return count
    except RuntimeError as error:
        raise ValueError(
            f"{path}: cannot open as ArrayRecord; it is damaged or incomplete (was the writer closed?): {error}"
        ) from error


class JsonLinesSource:
    """Published token files, with {"class_id": int, "tokens": [int, ...]} on each line.

    The constructor reads every file once to find where its lines begin. For large datasets write ArrayRecord files with
    `records.token_writer`: they have a fifth of the size and open at once.
    """

    def __init__(self, paths: Paths):
        self._paths = find_files(paths, "JSON lines of tokens")
        spans = []  # (file, line number, offset, length)
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
        file, _, offset, length = self._spans[index].tolist()
        return decode_json_tokens(read_bytes(self._paths[file], offset, length), self.where(index))

    def files(self) -> Iterator[tuple[str, int, int]]:
        """Yields (path, number of examples, size in bytes) of each file."""
        yield from sized_files(self._paths, np.bincount(self._spans[:, 0], minlength=len(self._paths)).tolist())

    def where(self, index: int) -> str:
        """The file and the line of an example, for error messages."""
        file, line_number, _, _ = self._spans[index].tolist()
        return f"{self._paths[file]}, line {line_number}"


def tokens_source(paths: Paths) -> ArrayRecordSource | JsonLinesSource:
    """Opens files of pretokenized images, `*.array_record` or `*.jsonl`.

    Files in a bucket are copied to this machine once (256 MB for ImageNet).

    Raises:
      ValueError: another suffix, both suffixes at once, or records of images.
    """
    files = find_files(paths, "token files (*.array_record or *.jsonl)")
    suffixes = {Path(path).suffix for path in files}
    if suffixes == {".jsonl"}:
        return JsonLinesSource(list(map(local_copy, files)))
    if any(".array_record" in Path(path).name for path in files) and ".jsonl" not in suffixes:
        source = ArrayRecordSource(list(map(local_copy, files)))
        if "tokens" not in source[0]:
            raise ValueError(f"{files[0]}: holds images, expected tokens; use the source array_record for images")
        return source
    raise ValueError(f"{paths}: found {', '.join(sorted(suffixes))}; token files are all *.array_record or all *.jsonl")


_SOURCES = {
    "digits": DigitsSource,
    "folder": FolderSource,
    "tfds": TfdsSource,
    "webdataset": WebDatasetSource,
    "parquet": ParquetSource,
    "array_record": ArrayRecordSource,
    "tokens": tokens_source,
}


def parse_source(text: str) -> dict[str, Any]:
    """Parses the command-line argument `DATA` into a `spec` for `make_source`.

    Raises:
      ValueError: a known prefix without the rest that it needs.
    """
    kind, colon, rest = text.partition(":")
    if kind == "digits" and rest:
        return {"name": "digits", "split": rest}
    if kind == "tfds":
        dataset, _, split = rest.rpartition(":")
        if not dataset or not split:
            raise ValueError(f"{text!r}: expected tfds:NAME:SPLIT, e.g. tfds:imagenet2012:train")
        return {"name": "tfds", "dataset": dataset, "split": split}
    if kind in ("webdataset", "array_record", "parquet") and colon:
        if not rest:
            raise ValueError(f"{text!r}: expected {kind}:FILES, e.g. {kind}:'imagenet/train-*'")
        return {"name": kind, "paths": rest}
    return {"name": "folder", "path": text}
