"""WebDataset tars of images: a source that reads them at random, and a writer."""

import contextlib
import io
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np

from titok_jax.data.contents import sized_files
from titok_jax.data.files import Paths, find_files
from titok_jax.data.image_files import read_image
from titok_jax.data.transforms import IMAGE_SUFFIXES, Example, decode_example
from titok_jax.runtime.messages import escaped
from titok_jax.runtime.outputs import check_absent, new_file
from titok_jax.runtime.paths import open_bytes

# How files of these kinds begin; all others are named JPEG, as ImageNet's are.
_BEGINNINGS = {b"\x89PNG": "png", b"RIFF": "webp", b"BM": "bmp"}
_LONGEST_HEADER, _LONGEST_LABEL = 2**14, 32  # bytes that are read of an extended header, and of KEY.cls


class WebDatasetSource:
    """Uncompressed tar shards of images (`KEY.jpg`, `.png`, ...) and class indices (`KEY.cls`, decimal text).

    The constructor reads the headers of every shard once. After that, an image takes one read at its offset. A sample
    without `.cls` has the label -1. A sample without an image, or with two, is an error.

    Args:
      skip_damaged: leave out the shards that cannot be used, with a printed warning. Otherwise the first one is an error.

    Attributes:
      damaged: what is wrong with each shard that was left out, beginning with its path.
    """

    def __init__(self, paths: Paths, skip_damaged: bool = False):
        found = find_files(paths, "WebDataset shards (*.tar)")

        def look(path: str) -> np.ndarray | ValueError:
            try:
                return _samples_of_tar(path)
            except ValueError as error:
                if not skip_damaged:
                    raise
                return error

        with ThreadPoolExecutor() as threads:  # a remote shard is read in full: seeking over an image reads it
            looked = list(threads.map(look, found))
        self.damaged = [str(shard) for shard in looked if isinstance(shard, ValueError)]
        samples = [shard for shard in looked if not isinstance(shard, ValueError)]
        self._paths = [path for path, shard in zip(found, looked, strict=True) if not isinstance(shard, ValueError)]
        if not self._paths:
            raise ValueError(f"all {len(found)} tars are damaged; the first: {self.damaged[0]}")
        if self.damaged:
            print(f"warning: {len(self.damaged)} of {len(found)} tars are damaged and left out:", flush=True)
            print("".join(f"  {reason}\n" for reason in self.damaged), end="", flush=True)
        numbers = np.repeat(np.arange(len(samples)), [len(shard) for shard in samples])
        self._spans = np.column_stack([numbers, np.concatenate(samples)])  # [n, 4]: shard, offset, length, label

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Example:
        return decode_example(*self.encoded(index))

    def files(self) -> Iterator[tuple[str, int, int]]:
        """Yields (path, number of examples, size in bytes) of each tar that is used."""
        yield from sized_files(self._paths, np.bincount(self._spans[:, 0], minlength=len(self._paths)).tolist())

    def encoded(self, index: int) -> tuple[bytes, int, str]:
        """Returns the bytes of an image file, its label, and its location for error messages."""
        shard, offset, length, label = self._spans[index].tolist()
        path = self._paths[shard]
        return read_image(path, offset, length), label, f"{path}, image {index} at byte {offset}"


class _Headers:
    """The file that `tarfile` reads the headers of a tar from. A tar that came from elsewhere cannot make it read headers of
    any length, or places outside the tar."""

    def __init__(self, file: BinaryIO, end: int):
        self._file, self._end, self.tell = file, end, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _LONGEST_HEADER:
            raise tarfile.ReadError(
                f"a header of {size:,} bytes at byte {self.tell():,}, at most {_LONGEST_HEADER:,} are read"
            )
        return self._file.read(max(0, min(size, self._end - self.tell())))

    def seek(self, place: int) -> None:
        if not 0 <= place <= self._end:
            raise tarfile.ReadError(f"unexpected end of data: something in it ends at byte {place + 1:,} of {self._end:,}")
        self._file.seek(place)


