"""Turns an image data set into token records, once, for generator training: `python -m titok_jax.pretokenize`.

The output is a folder of shards `tokens-00003-of-00016.array_record` (or `.jsonl`, the published form) and
`pretokenize.json`, which says how they were made. A shard appears when it is complete, so the same command, started again
after any kill, makes the missing ones; no record is lost or doubled. Several processes
(sharding.py: start_processes) share the shards.
"""

import argparse
import collections
import concurrent.futures
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from titok_jax import zoo
from titok_jax.cli import command, new_file
from titok_jax.data.records import token_writer
from titok_jax.data.sources import make_source
from titok_jax.data.transforms import center_crop_adm, random_resize_crop_flip, ten_crop
from titok_jax.storage import as_path

# JAX is imported where it is first used: `--help` and wrong arguments need not wait for it.

_EPILOG = """examples:
  python -m titok_jax.pretokenize digits:train --out tokens
      the embedded training digits through the embedded tokenizer, each once: a mirrored digit is none
  python -m titok_jax.pretokenize imagenet/train --model titok_b64 --crops ten --shards 256 --out tokens
      ten crops of every image in a folder: one pass stands for ten epochs with augmentation
  python -m titok_jax.pretokenize tfds:imagenet2012:train --model titok_l32 --crops random --passes 10 --out tokens
      the training augmentation, ten times over
  python -m titok_jax.train --config configs/generator.py:b64 --config.data.source.paths='tokens/*.array_record' ...
      trains on them

DATA is array_record:FILES (of tools/prepare_imagenet.py), a folder of images (class per sub-folder), tfds:NAME:SPLIT,
webdataset:FILES (a glob, or with braces as in 'imagenet-train-{0000..0252}.tar') or digits:SPLIT.

Crops: "center" is one center crop, "flip" that and its mirror image, "ten" the published ten crops, "random" the published
random crop and flip. The published order of "flip" (all images of a batch, then all mirrored) is another one; the records
are the same.
"""
CROPS = ("center", "flip", "ten", "random")
MANIFEST = "pretokenize.json"


def parse_source(text: str) -> dict[str, str]:
    """What `DATA` means, for `make_source`.

    Raises:
      ValueError: a known prefix without what must follow it.
    """
    kind, _, rest = text.partition(":")
    if kind == "digits" and rest:
        return {"name": "digits", "split": rest}
    if kind == "tfds":
        dataset, _, split = rest.rpartition(":")
        if not dataset or not split:
            raise ValueError(f"{text!r}: expected tfds:NAME:SPLIT, e.g. tfds:imagenet2012:train")
        return {"name": "tfds", "dataset": dataset, "split": split}
    if kind in ("webdataset", "array_record") and rest:
        return {"name": kind, "paths": rest}
    return {"name": "folder", "path": text}


def views(image: np.ndarray, size: int, crops: str, seed: Sequence[int]) -> np.ndarray:
    """The pictures of one image that are tokenized.

    Args:
      image: uint8 [H, W, 3].
      size: of the tokenizer's images.
      crops: one of CROPS; "center", "flip" and "ten" use ADM's crop, as the published pretokenization does.
      seed: of "random": that of the run, the pass and the image's index.

    Returns:
      uint8 [n, size, size, 3]; n is 1, 2, 10 or 1.
    """
    if crops == "ten":
        return ten_crop(image, size)
    if crops == "random":
        rng = np.random.default_rng(list(seed))
        return random_resize_crop_flip(image, rng, resize_shorter_edge=size, crop_size=size)[None]
    center = center_crop_adm(image, size)
    return np.stack([center, center[:, ::-1]] if crops == "flip" else [center])


