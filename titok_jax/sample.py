"""Generates images from class labels: `python -m titok_jax.sample` makes a labelled grid of digits."""

import argparse
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from titok_jax import pictures, zoo
from titok_jax.cli import check_output, command, new_file, new_folder
from titok_jax.data.transforms import to_uint8_truncate

# JAX is imported where it is first used: `--help` and wrong arguments need not wait for it.

_EPILOG = """examples:
  python -m titok_jax.sample
      64 digits into samples.png, a labelled grid
  python -m titok_jax.sample --labels 3,1,4 --num 30 --out pi.png
      ten images of each of three classes
  python -m titok_jax.sample --model runs/generator/pretrained --num 5000 --out samples.npz
      class-balanced samples for an evaluation: arr_0 uint8 [5000, H, W, 3], and labels
  python -m titok_jax.sample --num 1000 --steps 4 --guidance-scale 2 --seed 7 --out samples/
      a folder with one PNG per image, INDEX_LABEL.png, and grid.png
"""
_FILES = r"\d{6,}_\d+\.png|grid\.png"  # what a folder of samples holds
_LARGEST_GRID = 1024  # images in a .png
_SHOWN = 100  # images in the grid.png of a folder


def sample(
    tokenizer,
    generator,
    labels: np.ndarray,
    seed: int,
    *,
    batch_size: int = 64,
    **settings: Any,
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Images for labels, batch by batch. Image i depends on its label, the seed and i, and on the batch size by no
    more than the rounding of sums.

    Args:
      tokenizer, generator: as `titok_jax.load_pair` gives them.
      labels: int [n], 0 .. num_classes - 1.
      seed: of all randomness.
      batch_size: images at a time; the last batch is filled up, so that one program serves all.
      settings: of `titok_jax.generate`.

    Yields:
      Where in the labels, token ids int32 [b, N], images uint8 [b, H, W, 3] as the published sampling script rounds them.

    Raises:
      ValueError: a label or setting out of range.
    """
    import jax

    from titok_jax.inference import generate

    key = jax.random.key(seed, impl="threefry2x32")
    batch_size = min(batch_size, len(labels))
    for start in range(0, len(labels), batch_size):
        part = labels[start : start + batch_size]
        padded = np.pad(part, (0, batch_size - len(part)), mode="edge")
        ids = generate(generator, padded, key, first_index=start, **settings)
        images = to_uint8_truncate(tokenizer.decode(ids))
        yield slice(start, start + len(part)), np.asarray(ids)[: len(part)], images[: len(part)]


def spread_labels(classes: Sequence[int], num: int) -> np.ndarray:
    """`num` labels, in the order of `classes`, each as often as the others (differing by one at most): int32 [num].

    With fewer images than classes these are spread evenly over the classes.
    """
    return np.asarray(classes, np.int32)[np.arange(num) * len(classes) // num]


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say how tokens are sampled."""
    group = parser.add_argument_group("sampling", "what is not given is taken from the model's configuration")
    group.add_argument("--seed", type=int, default=0, help="same seed, same images (default: 0)")
    group.add_argument("--steps", type=int, help="decoding steps")
    group.add_argument("--guidance-scale", type=float, help="of classifier-free guidance; more: clearer, less varied")
    group.add_argument("--guidance-schedule", help="how it grows over the steps: constant, linear or power-cosine")
    group.add_argument("--temperature", type=float, help="of the noise in the first steps; more: more varied")
    group.add_argument("--batch-size", type=int, default=64, help="images at a time (default: 64)")


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
    """A grid in which each row is a class if every class has the same number of images, up to 16; else each image has its
    label below. images uint8 [B, H, W, 3], labels int [B], equal ones together -> PIL image."""
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
        self._chosen = np.arange(min(_SHOWN, len(labels))) * len(labels) // min(_SHOWN, len(labels))

    def add(self, where: slice, images: np.ndarray) -> None:
        from PIL import Image

        for index, image in zip(range(where.start, where.stop), images, strict=True):
            Image.fromarray(image).save(self._path / f"{index:06d}_{self._labels[index]}.png")
            if index in self._chosen:
                self._shown[index] = image

    def close(self) -> None:
        images = np.stack([self._shown[index] for index in self._chosen])
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
    parser.add_argument("--labels", default="all", help="classes: numbers separated by commas, or all (default: all)")
    parser.add_argument("--num", type=int, default=64, help="how many images, shared among the labels (default: 64)")
    parser.add_argument(
        "--out",
        default="samples.png",
        help="FILE.png: one picture; FILE.npz: arrays; else a folder with one PNG per image (default: samples.png)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="to compute in")
    add_sampling_arguments(parser)
    return parser


def _output_kind(out: str, num: int) -> type:
    suffix = Path(out).suffix.lower()
    if out.endswith("/") or Path(out).is_dir() or not suffix:
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

    tokenizer_config, config = inference.pair_configs(args.model, args.tokenizer)
    if tokenizer_config.predicts_codes:
        raise ValueError("the tokenizer is a stage 1 model, which predicts codes, not images; name one of stage 2")
    settings = sampling_settings(args, config.sampling)
    classes = parse_labels(args.labels, config.num_classes)
    if args.labels.strip() != "all" and args.num < len(classes):
        raise ValueError(f"--num is {args.num}, but --labels names {len(classes)} classes")
    labels = spread_labels(classes, args.num)

    tokenizer, generator = inference.load_pair(args.model, args.tokenizer, dtype=args.dtype)
    print(
        f"{args.model}: {config.num_classes} classes, {config.num_tokens} tokens of {config.codebook_size} codes per image, "
        f"{tokenizer_config.image_size}x{tokenizer_config.image_size} pixels\n"
        + "sampling: "
        + ", ".join(f"{name} {value}" for name, value in settings.items())
        + f", seed {args.seed}"
    )
    print("compiling; the first batch takes longer", flush=True)
    new = new_folder if kind is _Folder else new_file
    start = time.perf_counter()
    with new(out) as path, tqdm(total=args.num, unit="image") as bar:
        writer = kind(path, labels)
        first = None
        for where, _, images in sample(tokenizer, generator, labels, args.seed, batch_size=args.batch_size, **settings):
            writer.add(where, images)
            bar.update(len(images))
            first = first or (where.stop, time.perf_counter())
        seconds = time.perf_counter() - start
        writer.close()
    speed = f"{args.num / seconds:.1f} images/s with compilation"
    if first[0] < args.num:
        speed += f", {(args.num - first[0]) / (start + seconds - first[1]):.1f} images/s after the first batch"
    print(f"{args.num} images in {seconds:.1f} s ({speed})\nwrote {out}")


if __name__ == "__main__":
    sys.exit(main())
