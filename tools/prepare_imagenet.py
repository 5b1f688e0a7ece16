"""Converts ImageNet to the ArrayRecord files that the recipes read, or to WebDataset tars.

The files hold the original bytes of the JPEGs, with labels 0 to 999 in the order of the sorted WordNet ids. Archives are
read in place and not unpacked. A shard appears only when it is complete. After an interruption, the same command makes the
missing shards, and no image is lost or duplicated. Every image is decoded as a check; images that cannot be decoded are left
out and listed.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import sys
import tarfile
import threading
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from titok_jax.data.files import check_complete, find_files
from titok_jax.data.image_files import read_image
from titok_jax.data.parquet import ParquetSource
from titok_jax.data.records import image_writer
from titok_jax.data.sources import ArrayRecordSource, FolderSource, TfdsSource
from titok_jax.data.transforms import decode_image
from titok_jax.data.webdataset import WebDatasetSource, tar_files, tar_writer
from titok_jax.runtime.arguments import MOST_SHARDS, MOST_THREADS, Parser, Whole
from titok_jax.runtime.command import command
from titok_jax.runtime.locks import lock_run
from titok_jax.runtime.outputs import check_output, new_file, remove_leftovers
from titok_jax.runtime.paths import is_remote
from titok_jax.runtime.shards import Shards

_EPILOG = """examples:
  python tools/prepare_imagenet.py ILSVRC2012_img_train.tar --split train --out imagenet
  python tools/prepare_imagenet.py ILSVRC2012_img_val.tar --split val --out imagenet
      the original archives; the second needs ILSVRC2012_devkit_t12.tar.gz beside it, or where --devkit says
  python tools/prepare_imagenet.py ILSVRC/Data/CLS-LOC/train --split train --out imagenet
      a folder of class folders
  python tools/prepare_imagenet.py ~/tensorflow_datasets/imagenet2012/5.1.0 --split val --out imagenet
      a TFDS set that was prepared with file_format="array_record"
  python tools/prepare_imagenet.py 'shards/imagenet-train-*.tar' --split train --out imagenet
      WebDataset tars: KEY.jpg (.jpeg, .png, .webp) and KEY.cls; also 'imagenet-train-{0000..0252}.tar'
  python tools/prepare_imagenet.py imagenet-1k --split val --out imagenet
      the Parquet files of a data set on the hub, in this folder or in data/ below it; columns image and label
  python -m titok_jax.train --config configs/stage1.py:l32 --config.data.source.paths='imagenet/train-*' ...
      trains on them

In OUT: SPLIT-00000-of-00128.array_record (or .tar) and so on; SPLIT.json, what was found, with the images of each class; and
SPLIT.left_out.txt, if images were left out. Image i of the input is in shard i modulo the number of shards. A shard made of
Parquet files has images that follow each other there.

