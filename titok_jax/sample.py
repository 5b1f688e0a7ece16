"""Generates images from class labels: `python -m titok_jax.sample` makes a labelled grid of digits.

The images are made in batches, kept in OUT.shards until all are there: the same command, started again after any kill, makes
the missing ones and ends with the same file. Where `jax.distributed` is initialised, processes share the batches.
"""

import argparse
import hashlib
import os
import sys
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from titok_jax import pictures, zoo
from titok_jax.cli import check_output, command, new_file, new_folder
from titok_jax.data.transforms import to_uint8_truncate
from titok_jax.shards import Shards
from titok_jax.storage import as_path

# JAX is imported where it is first used: `--help` and wrong arguments need not wait for it.

_EPILOG = """examples:
  python -m titok_jax.sample
      64 digits into samples.png, a labelled grid
  python -m titok_jax.sample --labels 3,1,4 --num 30 --out pi.png
      ten images of each of three classes
  python -m titok_jax.sample --model titok_l32 --num 50000 --out samples.npz
      samples for the published evaluation: arr_0 uint8 [50000, 256, 256, 3], and labels; stop and start it at will
  python -m titok_jax.sample --num 1000 --steps 4 --guidance-scale 2 --seed 7 --out samples/
      a folder with one PNG per image, INDEX_LABEL.png, and grid.png
"""
_FILES = r"\d{6,}_\d+\.png|grid\.png"  # what a folder of samples holds
_LARGEST_GRID = 1024  # images in a .png
_SHOWN = 100  # images in the grid.png of a folder

# Of the computation dtypes. On TPU and GPU a float32 product is otherwise one of bfloat16 or TF32.
MATMUL_PRECISION = {"float32": "highest", "bfloat16": "default"}


