"""Image files and image folders that a user names."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from etils import epath

from titok_jax.data.transforms import IMAGE_SUFFIXES, MAX_PIXELS, center_crop_torchvision, decode_image, image_files
from titok_jax.runtime.messages import near_path
from titok_jax.runtime.paths import as_path, read_bytes

MAX_BYTES = 8 * MAX_PIXELS  # of an image file: as if it were not compressed, with 16 bits for each of four channels


def read_image(path: str | os.PathLike, offset: int = 0, length: int | None = None) -> bytes:
    """The bytes of an image file, or of the part of a file that is one.

    Raises:
      OSError: it cannot be read.
      ValueError: it is no regular file, or larger than any image that is decoded.
    """
    return read_bytes(path, offset, length, most=MAX_BYTES)


def find_images(arguments: Sequence[str]) -> list[tuple[str, Path | epath.Path]]:
    """Finds the named image files, and all images in the named folders and their sub-folders, sorted within each folder.

    Returns:
      (name, file) for each image. The name is the path as a string, relative if it was given as a relative path.

    Raises:
      FileNotFoundError: no such file or folder.
      ValueError: a folder without images.
    """
    files: list[tuple[str, Path | epath.Path]] = []
    for argument in arguments:
        path = as_path(argument)
        if not path.exists():
            raise FileNotFoundError(f"{argument}: no such file or folder{near_path(argument)}")
        found = [path]
        if path.is_dir():
            found = [path.joinpath(*names) for names in image_files(path)]
            if not found:
                suffixes = ", ".join(IMAGE_SUFFIXES)
                raise ValueError(f"{argument}: no images in this folder or below; expected {suffixes} files")
        files += [(str(file), file) for file in found]
    return files


class ImageFiles:
    """Images as the published reconstruction score uses them: shorter side resized to `size`, then cropped to the centre.

    `files[a:b]` decodes images to uint8 [b - a, size, size, 3]; `len(files)` is their number. The constructor decodes every
    image once, as a check. Only the last requested slice is kept in memory.

    Raises:
      ValueError: the message names every file that cannot be read.
    """

    def __init__(self, paths: Sequence[Path | epath.Path], size: int):
        self._paths, self._size, self._last = list(paths), size, (slice(0, 0), None)
        problems = []
        for path in self._paths:
            try:
                self._read(path)
            except (ValueError, OSError) as error:
                problems.append(str(error))
        if problems:
            raise ValueError("unreadable images, nothing was written:\n  " + "\n  ".join(problems))

    def _read(self, path: Path | epath.Path) -> np.ndarray:
        return center_crop_torchvision(decode_image(read_image(path), str(path)), self._size)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, where: slice) -> np.ndarray:
        where = slice(*where.indices(len(self)))
        if self._last[0] != where:
            self._last = where, np.stack([self._read(path) for path in self._paths[where]])
        return self._last[1]