Exit status: 0 if all is as in ImageNet; 1 if all was written, but images were left out or the numbers are not those of
ImageNet; 2 after an error, and the same command goes on.
"""
NUM_CLASSES = 1000
LARGEST_KIT, LARGEST_KIT_FILE = (
    2**26,
    2**20,
)  # bytes of the development kit unpacked (3 MB), and of a file in it that is read
WRITERS = {"array_record": (".array_record", image_writer), "webdataset": (".tar", tar_writer)}  # by --format


@dataclasses.dataclass(frozen=True)
class Split:
    """Known facts about a split of ImageNet.

    Attributes:
      images: number of images.
      per_class: smallest and largest number of images in a class.
      tfds: name of the split in TFDS.
      shards: default number of files to write, about 1 GB (train) or 0.4 GB (val) each.
    """

    images: int
    per_class: tuple[int, int]
    tfds: str
    shards: int


SPLITS = {"train": Split(1_281_167, (732, 1300), "train", 128), "val": Split(50_000, (50, 50), "validation", 16)}


class TarImages:
    """Image files in an uncompressed tar, or in tars inside it. Each is read at its offset.

    Attributes:
      names: names of the files [n].
      spans: int64 [n, 3]: offset in the outer file, length, label.
      class_names: WordNet ids, indexed by label.
    """

    def __init__(self, path: Path, names: list[str], spans: np.ndarray, class_names: list[str]):
        self._path, self.names, self.spans, self.class_names = path, names, spans, class_names

    def __len__(self) -> int:
        return len(self.spans)

    def encoded(self, index: int) -> tuple[bytes, int, str]:
        """Returns the bytes of an image file, its label, and its location for error messages."""
        offset, length, label = self.spans[index].tolist()
        return read_image(self._path, offset, length), label, f"{self._path}, {self.names[index]}"


@contextlib.contextmanager
def tar_errors(what: str) -> Iterator[None]:
    """Turns the errors that a damaged tar raises into a ValueError that names the tar as `what`."""
    try:
        yield
    except (tarfile.ReadError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{what}: {error}; is it complete? Compare its size and checksum, or download it again") from error


def train_archive(path: Path) -> TarImages:
    """The images of ILSVRC2012_img_train.tar, which holds one tar for each class. Only headers are read here.

    Raises:
      ValueError: the file is damaged, truncated or another tar.
    """
    names, spans = [], []
    with path.open("rb") as archive:
        with tar_errors(str(path)):
            members = list(tar_files(archive))
        strange = [member.name for member in members if not re.fullmatch(r"(.*/)?n\d{8}\.tar", member.name)]
        if strange:
            raise ValueError(f"{path}: holds {strange[0]}; expected tars named after WordNet ids, n01440764.tar")
        wnids = [Path(member.name).stem for member in members]
        class_names = sorted(wnids)
        if len(set(wnids)) < len(wnids):
            raise ValueError(f"{path}: holds {next(w for w in wnids if wnids.count(w) > 1)}.tar more than once")
        for wnid, member in zip(tqdm(wnids, unit="class", desc="looking"), members, strict=True):
            archive.seek(member.offset_data)
            with tar_errors(f"{path}, {member.name}"):
                files = list(tar_files(archive, member.offset_data + member.size))
            names += [f"{wnid}/{file.name}" for file in files]
            label = class_names.index(wnid)
            places = [(file.offset_data, file.size, label) for file in files]
            spans.append(np.array(places, np.int64).reshape(-1, 3))
    return TarImages(path, names, np.concatenate(spans), class_names)


def val_archive(path: Path, devkit: Path) -> TarImages:
    """The images of ILSVRC2012_img_val.tar, with labels from the development kit.

    Raises:
      FileNotFoundError: there is no development kit.
      ValueError: the archive or the kit is damaged, truncated or another tar.
    """
    class_names, truth = read_devkit(devkit)
    with tar_errors(str(path)), path.open("rb") as archive:
        files = list(tar_files(archive))
    spans = []
    for file in files:
        number = re.fullmatch(r"(?:.*/)?ILSVRC2012_val_(\d{8})\.JPEG", file.name)
        if number is None or not 1 <= int(number[1]) <= len(truth):
            raise ValueError(
                f"{path}: holds {file.name}; expected ILSVRC2012_val_00000001.JPEG to {len(truth):08}, of which "
                f"{devkit} has the labels"
            )
        spans.append((file.offset_data, file.size, truth[int(number[1]) - 1]))
    return TarImages(path, [file.name for file in files], np.array(spans, np.int64).reshape(-1, 3), class_names)


def read_devkit(path: Path) -> tuple[list[str], np.ndarray]:
    """Reads the labels of the validation images from ILSVRC2012_devkit_t12.tar.gz.

    The kit numbers its classes 1 to 1000 in an order of its own. Labels follow the sorted WordNet ids instead, as elsewhere.

    Returns:
      (WordNet ids, indexed by label; label of each validation image [n]).

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, or not this kit.
    """
    import scipy.io

    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; the labels of the validation images are in ILSVRC2012_devkit_t12.tar.gz, from where the "
            "archives are; put it there, or name it by --devkit"
        )
    files = {"meta.mat": None, "ILSVRC2012_validation_ground_truth.txt": None}
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"  # some browsers unpack it
    with tar_errors(str(path)), gzip.open(path) if packed else path.open("rb") as kit:
        for member in tar_files(kit, LARGEST_KIT):
            name = Path(member.name).name
            if name in files and member.size <= LARGEST_KIT_FILE:
                kit.seek(member.offset_data)
                files[name] = kit.read(member.size)
    for name, data in files.items():
        if data is None:
            raise ValueError(f"{path}: holds no {name}; expected the development kit of ILSVRC2012, tasks 1 and 2")
    try:
        synsets = np.atleast_1d(scipy.io.loadmat(io.BytesIO(files["meta.mat"]), squeeze_me=True)["synsets"])
        leaves = synsets[synsets["num_children"] == 0]  # the other synsets are ancestors of these in WordNet
        wnids = {int(leaf["ILSVRC2012_ID"]): str(leaf["WNID"]) for leaf in leaves}
        class_names = sorted(wnids.values())
        label_of = {number: class_names.index(wnid) for number, wnid in wnids.items()}
        truth = files["ILSVRC2012_validation_ground_truth.txt"].split()
        return class_names, np.array([label_of[int(number)] for number in truth], np.int64)
    except Exception as error:  # SciPy raises many kinds of exceptions for an unexpected file
        raise ValueError(f"{path}: its meta.mat and ground truth are not those of ILSVRC2012: {error!r}") from error


def open_images(args: argparse.Namespace, inputs: Sequence[str | Path]) -> tuple[str, Any, Sequence[Any]]:
    """Detects the kind of the input and opens it.

    Returns:
      (description, images with a method `encoded`, files that hold the images).

    Raises:
      FileNotFoundError: no such file or folder.
      ValueError: an unknown kind of input, or another split.
    """
    split = args.split
    paths = [Path(name).expanduser() for name in inputs]
    if len(paths) == 1 and paths[0].is_dir():
        return open_folder(args, paths[0])
    for path in paths:
        if path.is_dir():
            raise ValueError(f"{path}: expected a file, or a single folder")
    found = list(map(Path, find_files(paths, "a folder, an archive or tars")))
    with found[0].open("rb") as file:
        if file.read(4) == b"PAR1" or found[0].suffix == ".parquet":
            return "Parquet files", ParquetSource(found, args.image_key, args.label_key), found
    if args.skip_damaged:  # the first may be one of them; ImageNet's archives are single files
        return "WebDataset tars", WebDatasetSource(found, skip_damaged=True), found
    with tar_errors(f"{found[0]}: expected an uncompressed tar"), found[0].open("rb") as file:
        first = next((Path(member.name) for member in tar_files(file)), Path())
    kind = "train" if first.suffix == ".tar" else "val" if re.match(r"ILSVRC2012_val_\d+\.JPEG", first.name) else None
    if kind is None:
        return "WebDataset tars", WebDatasetSource(found), found
    if kind != split or len(found) > 1:
        raise ValueError(f"{found[0]}: this is ImageNet's {kind} archive; give it alone, with --split {kind}")
    if kind == "train":
        return "the archive of the training images", train_archive(found[0]), found
    devkit = args.devkit or found[0].parent / "ILSVRC2012_devkit_t12.tar.gz"
    return "the archive of the validation images", val_archive(found[0], devkit), [found[0], devkit]


def of_split(files: Sequence[Path], split: str) -> list[Path]:
    """The files that are named after the split, or all if none is named after any.

    Raises:
      ValueError: they are named after other splits only.
    """
    if not any(name in path.name for path in files for name in SPLITS):
        return list(files)
    chosen = [path for path in files if split in path.name]
    if not chosen:
        raise ValueError(f"{files[0].parent}: holds {files[0].name} and the like, but no file that is named {split}")
    return chosen


def open_folder(args: argparse.Namespace, folder: Path) -> tuple[str, Any, Sequence[Any]]:
    """`open_images` for a folder."""
    split = args.split
    archive = folder / f"ILSVRC2012_img_{split}.tar"
    if archive.is_file():
        return open_images(args, [archive])
    infos = [path for depth in ("", "*/", "imagenet2012/*/") for path in folder.glob(f"{depth}dataset_info.json")]
    if len(infos) > 1:
        raise ValueError(f"{folder}: holds several TFDS sets, {', '.join(str(i.parent) for i in infos)}; name one of them")
    if infos:
        name = SPLITS[split].tfds
        path = infos[0].parent
        return f"a TFDS set, {name}", TfdsSource(name, path=str(path)), sorted(path.iterdir())
    for pattern in ("*.tar", "*.parquet", "data/*.parquet"):
        if files := sorted(folder.glob(pattern)):
            files = of_split(files, split)
            check_complete(files, f"{folder}/{pattern}")
            return open_images(args, files)
    if (folder / split).is_dir():
        return open_folder(args, folder / split)
    try:
        source = FolderSource(folder)
    except ValueError as error:
        raise ValueError(
            f"{error}. Known are also {archive.name}, WebDataset tars, Parquet files and a TFDS set (dataset_info.json)"
        ) from None
    if not source.class_names:
        raise ValueError(
            f"{folder}: the images lie directly in the folder, so their classes are unknown; expected one folder for each "
            "class. Of the validation images, give the archive"
        )
    return "a folder of class folders", source, source.paths


def fingerprint(files: Sequence[Any]) -> str:
    """SHA-256 of the names and sizes of files, to detect that the input has changed.

    With very many files, as in a folder of images, only the names are used.
    """
    digest = hashlib.sha256()
    for file in map(Path, files):
        size = file.stat().st_size if len(files) < 10_000 else 0
        digest.update(f"{file.parent.name}/{file.name} {size}\n".encode())
    return digest.hexdigest()


def problem(data: bytes, label: int, name: str, verify: bool) -> str | None:
    """The reason to leave out an image; None if it is valid."""
    if not 0 <= label < NUM_CLASSES:
        return f"{name}: its label is {label}, expected 0 to {NUM_CLASSES - 1}"
    try:
        if verify:
            decode_image(data, name)
    except ValueError as error:
        return " ".join(str(error).split())
    return None if data else f"{name}: empty"


def write_shard(source, indices: range, path: Path, verify: bool, stop: threading.Event, bar: tqdm) -> dict[str, np.ndarray]:
    """Writes one shard, in the format that the suffix of `path` names.

    Returns:
      "counts": int64 [NUM_CLASSES], number of images written per class; "left_out": str [n], reasons for leaving out others.
    """
    counts, left_out = np.zeros(NUM_CLASSES, np.int64), []
    with dict(WRITERS.values())[path.suffix](path) as write:
        for index in indices:
            if stop.is_set():
                raise InterruptedError("stopped")
            data, label, name = source.encoded(index)
            reason = problem(data, label, name, verify)
            if reason is None:
                write(data, label)
                counts[label] += 1
            else:
                left_out.append(reason)
            bar.update()
    return {"counts": counts, "left_out": np.array(left_out, np.str_)}


def shard_indices(source, num_shards: int) -> list[range]:
    """The images of each shard: every n-th, so that classes are mixed; of Parquet files, which are slow in any other order,
    those that follow each other."""
    if isinstance(source, ParquetSource):
        ends = [number * len(source) // num_shards for number in range(num_shards + 1)]
        return [range(first, end) for first, end in itertools.pairwise(ends)]
    return [range(number, len(source), num_shards) for number in range(num_shards)]


def write_shards(source, shards: Shards, paths: list[Path], *, verify: bool, workers: int) -> None:
    """Writes the missing shards to `paths`, and the contents of each to `shards`, with a progress bar.

    Raises:
      OSError: a shard cannot be written. Other unfinished shards are removed.
    """
    indices = shard_indices(source, len(paths))
    missing = set(shards.missing()) | {number for number, path in enumerate(paths) if not path.exists()}
    there = sum(len(indices[number]) for number in range(len(paths)) if number not in missing)
    stop = threading.Event()
    with (
        tqdm(total=len(source), initial=there, unit="image", desc="writing") as bar,
        # Threads are enough: half of the time is spent in Pillow's decoding, which lets other threads run. On many cores,
        # processes could save a quarter of an hour, in a job that runs once.
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
    ):
        try:
            futures = {
                pool.submit(write_shard, source, indices[number], paths[number], verify, stop, bar): number
                for number in sorted(missing)
            }
            for future in concurrent.futures.as_completed(futures):
                shards.write(futures[future], **future.result())
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def check_shards(shards: Shards, paths: list[Path]) -> tuple[np.ndarray, list[str]]:
    """Checks the number of records in every shard.

    Returns:
      (number of images per class [NUM_CLASSES], reasons for leaving out other images), over all shards.

    Raises:
      ValueError: a file is damaged, because it does not hold as many records as were written to it.
    """
    counts, left_out = np.zeros(NUM_CLASSES, np.int64), []
    for path, piece in zip(paths, shards, strict=True):
        written = int(piece["counts"].sum())
        try:
            held = len((WebDatasetSource if path.suffix == ".tar" else ArrayRecordSource)(path))
        except ValueError:
            held = 0
        if held != written:
            raise ValueError(
                f"{path} holds {held} images, {written} were written; remove it, and the same command makes it again"
            )
        counts += piece["counts"]
        left_out += piece["left_out"].tolist()
    return counts, left_out


def findings(split: str, counts: np.ndarray, left_out: list[str], class_names: list[str], damaged: list[str]) -> list[str]:
    """Describes every difference from ImageNet."""
    known, found = SPLITS[split], []
    if damaged:
        found.append(f"{len(damaged)} damaged tars were left out, the first is {damaged[0]}")
    if left_out:
        found.append(f"{len(left_out):,} images were left out, the first is {left_out[0]}")
    if counts.sum() != known.images:
        found.append(f"{counts.sum():,} images, ImageNet's {split} has {known.images:,}")
    present = int(np.count_nonzero(counts))
    if present != NUM_CLASSES:
        found.append(f"images of {present:,} classes, ImageNet has {NUM_CLASSES:,}, so labels may mean other classes")
    few, many = known.per_class
    odd = [label for label in np.flatnonzero(counts).tolist() if not few <= counts[label] <= many]
    if odd:
        name = f" ({class_names[odd[0]]})" if class_names else ""
        images = str(few) if few == many else f"{few} to {many}"
        found.append(
            f"{len(odd)} classes have not {images} images as in ImageNet, the first is {odd[0]}{name} with {counts[odd[0]]}"
        )
    return found


def _parser() -> Parser:
    parser = Parser(
        prog="python tools/prepare_imagenet.py",
        description=__doc__,
        epilog=_EPILOG,
    )
    parser.add_argument("input", nargs="+", help="an archive, a folder or tars; what it is is told by what is there")
    parser.add_argument("--split", choices=SPLITS, required=True, help="which part of ImageNet this is")
    parser.add_argument("--out", required=True, help="folder of the result; made, or continued")
    parser.add_argument("--devkit", help="ILSVRC2012_devkit_t12.tar.gz (default: beside the validation archive)")
    parser.add_argument("--image-key", default="image", help="column of Parquet files (default: %(default)s)")
    parser.add_argument("--label-key", default="label", help="column of Parquet files (default: %(default)s)")
    parser.add_argument("--skip-damaged", action="store_true", help="leave out damaged tars, of WebDataset, and name them")
    parser.add_argument("--format", choices=WRITERS, default="array_record", help="what to write (default: %(default)s)")
    parser.add_argument("--shards", type=Whole(1, MOST_SHARDS), help="files to write (default: 128 for train, 16 for val)")
    parser.add_argument(
        "--workers", type=Whole(1, MOST_THREADS), default=os.cpu_count(), help="threads (default: one for each core)"
    )
    parser.add_argument("--no-verify", action="store_true", help="do not decode the images to see whether they can be")
    parser.add_argument("--overwrite", action="store_true", help="replace a result, or unfinished work of other settings")
    return parser


def _check_arguments(args: argparse.Namespace) -> int:
    """Makes paths of the arguments -> the number of shards.

    Raises:
      ValueError: a path in a bucket, or a file where the folder should be.
    """
    num_shards = SPLITS[args.split].shards if args.shards is None else args.shards
    for path in filter(None, (*args.input, args.out, args.devkit)):
        if is_remote(path):
            raise ValueError(f"{path}: expected a local path; copy files from and to a bucket by gcloud storage cp")
    args.out, args.devkit = Path(args.out), args.devkit and Path(args.devkit)
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file, expected a folder")
    return num_shards


def _write_report(report: Path, listed: Path, left_out: Sequence[str], summary: dict[str, Any]) -> None:
    """Writes what was made, and why images were left out."""
    if left_out:
        with new_file(listed, replace=False) as partial:
            partial.write_text("".join(f"{reason}\n" for reason in left_out), encoding="utf-8")
    with new_file(report, replace=False) as partial:
        partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


@command
def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    num_shards = _check_arguments(args)
    report, listed = args.out / f"{args.split}.json", args.out / f"{args.split}.left_out.txt"
    complete = report.exists()
    if complete:
        check_output(report, args.overwrite)
    kind, source, files = open_images(args, args.input)
    class_names = list(getattr(source, "class_names", []))
    classes = f" of {len(class_names):,} classes" if class_names else ""
    print(
        f"{', '.join(args.input[:3])}: {kind}, {len(source):,} images{classes}; ImageNet's {args.split} has "
        f"{SPLITS[args.split].images:,} of {NUM_CLASSES:,}",
        flush=True,
    )
    if num_shards > len(source):
        raise ValueError(f"--shards is {num_shards}, more than the {len(source)} images")
    _, label, name = source.encoded(0)
    if not 0 <= label < NUM_CLASSES:
        raise ValueError(f"{name}: its label is {label}, expected 0 to {NUM_CLASSES - 1}")

    args.out.mkdir(parents=True, exist_ok=True)
    paths = [args.out / f"{args.split}-{n:05d}-of-{num_shards:05d}{WRITERS[args.format][0]}" for n in range(num_shards)]
    work = args.out / f"{args.split}.shards"  # records the contents of each finished shard
    names = rf"{args.split}-\d{{5,}}-of-\d{{5,}}({'|'.join(re.escape(suffix) for suffix, _ in WRITERS.values())})"
    old = {path for path in args.out.iterdir() if re.fullmatch(names, path.name) or path == listed}
    stale = old if complete or not work.exists() else old - {*paths, listed}
    if stale and not args.overwrite:
        raise FileExistsError(f"{min(stale)} exists and nothing was overwritten; choose another output or add --overwrite")
    settings = {"kind": kind, "images": len(source), "files": fingerprint(files), "verify": not args.no_verify}
    settings |= {"format": args.format} if args.format != "array_record" else {}  # older work has none, and goes on
    with lock_run(work, temporary=True):
        # The order matters: nothing is removed before the folder is known to be ours. If the process is killed here, the
        # remaining files must not look complete: a shard counts only together with its piece of `shards`.
        shards = Shards(work, settings, num_shards, 1, restart=args.overwrite)
        unfinished = {listed, *(paths[number] for number in shards.missing())}
        for path in ([report] if complete else []) + sorted(stale | (old & unfinished)):
            path.unlink(missing_ok=True)
        remove_leftovers(args.out, names)  # also of shards with other numbers
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about damaged metadata
            write_shards(source, shards, paths, verify=not args.no_verify, workers=args.workers)
        counts, left_out = check_shards(shards, paths)
        found = findings(args.split, counts, left_out, class_names, getattr(source, "damaged", []))
        summary = {
            "input": args.input,
            **settings,
            "written": int(counts.sum()),
            "left_out": len(left_out),
            "findings": found,
            "class_names": class_names,
            "images_per_class": counts.tolist(),
        }
        _write_report(report, listed, left_out, summary)
        shards.remove()
    for other in sorted(args.out.glob(f"{args.split}-*")):
        if not re.fullmatch(names, other.name):
            print(f"WARNING: {other} is of other origin, and the pattern {args.split}-* matches it too")
    for text in found:
        print(f"WARNING: {text}")
    state = "all is as in ImageNet" if not found else f"see {listed} and {report}" if left_out else f"see {report}"
    print(f"{args.out}: {counts.sum():,} images in {num_shards} shards of {args.split}; {state}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