def shard_range(shard: int, num_shards: int, length: int) -> range:
    """The positions of shard `shard` of `num_shards` in a stream of `length`: contiguous, sizes differing by one at most."""
    return range(shard * length // num_shards, (shard + 1) * length // num_shards)


def in_threads(function: Callable[[int], Any], items: Iterable[int]) -> Iterator[Any]:
    """`map(function, items)`, computed a little ahead by as many threads as there are cores (of decoding and cropping two
    thirds of the time are Pillow's, during which others run)."""
    num_threads = os.cpu_count() or 1
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        ahead: collections.deque[concurrent.futures.Future] = collections.deque()
        try:
            for item in items:
                ahead.append(pool.submit(function, item))
                if len(ahead) > 4 * num_threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def records(
    source, positions: range, *, encode: Callable[[np.ndarray], Any], size: int, crops: str, seed: int, batch_size: int
) -> Iterator[tuple[np.ndarray, int]]:
    """(tokens [N], label) of every view at some positions of the stream, in order.

    Args:
      source: examples with "image" and "label"; position p of the stream is image p % len(source) in pass p // len(source).
      encode: uint8 [batch_size, size, size, 3] -> int [batch_size, N].
    """
    pictures, labels = [], []

    def flush() -> Iterator[tuple[np.ndarray, int]]:
        # Filled up to one size, so that one program serves all.
        batch = np.stack(pictures + pictures[-1:] * (batch_size - len(pictures)))
        yield from zip(np.asarray(encode(batch)), labels, strict=False)
        pictures.clear()
        labels.clear()

    def prepared(position: int) -> tuple[np.ndarray, int]:
        epoch, index = divmod(position, len(source))
        example = source[index]
        return views(example["image"], size, crops, (seed, epoch, index)), int(example["label"])

    for several, label in in_threads(prepared, positions):
        for picture in several:
            pictures.append(picture)
            labels.append(label)
            if len(pictures) == batch_size:
                yield from flush()
    if pictures:
        yield from flush()


def pretokenize(
    tokenizer,
    source,
    folder: Path | epath.Path,
    *,
    settings: dict[str, Any],
    process_index: int = 0,
    process_count: int = 1,
    batch_size: int = 64,
) -> tuple[int, int]:
    """Writes the shards of one process that are not there yet.

    Args:
      settings: crops, seed, passes, shards, format; with what else decides the records they are in the manifest.

    Returns:
      (shards written now, shards of this process that were there).

    Raises:
      ValueError: the folder was begun with other settings; the message lists them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / MANIFEST
    if manifest.exists():
        found = json.loads(manifest.read_text())
        different = [
            f"{k}: {found.get(k)!r} there, {settings.get(k)!r} now" for k in settings if found.get(k) != settings[k]
        ]
        if different:
            raise ValueError(f"{folder} was begun with other settings ({'; '.join(different)}); choose another folder")
    elif process_index == 0:
        with new_file(manifest) as partial:
            partial.write_text(json.dumps(settings, indent=2) + "\n")
    num_shards, length = settings["shards"], settings["passes"] * len(source)
    written = there = 0
    mine = range(process_index, num_shards, process_count)
    with tqdm(total=sum(len(shard_range(s, num_shards, length)) for s in mine), unit="image", desc="tokenizing") as bar:
        for shard in mine:
            positions = shard_range(shard, num_shards, length)
            path = folder / f"tokens-{shard:05d}-of-{num_shards:05d}.{settings['format']}"
            if path.exists():
                there += 1
            else:
                with token_writer(path) as write:
                    options = {name: settings[name] for name in ("crops", "seed")}
                    size = tokenizer.config.image_size
                    for tokens, label in records(
                        source, positions, encode=tokenizer.encode, size=size, batch_size=batch_size, **options
                    ):
                        write(tokens, label)
                written += 1
            bar.update(len(positions))
    return written, there


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m titok_jax.pretokenize",
        description="Turns images into token records for generator training; goes on where it was stopped.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", metavar="DATA", help="a folder of images, or KIND:WHERE; see below")
    parser.add_argument("--model", default="digits", help=f"tokenizer: {', '.join(zoo.names('tokenizer'))}, folder or file")
    parser.add_argument("--revision", help="branch, tag or commit of a tokenizer on the hub (HF_TOKEN: a token for it)")
    parser.add_argument("--out", required=True, type=as_path, help="folder of the shards, also gs://; made, or continued")
    parser.add_argument("--crops", choices=CROPS, help="pictures of each image (default: flip, of digits center)")
    parser.add_argument("--passes", type=int, default=1, help='passes over the data, for "random" (default: 1)')
    parser.add_argument("--shards", type=int, default=1, help="files to write (default: 1)")
    parser.add_argument("--format", choices=("array_record", "jsonl"), default="array_record", help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help='of "random" (default: 0)')
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    for name in ("passes", "shards", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least 1")
    described = parse_source(args.data)
    crops = args.crops or ("center" if described["name"] == "digits" else "flip")
    if args.passes > 1 and crops != "random":
        raise ValueError(f'--passes is {args.passes}, but --crops {crops} gives the same in every pass; use "random"')
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file, expected a folder")
    source = make_source(described)
    if args.shards > args.passes * len(source):
        raise ValueError(f"--shards is {args.shards}, more than the {args.passes * len(source)} images")

    import jax
    from jax.experimental import multihost_utils

    from titok_jax import sharding
    from titok_jax.inference import load_tokenizer, load_tokenizer_config
    from titok_jax.sample import local_mesh, weights_sha256, whole_batch

    sharding.start_processes()
    config = load_tokenizer_config(args.model, revision=args.revision)
    if config.quantize_mode != "vq":
        raise ValueError(f"{args.model} is a VAE, which has no token ids; a generator needs a vq tokenizer")
    settings = {
        "data": args.data,
        "num_images": len(source),
        "model": args.model if args.revision is None else f"{args.model}@{args.revision}",
        "weights": weights_sha256(None, args.model, tokenizer_revision=args.revision)["tokenizer"],
        "crops": crops,
        "passes": args.passes,
        "seed": args.seed,
        "shards": args.shards,
        "format": args.format,
    }
    written, there = pretokenize(
        load_tokenizer(args.model, revision=args.revision, mesh=local_mesh()),
        source,
        args.out,
        settings=settings,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        batch_size=whole_batch(args.batch_size, args.batch_size),
    )
    print(f"wrote {written} shards of {args.out}; {there} were there")
    multihost_utils.sync_global_devices("tokenized")  # one that ends early would end the others


if __name__ == "__main__":
    sys.exit(main())
