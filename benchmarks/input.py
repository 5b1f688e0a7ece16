"""Measures the examples per second that one CPU core prepares for training, by source and augmentation.

Synthetic JPEGs of 256 to 500 pixels are read from every kind of source, decoded, and augmented as in the published recipes
for tokenizers (shorter side to 256, random crop, flip) and for generators (center crop, flip). The digits are augmented as
in their own recipes. Token records, with 32 tokens each, need neither. All columns but the first measure batches from the
training's loader, whose own work is most of the cost if examples are small. The sources are measured in turn, for several
rounds. The table shows the median over the rounds, per second of CPU time, so other work on the machine matters little. All
files are on the local disk and in its cache, so the cost of a network is not measured.

A host that trains at R images/s needs R / (images/s per core) cores for its input.
"""

import io
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from titok_jax.data.loader import make_loader
from titok_jax.data.records import image_writer, token_writer
from titok_jax.data.sources import make_source
from titok_jax.data.transforms import make_train_transform
from titok_jax.runtime.arguments import Parser, Whole
from titok_jax.runtime.command import command

AUGMENTATIONS = {
    "random crop, flip": {"name": "random_resize_crop_flip", "resize_shorter_edge": 256, "crop_size": 256},
    "center crop, flip": {"name": "center_crop_flip", "size": 256},
    "jitter": {"name": "jitter"},
    "none": None,
}


def jpeg(rng: np.random.Generator) -> bytes:
    """Makes a JPEG with large shapes, fine texture and a little noise, with 256 to 500 pixels per side."""
    width, height = (int(side) for side in rng.integers(256, 501, 2))
    layers = [(8, 90.0), (64, 25.0), (200, 14.0)]  # (cells per side, contrast)
    pixels = np.full((height, width, 3), 128.0)
    for cells, contrast in layers:
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        pixels += (np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC)) / 127.5 - 1) * contrast
    pixels += rng.normal(0, 9, pixels.shape)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=92)
    return file.getvalue()


def make_sources(folder: Path, images: Sequence[bytes]) -> dict[str, object]:
    """Writes the same images for every kind of source and opens the sources."""
    for index, data in enumerate(images):
        path = folder / "folder" / f"class{index % 10}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    with image_writer(folder / "images.array_record") as write:
        for index, data in enumerate(images):
            write(data, index % 10)
    with tarfile.open(folder / "images.tar", "w") as tar:
        for index, data in enumerate(images):
            for ending, content in (("jpg", data), ("cls", str(index % 10).encode())):
                info = tarfile.TarInfo(f"{index:06d}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    _write_tfds(folder, images)
    rng = np.random.default_rng(0)
    for kind in ("array_record", "jsonl"):
        with token_writer(folder / f"tokens.{kind}") as write:
            for index in range(5 * len(images)):  # each batch has a fixed cost, and generators use large batches
                write(rng.integers(0, 4096, 32), index % 10)
    specs = {
        "folder of JPEGs": {"name": "folder", "path": str(folder / "folder")},
        "ArrayRecord": {"name": "array_record", "paths": str(folder / "images.array_record")},
        "WebDataset tar": {"name": "webdataset", "paths": str(folder / "images.tar")},
        "TFDS (ArrayRecord)": {"name": "tfds", "path": str(folder / "synthetic/1.0.0"), "split": "train"},
        "digits, in memory": {"name": "digits", "split": "train"},
        "tokens (ArrayRecord)": {"name": "tokens", "paths": str(folder / "tokens.array_record")},
        "tokens (JSON lines)": {"name": "tokens", "paths": str(folder / "tokens.jsonl")},
    }
    return {title: make_source(spec) for title, spec in specs.items()}


def _write_tfds(folder: Path, images: Sequence[bytes]) -> None:
    import tensorflow_datasets as tfds

    class Synthetic(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            image = tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")
            features = {"image": image, "label": tfds.features.ClassLabel(num_classes=10)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, download_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for index, data in enumerate(images):
                yield index, {"image": io.BytesIO(data), "label": index % 10}

    Synthetic(data_dir=folder, file_format="array_record").download_and_prepare()


def seconds(prepare: Callable[[], object]) -> float:
    """The CPU time of a call in one thread."""
    began = time.thread_time()
    prepare()
    return time.thread_time() - began


def suited(title: str) -> list[str]:
    """The augmentations to measure for a source."""
    return ["none"] if title.startswith("tokens") else ["jitter"] if title.startswith("digits") else list(AUGMENTATIONS)[:2]


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--images", type=Whole(1, 100_000), default=200, help="in each source (default: 200)")
    parser.add_argument("--rounds", type=Whole(1, 1000), default=5, help="medians over so many (default: 5)")
    args = parser.parse_args(argv)

    rng = np.random.default_rng(0)
    images = [jpeg(rng) for _ in tqdm(range(args.images), desc="making images", unit="image")]
    with tempfile.TemporaryDirectory() as name:
        sources = make_sources(Path(name), images)
        batches = {title: args.images * (5 if title.startswith("tokens") else 1) for title in sources}
        steps: dict[tuple[str, str], Callable[[], object]] = {}
        for title, source in sources.items():
            steps[title, "read"] = lambda source=source, count=batches[title]: [source[i] for i in range(count)]
            for name in suited(title):
                augment = AUGMENTATIONS[name] and make_train_transform(AUGMENTATIONS[name])
                options = {"train_transform": augment, "num_threads": 0, "blocks": [0], "num_blocks": 1}
                steps[title, name] = make_loader(source, seed=0, global_batch_size=batches[title], **options).__next__
        rates: dict[tuple[str, str], list[float]] = {step: [] for step in steps}
        for _ in tqdm(range(args.rounds), desc="measuring", unit="round"):
            for step, prepare in steps.items():
                rates[step].append(batches[step[0]] / seconds(prepare))
    kilobytes = sum(map(len, images)) / len(images) / 1000
    print(f"{args.images} JPEGs of 256 to 500 pixels, {kilobytes:.0f} KB on average")
    print(f"examples/s per core, median of {args.rounds} rounds\n")
    print(
        f"| source | read and decoded | in batches: {' | '.join(AUGMENTATIONS)} |\n|---|{'--:|' * (1 + len(AUGMENTATIONS))}"
    )
    for title in sources:
        found = [rates.get((title, kind)) for kind in ("read", *AUGMENTATIONS)]
        print(f"| {title} | " + " | ".join(f"{statistics.median(rate):,.0f}" if rate else "" for rate in found) + " |")


if __name__ == "__main__":
    sys.exit(main())