def sample(
    tokenizer,
    generator,
    labels: np.ndarray,
    seed: int,
    *,
    batch_size: int = 64,
    batches: Iterable[int] | None = None,
    **settings: Any,
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Images for labels, batch by batch. Image i depends on its label, the seed and i, and on the batch size by no
    more than the rounding of sums.

    Args:
      tokenizer, generator: as `titok_jax.load_pair` gives them.
      labels: int [n], 0 .. num_classes - 1.
      seed: of all randomness.
      batch_size: images at a time; batches are filled up to it, so that one program serves all.
      batches: the numbers of the batches to make, counted from 0; all if not given.
      settings: of `titok_jax.generate`.

    Yields:
      Where in the labels, token ids int32 [b, N], images uint8 [b, H, W, 3] as the published sampling script rounds them.

    Raises:
      ValueError: a label or setting out of range.
    """
    import jax

    from titok_jax.inference import generate

    key = jax.random.key(seed, impl="threefry2x32")
    for batch in range(-(-len(labels) // batch_size)) if batches is None else batches:
        start = batch * batch_size
        part = labels[start : start + batch_size]
        padded = np.pad(part, (0, batch_size - len(part)), mode="edge")
        ids = generate(generator, padded, key, first_index=start, **settings)
        images = to_uint8_truncate(tokenizer.decode(ids))
        yield slice(start, start + len(part)), np.asarray(ids)[: len(part)], images[: len(part)]


def local_mesh():
    """A mesh of this process's devices, for the batches that it makes; None if there is one device."""
    import jax

    from titok_jax.sharding import make_mesh

    devices = jax.local_devices()
    return make_mesh(devices=devices) if len(devices) > 1 else None


def whole_batch(batch_size: int, num: int) -> int:
    """The batch size for `num` images: no larger than need be, and a multiple of the devices that share a batch."""
    import jax

    devices = jax.local_device_count()
    return -(-min(batch_size, num) // devices) * devices


def balanced_labels(classes: Sequence[int], num: int) -> np.ndarray:
    """`num` labels, the classes in turn, 0 1 2 ... 0 1 2 ..., as the published sampling script gives them: int32 [num].

    Each is there as often as the others (differing by one at most). With fewer images than classes these are spread evenly
    over the classes. (The published script, run on R processes, deals the list out in R parts and numbers their images in
    turn, so that its file has these labels in another order.)
    """
    places = np.arange(num) % len(classes) if num >= len(classes) else np.arange(num) * len(classes) // num
    return np.asarray(classes, np.int32)[places]


def by_class(labels: np.ndarray) -> np.ndarray:
    """The places of labels [n] with equal ones together, classes in the order in which they first appear: int64 [n]."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(first[inverse], kind="stable")


def sha256(path: str | os.PathLike) -> str:
    """Of a file, as hexadecimal digits."""
    with as_path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(
    generator: str | None, tokenizer: str | None, revision: str | None = None, tokenizer_revision: str | None = None
) -> dict[str, str]:
    """{"generator": ..., "tokenizer": ...}: SHA-256 of the files that `load_generator` and `load_tokenizer` (`load_vqgan`)
    read for these names or folders, of these revisions on the hub; what is None is left out. Errors as there."""
    from titok_jax import pretrained
    from titok_jax.models import GeneratorConfig, TiTokConfig

    result = {}
    if generator is not None:
        result["generator"] = sha256(pretrained.locate(generator, GeneratorConfig, revision=revision).weights)
    if tokenizer is not None:
        kind = pretrained.tokenizer_kind(tokenizer, revision=tokenizer_revision) if generator is None else TiTokConfig
        result["tokenizer"] = sha256(pretrained.locate(tokenizer, kind, revision=tokenizer_revision).weights)
    return result


def add_sampling_arguments(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """The options that say how tokens are sampled; with `several`, guidance scale and temperature are lists of numbers."""
    number, more = (_numbers, "; several, separated by commas: a grid") if several else (float, "")
    group = parser.add_argument_group("sampling", "what is not given is taken from the model's configuration")
    group.add_argument("--seed", type=int, default=0, help="same seed, same images (default: 0)")
    group.add_argument("--steps", type=int, help="decoding steps")
    group.add_argument(
        "--guidance-scale", type=number, help=f"of classifier-free guidance; more: less varied; 0: none{more}"
    )
    group.add_argument("--guidance-schedule", help="how it grows over the steps: constant, linear or power-cosine")
    group.add_argument("--temperature", type=number, help=f"of the noise in the first steps; more: more varied{more}")
    group.add_argument("--batch-size", type=int, default=64, help="images at a time (default: 64)")


def _numbers(text: str) -> list[float]:
    """ "0,1.5" -> [0.0, 1.5]."""
    return [float(part) for part in text.split(",")]


def sampling_settings(args: argparse.Namespace, defaults) -> dict[str, Any]:
    """The checked arguments of `titok_jax.generate`, complete.

    Args:
      args: from a parser with `add_sampling_arguments`.
      defaults: the model's SamplingConfig.

    Raises:
      ValueError: a value out of range.
    """
    from titok_jax.decoding import GUIDANCE_SCHEDULES

    if args.batch_size < 1:
        raise ValueError(f"--batch-size is {args.batch_size}, expected at least 1")
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps is {args.steps}, expected at least 1")
    if args.temperature is not None and not 0 <= args.temperature < np.inf:
        raise ValueError(f"--temperature is {args.temperature}, expected at least 0")
    if args.guidance_scale is not None and not np.isfinite(args.guidance_scale):
        raise ValueError(f"--guidance-scale is {args.guidance_scale}, expected a finite number")
    if args.guidance_schedule not in (None, *GUIDANCE_SCHEDULES):
        raise ValueError(
            f"--guidance-schedule is {args.guidance_schedule!r}, expected one of {', '.join(GUIDANCE_SCHEDULES)}"
        )
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed is {args.seed}, expected 0 to {2**32 - 1}")

    def either(value, default):
        return default if value is None else value

    return {
        "num_steps": either(args.steps, defaults.num_steps),
        "guidance_scale": either(args.guidance_scale, defaults.guidance_scale),
        "guidance_schedule": either(args.guidance_schedule, defaults.guidance_schedule),
        "temperature": either(args.temperature, defaults.temperature),
        "softmax_temperature_annealing": defaults.softmax_temperature_annealing,
    }


def parse_labels(text: str, num_classes: int) -> list[int]:
    """ "3,1,4" -> [3, 1, 4], "all" -> every class.

    Raises:
      ValueError: something else than numbers, or a label out of range.
    """
    if text.strip() == "all":
        return list(range(num_classes))
    try:
        labels = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--labels is {text!r}, expected numbers like 3,1,4, or all") from None
    wrong = [label for label in labels if not 0 <= label < num_classes]
    if wrong:
        raise ValueError(f"--labels: {wrong[0]} is out of range; this model has the labels 0 to {num_classes - 1}")
    return labels


def labelled_grid(images: np.ndarray, labels: np.ndarray, title: str | None = None):
    """A grid of the images by class: each row is a class if every class has the same number of images, up to 16; else each
    image has its label below. images uint8 [B, H, W, 3], labels int [B] -> PIL image."""
    order = by_class(labels)
    images, labels = images[order], labels[order]
    starts = np.flatnonzero(np.diff(labels, prepend=-1))
    counts = np.diff(starts, append=len(labels))
    if len(set(counts)) == 1 and 2 <= counts[0] <= 16:
        return pictures.grid(images, int(counts[0]), row_labels=[str(labels[i]) for i in starts], title=title)
    return pictures.grid(images, labels=[str(label) for label in labels], title=title)


class _Grid:
    """Collects every image for one picture."""

    def __init__(self, path: Path, labels: np.ndarray):
        self._path, self._labels, self._images = path, labels, []

    def add(self, where: slice, images: np.ndarray) -> None:
        self._images.append(images)

    def close(self) -> None:
        labelled_grid(np.concatenate(self._images), self._labels).save(self._path)


class _Folder:
    """Writes a PNG per image, and keeps a few for a picture of all."""

    def __init__(self, path: Path, labels: np.ndarray):
        self._path, self._labels, self._shown = path, labels, {}
        shown = min(_SHOWN, len(labels))
        self._chosen = by_class(labels)[np.arange(shown) * len(labels) // shown]  # of every class, or of many

    def add(self, where: slice, images: np.ndarray) -> None:
        from PIL import Image

        for index, image in zip(range(where.start, where.stop), images, strict=True):
            Image.fromarray(image).save(self._path / f"{index:06d}_{self._labels[index]}.png")
            if index in self._chosen:
                self._shown[index] = image

    def close(self) -> None:
        images = np.stack([self._shown[index] for index in self._chosen.tolist()])
        labelled_grid(images, self._labels[self._chosen]).save(self._path / "grid.png")


class _Npz:
    """Writes the arrays `arr_0` and `labels`, as the ADM evaluation reads them, without holding the images."""

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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m titok_jax.sample",
        description="Generates images from class labels and writes them as a picture, a folder or an .npz file.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = ", ".join(zoo.names("generator"))
    parser.add_argument("--model", default="digits", help=f"name ({known}) or folder of a generator (default: digits)")
    parser.add_argument("--tokenizer", help="name or folder, if not the one in the generator's folder")
    parser.add_argument("--revision", help="branch, tag or commit of a generator on the hub (HF_TOKEN: a token for it)")
    parser.add_argument("--tokenizer-revision", help="the same of its tokenizer, which is in a repository of its own")
    parser.add_argument("--labels", default="all", help="classes: numbers separated by commas, or all (default: all)")
    parser.add_argument("--num", type=int, default=64, help="how many images, shared among the labels (default: 64)")
    parser.add_argument(
        "--out",
        default="samples.png",
        help="FILE.png: one picture; FILE.npz: arrays; else a folder, one PNG per image; also gs:// (default: samples.png)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output, and unfinished work of other settings")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="to compute in")
    add_sampling_arguments(parser)
    return parser


def _output_kind(out: str, num: int) -> type:
    suffix = as_path(out).suffix.lower()
    if out.endswith("/") or as_path(out).is_dir() or not suffix:
        return _Folder
    if suffix not in (".png", ".npz"):
        raise ValueError(f"--out {out}: unknown ending {suffix}; expected .png, .npz, or a folder ({out}/)")
    if suffix == ".png" and num > _LARGEST_GRID:
        raise ValueError(f"--out {out}: {num} images are too many for one picture (at most {_LARGEST_GRID}); name a folder")
    return _Npz if suffix == ".npz" else _Grid


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if args.num < 1:
        raise ValueError(f"--num is {args.num}, expected at least 1")
    kind = _output_kind(args.out, args.num)
    out = check_output(args.out, args.overwrite, folder_of=_FILES if kind is _Folder else None)
    zoo.find(args.model, "generator")  # before JAX is imported

    from titok_jax import inference

    revisions = {"revision": args.revision, "tokenizer_revision": args.tokenizer_revision}
    tokenizer_config, config = inference.pair_configs(args.model, args.tokenizer, **revisions)
    if tokenizer_config.predicts_codes:
        raise ValueError("the tokenizer is a stage 1 model, which predicts codes, not images; name one of stage 2")
    settings = sampling_settings(args, config.sampling)
    classes = parse_labels(args.labels, config.num_classes)
    if args.labels.strip() != "all" and args.num < len(classes):
        raise ValueError(f"--num is {args.num}, but --labels names {len(classes)} classes")
    labels = balanced_labels(classes, args.num)

    import jax

    from titok_jax import sharding

    sharding.start_processes()
    batch_size = whole_batch(args.batch_size, args.num)
    shards = Shards(
        f"{out}.shards",
        {"labels": args.labels, "seed": args.seed, "dtype": args.dtype}
        | settings
        | weights_sha256(args.model, args.tokenizer or args.model, **revisions),
        args.num,
        batch_size,
        restart=args.overwrite,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    tokenizer, generator = inference.load_pair(args.model, args.tokenizer, dtype=args.dtype, mesh=local_mesh(), **revisions)

    def pieces(numbers):
        options = {"batch_size": batch_size, "batches": numbers, **settings}
        for _, _, images in sample(tokenizer, generator, labels, args.seed, **options):
            yield {"images": images}

    print(
        f"{args.model}: {config.num_classes} classes, {config.num_tokens} tokens of {config.codebook_size} codes per image, "
        f"{tokenizer_config.image_size}x{tokenizer_config.image_size} pixels\n"
        + "sampling: "
        + ", ".join(f"{name} {value}" for name, value in settings.items())
        + f", seed {args.seed}\ncompiling; the first batch takes longer",
        flush=True,
    )
    with jax.default_matmul_precision(MATMUL_PRECISION[args.dtype]):
        print(shards.make(pieces))
    if shards.first:
        with new_folder(out, last="grid.png") if kind is _Folder else new_file(out) as path:
            writer = kind(path, labels)
            for number, piece in enumerate(shards):
                writer.add(shards.items(number), piece["images"])
            writer.close()
        shards.remove()
        print(f"wrote {out}")
    shards.wait("written")


if __name__ == "__main__":
    sys.exit(main())
