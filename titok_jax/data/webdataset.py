"""WebDataset tars of images: a source that reads them at random, and a writer."""

import contextlib
import io
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from titok_jax.data.files import Paths, find_files
from titok_jax.data.image_files import read_image
from titok_jax.data.transforms import IMAGE_SUFFIXES, Example, decode_example
from titok_jax.runtime.outputs import check_absent, new_file
from titok_jax.runtime.paths import file_size, open_bytes

# How files of these kinds begin; all others are named JPEG, as ImageNet's are.
_BEGINNINGS = {b"\x89PNG": "png", b"RIFF": "webp", b"BM": "bmp"}


class WebDatasetSource:
    """Uncompressed tar shards of images (`KEY.jpg`, `.png`, ...) and class indices (`KEY.cls`, decimal text).

    The constructor reads the headers of every shard once. After that, an image takes one read at its offset. A sample
    without `.cls` has the label -1. A sample without an image is an error.

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
        counts = np.bincount(self._spans[:, 0], minlength=len(self._paths)).tolist()
        for path, count in zip(self._paths, counts, strict=True):
            yield path, count, file_size(path)

    def encoded(self, index: int) -> tuple[bytes, int, str]:
        """Returns the bytes of an image file, its label, and its location for error messages."""
        shard, offset, length, label = self._spans[index].tolist()
        path = self._paths[shard]
        return read_image(path, offset, length), label, f"{path}, image {index} at byte {offset}"


def tar_files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yields the regular files of a seekable tar, in order. Only headers are read.

    Raises:
      tarfile.ReadError: the tar is damaged or truncated, also where `tarfile` itself would see the end of the archive.
    """
    yield from filter(tarfile.TarInfo.isfile, tar)
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # the end of an archive is zeros
        raise tarfile.ReadError(f"damaged or cut short at byte {tar.offset:,}")


def _samples_of_tar(path: str) -> np.ndarray:
    """The samples of a tar, int64 [n, 3]: offset, length, label."""
    samples: dict[tuple[str, str], list[int]] = {}
    try:
        with open_bytes(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar_files(tar):
                folder, _, file_name = member.name.rpartition("/")
                key, _, extension = file_name.partition(".")  # as in WebDataset, the key ends at the first dot
                if not key:
                    continue  # hidden files, such as the ._KEY.jpg that macOS adds
                sample = samples.setdefault((folder, key), [0, 0, -1])
                if f".{extension.lower()}" in IMAGE_SUFFIXES:
                    sample[:2] = member.offset_data, member.size
                elif extension == "cls":
                    sample[2] = int(tar.extractfile(member).read())
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(f"{path}: expected an uncompressed tar of images and .cls files: {error}") from error
    bare = ["/".join(filter(None, name)) for name, (_, length, _) in samples.items() if not length]
    if bare or not samples:
        raise ValueError(
            f"{path}: {f'{len(bare)} samples without an image, the first is {bare[0]}' if bare else 'empty'}; "
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
