"""Sources of the images to evaluate, which read images on demand."""

import math
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from titok_jax.data.checked import CheckedSource, Limits
from titok_jax.data.sources import FolderSource, make_source, parse_source
from titok_jax.data.token_shards import in_threads
from titok_jax.data.transforms import Undecodable, center_crop_adm, center_crop_torchvision
from titok_jax.runtime.npz import NpzFile
from titok_jax.runtime.paths import is_remote

CROPS = {"torchvision": center_crop_torchvision, "adm": center_crop_adm}


class SourceImages:
    """Images of a data set (`titok_jax.data.sources`), cropped or whole, read on demand.

    Args:
      source: the data set.
      crop: "torchvision", as in published reconstructions, or "adm", as in ADM's references; None: the images as they are,
        which must all be squares of one size.
      size: height and width of the crops; None if there is no crop.
      num: number of images, spread evenly over the data set; all if not given.
      skip: leave out the images that cannot be decoded. Each is decoded once to find them.

    Attributes:
      size: height and width of the images.
      left_out: why each image was left out; None without `skip`.
      sorted_by_class: whether the images are those of a folder of class folders.

    Raises:
      ValueError: more images are asked for than there are, or none can be read. On reading: an image cannot be decoded, or
        has another size; the message names it.
    """

    def __init__(self, source, crop: str | None, size: int | None, num: int | None = None, *, skip: bool = False):
        if num is not None and not 1 <= num <= len(source):
            raise ValueError(f"{num} images asked for, but the data set has {len(source)}")
        self._source, self._crop, self.left_out = CheckedSource(source, Limits()), crop and CROPS[crop], None
        self._threads = ThreadPoolExecutor()
        places = np.arange(num or len(source)) * len(source) // (num or len(source))
        if crop is None and isinstance(source, FolderSource):
            places = places[[not shown for shown in _overviews(source.paths)]]
        self._places = self._readable(places) if skip else places
        self.size = size or len(self._decoded(int(self._places[0])))
        self.sorted_by_class = isinstance(source, FolderSource) and len(source.class_names) > 1

    @property
    def digest(self) -> str:
        """Of the names, sizes and numbers of images of the files. No image is read for it."""
        return self._source.contents()["digest"]

    def _readable(self, places: np.ndarray) -> np.ndarray:
        def problem(place: int) -> str | None:
            try:
                self._source[place]
            except Undecodable as error:
                return str(error)

        found = in_threads(problem, places.tolist())
        reasons = list(tqdm(found, total=len(places), unit="image", desc="looking"))
        self.left_out = [reason for reason in reasons if reason is not None]
        if len(self.left_out) == len(places):
            raise ValueError(f"none of the {len(places)} images can be read, the first: {self.left_out[0]}")
        return places[[reason is None for reason in reasons]]

    def __len__(self) -> int:
        return len(self._places)

    def read(self, items: slice) -> np.ndarray:
        """uint8 [b, size, size, 3]."""
        return np.stack(list(self._threads.map(self._one, self._places[items].tolist())))

    def _one(self, place: int) -> np.ndarray:
        image = self._decoded(place)
        if self._crop:
            return self._crop(image, self.size)
        if image.shape[:2] != (self.size, self.size):
            raise ValueError(
                f"{self._source.where(place)}: {image.shape[1]}x{image.shape[0]} pixels, expected squares of one size, "
                f"{self.size}x{self.size}: samples are compared as they are"
            )
        return image

    def _decoded(self, place: int) -> np.ndarray:
        try:
            example = self._source[place]
        except Undecodable as error:
            raise Undecodable(f"{error}; --skip-unreadable leaves such images out and counts them") from None
        if "image" not in example:
            raise ValueError(f"{self._source.where(place)}: tokens, expected an image")
        return example["image"]


def _overviews(paths: Sequence[str]) -> list[bool]:
    """Which of the images in a folder are grid.png, which `sample` writes beside its samples."""
    names = [os.path.basename(path) for path in paths]
    others = [name for name in names if name != "grid.png"]
    samples = others and all(re.fullmatch(r"\d{6,}_\d+\.png", name) for name in others)
    return [bool(samples) and name == "grid.png" for name in names]


def open_samples(text: str, skip: bool = False) -> "NpzImages | SourceImages":
    """Opens the images that `--samples` names: an .npz file, or a data set whose images are compared as they are.

    Raises:
      FileNotFoundError, ValueError: as `NpzImages`, `SourceImages` and `make_source`.
    """
    if text.endswith(".npz") or (not is_remote(text) and os.path.isfile(text)):
        return NpzImages(text)
    return SourceImages(make_source(parse_source(text)), None, None, skip=skip)


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
