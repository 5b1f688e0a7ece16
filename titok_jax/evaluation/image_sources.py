"""Sources of the images to evaluate, which read images on demand."""

import os
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from titok_jax.data.transforms import center_crop_adm, center_crop_torchvision
from titok_jax.runtime.paths import as_path

CROPS = {"torchvision": center_crop_torchvision, "adm": center_crop_adm}


class SourceImages:
    """Cropped images of a data set (`titok_jax.data.sources`), read on demand.

    Args:
      crop: "torchvision", as in published reconstructions, or "adm", as in ADM's references.
      num: number of images, spread evenly over the data set; all if not given.
    """

    def __init__(self, source, crop: str, size: int, num: int | None = None):
        if num is not None and not 1 <= num <= len(source):
            raise ValueError(f"{num} images asked for, but the data set has {len(source)}")
        self._source, self._crop, self._size = source, CROPS[crop], size
        self._places = np.arange(num or len(source)) * len(source) // (num or len(source))
        self._threads = ThreadPoolExecutor()

    def __len__(self) -> int:
        return len(self._places)

    def read(self, items: slice) -> np.ndarray:
        """uint8 [b, size, size, 3]."""
        return np.stack(list(self._threads.map(self._one, self._places[items].tolist())))

    def _one(self, place: int) -> np.ndarray:
        return self._crop(self._source[place]["image"], self._size)


class NpzImages:
    """The images `arr_0` of an .npz file, uint8 [n, H, W, 3], read on demand. Reading forwards is fast.

    Attributes:
      shape: (n, H, W, 3).
      size: H = W.
      names: names of the arrays in the file, each with the ending .npy.
      sorted_by_class: whether the file has an array `labels` and it is sorted.

    Raises:
      ValueError: if the file does not hold such images. The message says what it holds.
    """

    def __init__(self, path: str | os.PathLike):
        try:
            file = zipfile.ZipFile(as_path(path).open("rb"))
            self.names = file.namelist()
            if "arr_0.npy" not in self.names:
                raise ValueError(f"it holds {', '.join(self.names) or 'nothing'}, expected arr_0.npy")
            self._array = file.open("arr_0.npy")
            version = np.lib.format.read_magic(self._array)
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            self.shape, fortran_order, dtype = read_header(self._array)
        except (zipfile.BadZipFile, ValueError, EOFError) as error:
            raise ValueError(f"{path} is not an .npz file of images: {error}") from None
        if (
            dtype != np.uint8
            or fortran_order
            or len(self.shape) != 4
            or self.shape[1] != self.shape[2]
            or self.shape[3] != 3
        ):
            raise ValueError(f"{path}: arr_0 is {dtype} {list(self.shape)}, expected uint8 [n, size, size, 3]")
        self.path, self.size = path, self.shape[1]
        self._start = self._array.tell()
        labels = np.zeros(0)
        if "labels.npy" in self.names:
            with as_path(path).open("rb") as raw:
                labels = np.load(raw, allow_pickle=False)["labels"]
        self.sorted_by_class = len(np.unique(labels)) > 1 and bool((np.diff(labels) >= 0).all())

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, items: slice) -> np.ndarray:
        """uint8 [b, size, size, 3]."""
        shape = (items.stop - items.start, *self.shape[1:])
        self._array.seek(self._start + items.start * int(np.prod(shape[1:])))
        data = self._array.read(int(np.prod(shape)))
        if len(data) != np.prod(shape):
            raise ValueError(f"{self.path} is cut short: arr_0 should hold {self.shape[0]} images")
        return np.frombuffer(data, np.uint8).reshape(shape)
