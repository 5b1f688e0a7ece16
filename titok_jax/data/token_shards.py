"""Pretokenization: images to token records, in shards that are complete or absent. See `python -m titok_jax.pretokenize`."""

import collections
import concurrent.futures
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from titok_jax.data.records import token_writer
from titok_jax.data.transforms import center_crop_adm, random_resize_crop_flip, ten_crop
from titok_jax.runtime.outputs import new_file

CROPS = {"center": 1, "flip": 2, "ten": 10, "random": 1}  # how many each makes of an image
MANIFEST = "pretokenize.json"


def read_manifest(path: Path | epath.Path) -> dict[str, Any]:
    """How the shards beside it were made, as `pretokenize` wrote it.

    Raises:
      ValueError: the file holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not isinstance(found.get("weights", ""), str):
            raise ValueError("other values")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected the settings of pretokenize, found {error}; choose another folder") from None
    return found


def views(image: np.ndarray, size: int, crops: str, seed: Sequence[int]) -> np.ndarray:
    """Makes the crops of one image that are tokenized.

    Args:
      image: uint8 [H, W, 3].
      size: height and width of the tokenizer's images.
      crops: one of CROPS; "center", "flip" and "ten" use ADM's crop, as the published pretokenization does.
      seed: for "random": the run's seed, the pass, and the image's index.

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
    """The positions of shard `shard` of `num_shards` in a stream of `length`. Shard sizes differ by one at most."""
    return range(shard * length // num_shards, (shard + 1) * length // num_shards)


def in_threads(function: Callable[[int], Any], items: Iterable[int]) -> Iterator[Any]:
    """`map(function, items)`, computed a little ahead by one thread per core.

    Decoding and cropping spend two thirds of their time in Pillow, which lets other threads run.
    """
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
    source,
    positions: range,
    *,
    encode: Callable[[np.ndarray], np.ndarray],
    size: int,
    crops: str,
    seed: int,
    batch_size: int,
) -> Iterator[tuple[np.ndarray, int]]:
    """Yields (tokens [N], label) for every crop of the images at `positions` of the stream, in order.

    Args:
      source: examples with "image" and "label". Position p of the stream is image p % len(source) in pass p // len(source).
      positions: the positions to encode.
      encode: uint8 [batch_size, size, size, 3] -> int [batch_size, N].
    """
    pictures, labels = [], []

    def flush() -> Iterator[tuple[np.ndarray, int]]:
        # The last batch is filled up, so that one compiled program is enough.
        batch = np.stack(pictures + pictures[-1:] * (batch_size - len(pictures)))
        yield from zip(np.asarray(encode(batch)), labels, strict=False)
        pictures.clear()
        labels.clear()

    def prepared(position: int) -> tuple[np.ndarray, int]:
        epoch, index = divmod(position, len(source))
        example = source[index]
        if "image" not in example:
            raise ValueError(f"example {index} of the data is tokens, expected an image")
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
    """Writes the shards of one process that do not exist yet. No other run may work in that folder (`locks.lock_run`).

    Args:
      settings: crops, seed, passes, shards, format, and everything else that the records depend on. The manifest holds them.

    Returns:
      (number of shards written now, number of this process's shards that existed already).

    Raises:
      ValueError: the folder was begun with other settings; the message lists them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / MANIFEST
    if manifest.exists():
        found = read_manifest(manifest)
        different = [
            f"{k}: {found.get(k)!r} there, {settings.get(k)!r} now" for k in settings if found.get(k) != settings[k]
        ]
        if different:
            raise ValueError(f"{folder} was begun with other settings ({'; '.join(different)}); choose another folder")
    elif process_index == 0:
        with new_file(manifest, replace=False) as partial:
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

                    def encode(images: np.ndarray) -> np.ndarray:
                        return tokenizer.encode_all(images, batch_size=batch_size).reshape(len(images), -1)

                    for tokens, label in records(
                        source, positions, encode=encode, size=size, batch_size=batch_size, **options
                    ):
                        write(tokens, label)
                written += 1
            bar.update(len(positions))
    return written, there
