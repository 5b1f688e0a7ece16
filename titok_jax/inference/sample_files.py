"""Writers for generated images: one picture, a folder, or an .npz file."""

import zipfile
from pathlib import Path

import numpy as np

from titok_jax.inference.many import by_class
from titok_jax.pictures import grids
from titok_jax.runtime.paths import as_path

_LARGEST_GRID = 1024  # images in a .png
_SHOWN = 100  # images in the grid.png of a folder


def labelled_grid(images: np.ndarray, labels: np.ndarray, title: str | None = None):
    """A grid of the images, grouped by class: images uint8 [B, H, W, 3], labels int [B] -> PIL image. If every class has the
    same number of images, from 2 to 16, each row is a class. Otherwise each image has its label below."""
    order = by_class(labels)
    images, labels = images[order], labels[order]
    starts = np.flatnonzero(np.diff(labels, prepend=-1))
    counts = np.diff(starts, append=len(labels))
    if len(set(counts)) == 1 and 2 <= counts[0] <= 16:
        return grids.grid(images, int(counts[0]), row_labels=[str(labels[i]) for i in starts], title=title)
    return grids.grid(images, labels=[str(label) for label in labels], title=title)


class GridWriter:
    """Collects all images in one picture."""

    def __init__(self, path: Path, labels: np.ndarray):
        self._path, self._labels, self._images = path, labels, []

    def add(self, where: slice, images: np.ndarray) -> None:
        self._images.append(images)

    def close(self) -> None:
        labelled_grid(np.concatenate(self._images), self._labels).save(self._path)


class FolderWriter:
    """Writes one PNG per image, and an overview `grid.png` of up to 100 of them."""

    def __init__(self, path: Path, labels: np.ndarray):
        self._path, self._labels, self._shown = path, labels, {}
        shown = min(_SHOWN, len(labels))
        self._chosen = by_class(labels)[np.arange(shown) * len(labels) // shown]  # from every class, or from many

    def add(self, where: slice, images: np.ndarray) -> None:
        from PIL import Image

        for index, image in zip(range(where.start, where.stop), images, strict=True):
            Image.fromarray(image).save(self._path / f"{index:06d}_{self._labels[index]}.png")
            if index in self._chosen:
                self._shown[index] = image

    def close(self) -> None:
        images = np.stack([self._shown[index] for index in self._chosen.tolist()])
        labelled_grid(images, self._labels[self._chosen]).save(self._path / "grid.png")


class NpzWriter:
    """Writes the arrays `arr_0` and `labels` that the ADM evaluation reads, without keeping the images in memory."""

    def __init__(self, path: Path, labels: np.ndarray):
        self._labels, self._file, self._array = labels, zipfile.ZipFile(path, "w"), None

    def add(self, where: slice, images: np.ndarray) -> None:
        if self._array is None:
            self._array = self._file.open("arr_0.npy", "w", force_zip64=True)
            shape = (len(self._labels), *images.shape[1:])
            header = {"descr": np.lib.format.dtype_to_descr(images.dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(self._array, header)
        self._array.write(images.tobytes())

    def close(self) -> None:
        self._array.close()
        with self._file.open("labels.npy", "w") as file:
            np.lib.format.write_array(file, self._labels)
        self._file.close()


def output_kind(out: str, num: int) -> type:
    suffix = as_path(out).suffix.lower()
    if out.endswith("/") or as_path(out).is_dir() or not suffix:
        return FolderWriter
    if suffix not in (".png", ".npz"):
        raise ValueError(f"--out {out}: unknown ending {suffix}; expected .png, .npz, or a folder ({out}/)")
    if suffix == ".png" and num > _LARGEST_GRID:
        raise ValueError(f"--out {out}: {num} images are too many for one picture (at most {_LARGEST_GRID}); name a folder")
    return NpzWriter if suffix == ".npz" else GridWriter