def tar_files(file: BinaryIO, end: int | None = None) -> Iterator[tarfile.TarInfo]:
    """Yields the regular files in an uncompressed tar, in order. Only headers are read.

    Folders, links and devices are left out; nothing is followed or unpacked. What is not printable in a name is escaped.

    Args:
      file: the tar begins where this file is. Offsets count from the beginning of the file. It may be moved in between.
      end: where the tar ends; at the end of the file if not given.

    Raises:
      tarfile.ReadError: the tar is damaged or truncated, also where `tarfile` itself would see the end of the archive or go
        round in circles; or it holds a sparse file.
    """
    if end is None:
        start = file.tell()
        end = file.seek(0, os.SEEK_END)
        file.seek(start)
    headers = _Headers(file, end)
    try:
        tar = tarfile.TarFile(fileobj=headers)
        for member in iter(tar.next, None):
            tar.members.clear()  # it would keep all of them
            member.name = escaped(member.name)
            if member.size < 0 or member.issparse():
                raise tarfile.ReadError(f"{member.name[:200]} is sparse or has no size, expected a plain file")
            if member.isfile():
                yield member
        headers.seek(tar.offset)
        if headers.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # the end of an archive is zeros
            raise tarfile.ReadError(f"damaged or cut short at byte {tar.offset:,}")
    except (tarfile.ReadError, OSError):
        raise
    except Exception as error:  # `tarfile` raises many kinds for damaged headers
        raise tarfile.ReadError(f"damaged at byte {headers.tell():,}: {error or type(error).__name__}") from error


def _label(file: BinaryIO, member: tarfile.TarInfo) -> int:
    """The number in KEY.cls."""
    if member.size > _LONGEST_LABEL:
        raise ValueError(f"{member.name[:200]} has {member.size:,} bytes, at most {_LONGEST_LABEL} are a class index")
    file.seek(member.offset_data)
    text = file.read(member.size)
    if not re.fullmatch(rb"\s*[+-]?\d+\s*", text) or not -1 <= int(text) < 2**31:
        raise ValueError(f"{member.name[:200]} holds {text.decode(errors='backslashreplace')!r}, expected a class index")
    return int(text)


def _samples_of_tar(path: str) -> np.ndarray:
    """The samples of a tar, int64 [n, 3]: offset, length, label."""
    samples: dict[tuple[str, str], list[int]] = {}
    labelled = set()
    try:
        with open_bytes(path) as file:
            for member in tar_files(file):
                folder, _, file_name = member.name.rpartition("/")
                key, _, extension = file_name.partition(".")  # as in WebDataset, the key ends at the first dot
                if not key:
                    continue  # hidden files, such as the ._KEY.jpg that macOS adds
                sample = samples.setdefault((folder, key), [0, 0, -1])
                is_image = f".{extension.lower()}" in IMAGE_SUFFIXES
                if sample[1] if is_image else extension == "cls" and (folder, key) in labelled:
                    raise ValueError(f"{member.name[:200]} is the second {'image' if is_image else 'label'} of its sample")
                if is_image:
                    sample[:2] = member.offset_data, member.size
                elif extension == "cls":
                    sample[2] = _label(file, member)
                    labelled.add((folder, key))
    except (tarfile.ReadError, ValueError) as error:
        raise ValueError(f"{path}: expected an uncompressed tar of images and .cls files: {error}") from error
    bare = ["/".join(filter(None, name)) for name, (_, length, _) in samples.items() if not length]
    if bare or not samples:
        raise ValueError(
            f"{path}: {f'{len(bare)} samples without an image, the first is {bare[0][:200]}' if bare else 'empty'}; "
            f"expected KEY{', KEY'.join(IMAGE_SUFFIXES)} beside each KEY.cls"
        )
    return np.array(list(samples.values()), np.int64)


@contextlib.contextmanager
def tar_writer(path: str | os.PathLike) -> Iterator[Callable[[bytes, int], None]]:
    """Writes encoded images and labels to a tar for `WebDatasetSource` and other readers of WebDataset.

        with tar_writer("train-00000.tar") as write:
            write(data, label)  # the bytes of an image file and a class index

    The keys are NAME-000000, NAME-000001, ..., with the file's name without its suffix. The same images give the same bytes.
    The file appears under its name when the block ends without an exception, as with `records.image_writer`.

    Raises:
      OSError: the file cannot be written.
      FileExistsError: there is such a file, or one has appeared during the work.
    """
    path = Path(path)
    stem, count = path.stem.replace(".", "-"), 0

    def write(data: bytes, label: int) -> None:
        nonlocal count
        suffix = next((suffix for start, suffix in _BEGINNINGS.items() if data.startswith(start)), "jpg")
        for ending, content in ((suffix, data), ("cls", str(label).encode())):
            member = tarfile.TarInfo(f"{stem}-{count:06d}.{ending}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        count += 1

    check_absent(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path, replace=False) as partial, tarfile.open(partial, "w") as tar:
        yield write
