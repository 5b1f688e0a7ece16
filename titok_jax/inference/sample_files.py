"""Writes generated images: one picture, a folder, or an .npz file.

Each writer takes a path, labels int [n], and batches (slice of the images, images uint8 [B, H, W, 3]) in their order.
"""

import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from titok_jax.inference.many import by_class
from titok_jax.pictures import grids
from titok_jax.runtime.paths import as_path

Batches = Iterable[tuple[slice, np.ndarray]]

FOLDER_FILES = r"\d{6,}_\d+\.png|grid\.png"  # files that `write_folder` writes
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


def write_grid(path: Path, labels: np.ndarray, batches: Batches) -> None:
    """Writes all images in one picture."""
    labelled_grid(np.concatenate([images for _, images in batches]), labels).save(path)


def write_folder(path: Path, labels: np.ndarray, batches: Batches) -> None:
    """Writes one PNG per image, and an overview `grid.png` of up to 100 of them."""
    from PIL import Image

    count, shown = min(_SHOWN, len(labels)), {}
    chosen = by_class(labels)[np.arange(count) * len(labels) // count]  # from every class, or from many
    for where, images in batches:
        for index, image in zip(range(where.start, where.stop), images, strict=True):
            Image.fromarray(image).save(path / f"{index:06d}_{labels[index]}.png")
            if index in chosen:
                shown[index] = image
    labelled_grid(np.stack([shown[index] for index in chosen.tolist()]), labels[chosen]).save(path / "grid.png")


def write_npz(path: Path, labels: np.ndarray, batches: Batches) -> None:
    """Writes the arrays `arr_0` and `labels` that the ADM evaluation reads, without keeping the images in memory."""
    with zipfile.ZipFile(path, "w") as file:
        batches = iter(batches)
        _, images = next(batches)
        shape = (len(labels), *images.shape[1:])
        header = {"descr": np.lib.format.dtype_to_descr(images.dtype), "fortran_order": False, "shape": shape}
        with file.open("arr_0.npy", "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, header)
            array.write(images.tobytes())
            for _, images in batches:
                array.write(images.tobytes())
        with file.open("labels.npy", "w") as array:
            np.lib.format.write_array(array, labels)


def output_writer(out: str, num: int) -> Callable[[Path, np.ndarray, Batches], None]:
    """The writer for an output of that name.

    Raises:
      ValueError: an unknown ending, or too many images for one picture.
    """
    suffix = as_path(out).suffix.lower()
    if out.endswith("/") or as_path(out).is_dir() or not suffix:
        return write_folder
    if suffix not in (".png", ".npz"):
        raise ValueError(f"--out {out}: unknown ending {suffix}; expected .png, .npz, or a folder ({out}/)")
    if suffix == ".png" and num > _LARGEST_GRID:
        raise ValueError(f"--out {out}: {num} images are too many for one picture (at most {_LARGEST_GRID}); name a folder")
    return write_npz if suffix == ".npz" else write_grid
