"""Sources of the images to evaluate, which read images on demand."""

import math
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from titok_jax.data.transforms import center_crop_adm, center_crop_torchvision
from titok_jax.runtime.npz import NpzFile

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
      path: the file.
      shape: (n, H, W, 3).
      size: H = W.
      names: names of the arrays in the file.
      sorted_by_class: whether the file has an array `labels` and it is sorted.

    Raises:
      FileNotFoundError, ValueError: if the file does not hold such images. The message says what it holds.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = path
        self._file = NpzFile(path)
        self.names = self._file.names
        self._images = self._file.open("arr_0")
        self.shape, dtype = self._images.shape, self._images.dtype
        wrong = dtype != np.uint8 or self._images.fortran_order or len(self.shape) != 4
        if wrong or self.shape[1] != self.shape[2] or self.shape[3] != 3:
            raise ValueError(f"{path}: arr_0 is {dtype} {list(self.shape)}, expected uint8 [n, size, size, 3]")
        if 0 in self.shape:
            raise ValueError(f"{path}: arr_0 is {list(self.shape)}, no image at all")
        self.size = self.shape[1]
        labels = self._labels() if "labels" in self.names else np.zeros(0)
        self.sorted_by_class = len(np.unique(labels)) > 1 and bool((labels[1:] >= labels[:-1]).all())

    def _labels(self) -> np.ndarray:
        labels = self._file.read("labels")
        if labels.dtype.kind not in "iu" or labels.shape != self.shape[:1]:
            raise ValueError(
                f"{self.path}: labels is {labels.dtype} {list(labels.shape)}, expected whole numbers [{len(self)}]"
            )
        wrong = labels[(labels < -1) | (labels >= 2**31)]
        if wrong.size:
            raise ValueError(f"{self.path}: label {wrong[0]}, expected a class index below 2^31")
        return labels

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, items: slice) -> np.ndarray:
        """uint8 [b, size, size, 3]."""
        shape = (items.stop - items.start, *self.shape[1:])
        self._images.stream.seek(self._images.start + items.start * math.prod(shape[1:]))
        return np.frombuffer(self._file.read_bytes(self._images, math.prod(shape)), np.uint8).reshape(shape)
