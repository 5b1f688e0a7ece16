"""titok_jax.data: the examples of every source, crops against the published code, and the order of batches."""

import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from titok_jax.data import checked, loader, parquet, records, sources, transforms, webdataset
from titok_jax.data.digits import load_digits
from titok_jax.data.sources import parse_source

GOLDEN = json.loads((Path(__file__).parent / "golden/training/transforms.json").read_text())


class Positions:
    """Examples that carry only their index, so that a batch tells its order."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"label": np.int32(index)}


def draw(example, rng):
    return example | {"draw": rng.integers(0, 2**31)}


def take(source, steps, **options):
    options = {"seed": 5, "train_transform": draw, "blocks": [0], "num_blocks": 1} | options
    with loader.make_loader(source, **options) as batches:
        return list(itertools.islice(batches, steps))


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def encoded(seed: int, image_format: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> bytes:
    """An image file of noise, `size` (width, height)."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(file, image_format)
    return file.getvalue()


def pixels(seed: int) -> np.ndarray:
    """What `encoded(seed)` shows: uint8 [30, 40, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)


def sha256(image: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()


# Digits


def test_digits_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    original = datasets.load_digits()
    with np.load(Path(loader.__file__).with_name("digits.npz")) as file:
        np.testing.assert_array_equal(file["images"], original.images)
        np.testing.assert_array_equal(file["labels"], original.target)


def test_digits_split():
    train, test, everything = (load_digits(split) for split in ("train", "test", "all"))
    assert train[0].shape == (1437, 32, 32)
    assert test[0].shape == (360, 32, 32)
    assert train[0].dtype == np.uint8
    assert train[1].dtype == np.int32

    def bag(images, labels):
        return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))

    # Together the splits hold all images once. No two images are equal, so the splits are disjoint.
    assert sorted(bag(*train) + bag(*test)) == bag(*everything)
    assert len(set(bag(*everything))) == 1797
    # Literal values: if the split moved, a trained model could be tested on images that it has seen.
    assert test[1][:12].tolist() == [8, 9, 9, 2, 2, 8, 3, 5, 8, 0, 0, 4]


def test_digits_example():
    source = sources.make_source({"name": "digits", "split": "all"})
    example = source[0]
    assert example["image"].shape == (32, 32, 3)
    assert example["image"].dtype == np.uint8
    assert example["label"].dtype == np.int32
    assert example["label"] == 0
    small = np.asarray(Image.fromarray(example["image"]).convert("L").resize((10, 10), Image.Resampling.BOX), np.float32)
    with np.load(Path(loader.__file__).with_name("digits.npz")) as file:
        original = file["images"][0] * (255 / 16)
    assert np.corrcoef(small[1:-1, 1:-1].ravel(), original.ravel())[0, 1] > 0.95  # upright, white on black
    assert small[[0, -1]].max() < 60  # the margin


# Order


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_together_give_the_batches_of_one(process_count):
    source = Positions(37)
    whole = take(source, 12, global_batch_size=16)
    parts = [take(source, 12, global_batch_size=16, blocks=[p], num_blocks=process_count) for p in range(process_count)]
    joined = [{key: np.concatenate([part[key] for part in step]) for key in step[0]} for step in zip(*parts, strict=True)]
    assert_same(joined, whole)


def test_a_process_may_have_any_blocks_of_a_batch():
    """As on a TPU slice, where the mesh follows the links between chips. Across an epoch's end and after a resume."""
    whole = take(Positions(37), 5, global_batch_size=16, start_step=1)
    for blocks in ((0, 3), (1, 2)):
        part = take(Positions(37), 5, global_batch_size=16, start_step=1, blocks=blocks, num_blocks=4)
        rows = np.concatenate([np.arange(4 * block, 4 * block + 4) for block in blocks])
        assert_same(part, [{key: batch[key][rows] for key in batch} for batch in whole])
    with loader.make_eval_loader(Positions(9), global_batch_size=8, blocks=(1, 3), num_blocks=4) as batches:
        assert [batch["label"].tolist() for batch in batches] == [[2, 3, 6, 7], [8, 8, 8, 8]]


@pytest.mark.parametrize(("index", "count"), [(0, 1), (1, 2)])
def test_resuming_continues(index, count):
    options = {"global_batch_size": 16, "blocks": [index], "num_blocks": count}
    whole = take(Positions(37), 12, **options)
    for start in (1, 7):
        assert_same(take(Positions(37), 12 - start, start_step=start, **options), whole[start:])


def test_threads_do_not_change_batches():
    whole = take(Positions(37), 8, global_batch_size=16, num_threads=0)
    assert_same(take(Positions(37), 8, global_batch_size=16, num_threads=4), whole)


@pytest.mark.parametrize("read_ahead", [2, 7, 16, 1000])
def test_what_is_read_ahead_does_not_change_batches(read_ahead):
    """In parts of one example, in unequal parts, in halves, in whole batches. After a resume, and for some blocks."""
    for options in ({"start_step": 1}, {"start_step": 2, "blocks": (0, 3), "num_blocks": 4}):
        whole = take(Positions(37), 5, global_batch_size=16, num_threads=0, **options)
        assert_same(take(Positions(37), 5, global_batch_size=16, read_ahead=read_ahead, **options), whole)


class Counted(Positions):
    """Counts what is read."""

    def __init__(self, length: int):
        super().__init__(length)
        self.read, self.lock = 0, threading.Lock()

    def __getitem__(self, index):
        with self.lock:
            self.read += 1
        return super().__getitem__(index)


def settled(count, expected: int) -> int:
    """What `count()` is when nothing more is read; at least `expected` must be."""
    deadline = time.monotonic() + 600  # milliseconds are needed
    while count() < expected:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)  # more would be read in this time
    return count()


@pytest.mark.parametrize(
    ("num_threads", "read_ahead", "held"),
    [(3, 12, 12), (3, 3, 3), (1, 8, 8), (3, 1000, 3 * 16), (0, 12, 0)],  # with 1000, a whole batch for each thread
)
def test_no_more_is_read_ahead_than_allowed(num_threads, read_ahead, held):
    source = Counted(1000)
    options = {"seed": 0, "global_batch_size": 16, "blocks": [0], "num_blocks": 1}
    with loader.make_loader(source, num_threads=num_threads, read_ahead=read_ahead, **options) as batches:
        for taken in (1, 2):
            next(batches)
            assert settled(lambda: source.read, 16 * taken + held) == 16 * taken + held


def test_too_small_a_read_ahead_is_refused():
    with pytest.raises(ValueError, match=r"^read_ahead is 2, expected at least 3 examples for 3 threads$"):
        take(Positions(37), 1, global_batch_size=16, num_threads=3, read_ahead=2)
    with pytest.raises(ValueError, match=r"is 23, expected at least 24 examples for 4 workers with 2 threads each$"):
        take(Positions(37), 1, global_batch_size=16, num_workers=4, read_ahead=23)
    with pytest.raises(ValueError, match=r"is 3, expected at least 4 examples for 1 worker with 0 threads$"):
        take(Positions(37), 1, global_batch_size=16, num_workers=1, num_threads=0, read_ahead=3)


class Differing(Positions):
    def __getitem__(self, index):
        other = {} if index < 6 else {"more": np.int32(0)}
        return {"label": np.int32(index), "image": np.zeros((4, 5 if index != 2 else 1, 3), np.uint8)} | other


@pytest.mark.parametrize("read_ahead", [2, 1000])
def test_examples_that_differ_are_refused(read_ahead):
    options = {"global_batch_size": 4, "train_transform": None, "shuffle": False, "read_ahead": read_ahead}
    with pytest.raises(ValueError, match=r"differ: image of shapes \[4, 5, 3\] and \[4, 1, 3\]"):
        take(Differing(8), 1, **options)
    with pytest.raises(ValueError, match=r"differ: one has \['image', 'label'\], another \['image', 'label', 'more'\]"):
        take(Differing(8), 1, start_step=1, **options)


def test_every_epoch_is_another_permutation_with_other_draws():
    stream = take(Positions(48), 9, global_batch_size=16)
    order = np.concatenate([batch["label"] for batch in stream]).reshape(3, 48)
    draws = np.concatenate([batch["draw"] for batch in stream]).reshape(3, 48)
    for epoch in order:
        assert sorted(epoch) == list(range(48))
    assert len({tuple(epoch) for epoch in order}) == 3
    assert len(np.unique(draws)) == draws.size
    assert tuple(order[0]) != tuple(range(48))


def test_epochs_run_on_across_batches():
    labels = np.concatenate([batch["label"] for batch in take(Positions(10), 5, global_batch_size=4)])
    assert sorted(labels[:10]) == sorted(labels[10:20]) == list(range(10))


def test_seed_decides():
    first, again, other = (take(Positions(37), 3, global_batch_size=16, seed=seed) for seed in (1, 1, 2))
    assert_same(first, again)
    assert first[0]["label"].tolist() != other[0]["label"].tolist()
    assert first[0]["draw"].tolist() != other[0]["draw"].tolist()


def test_one_epoch_in_order():
    for process in range(2):
        options = {"global_batch_size": 4, "blocks": [process], "num_blocks": 2, "train_transform": None}
        stream = take(Positions(11), 99, shuffle=False, repeat=False, **options)
        expected = [[0, 1], [4, 5]] if process == 0 else [[2, 3], [6, 7]]
        assert [batch["label"].tolist() for batch in stream] == expected


def test_two_processes_with_two_workers_each_give_the_batches_of_one_without():
    """Every step has the same examples with the same random draws, across the end of an epoch and after a resume. The
    workers have parts of batches, here and in the next two tests."""
    options = {"global_batch_size": 16, "start_step": 1, "read_ahead": 30}
    whole = take(Positions(37), 5, **options)
    parts = [take(Positions(37), 5, num_workers=2, blocks=[p], num_blocks=2, **options) for p in range(2)]
    joined = [{key: np.concatenate([part[key] for part in step]) for key in step[0]} for step in zip(*parts, strict=True)]
    assert_same(joined, whole)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_any_number_of_workers_gives_the_same_batches(num_workers):
    """Three workers divide neither the examples of an epoch, nor a batch, nor the number of batches taken."""
    options = {"global_batch_size": 16, "start_step": 1, "read_ahead": 30}
    assert_same(take(Positions(37), 5, num_workers=num_workers, **options), take(Positions(37), 5, **options))


def test_evaluation_with_workers_gives_everything_once_and_in_order():
    """Three batches on two workers; the last batch is filled up."""
    options = {"global_batch_size": 4, "blocks": [0], "num_blocks": 1, "read_ahead": 30}
    with loader.make_eval_loader(Positions(9), num_workers=2, **options) as batches:
        found = [next(batches)]
        # A machine that is taken away sends this to all processes. A training still needs its batches to come to an end.
        for worker in multiprocessing.active_children():
            worker.terminate()
        found += list(batches)
    assert np.concatenate([batch["label"] for batch in found]).tolist() == [*range(9), 8, 8, 8]
    assert np.concatenate([batch["valid"] for batch in found]).tolist() == [True] * 9 + [False] * 3


IN_WORKERS = """
import os, runpy, sys, time
import numpy as np
if __name__ == "__mp_main__":  # as a worker of this command has it
    runpy.run_module("titok_jax.train", run_name=__name__)
class Source:
    def __len__(self):
        return 1000
    def __getitem__(self, index):
        with open("read", "ab") as file:
            file.write(b"x")
        return {"jax": np.bool_("jax" in sys.modules), "process": np.int32(os.getpid())}
def main():
    from titok_jax.data import loader
    options = {"num_workers": 2, "num_threads": 2, "read_ahead": 50, "blocks": [0], "num_blocks": 1}
    with loader.make_loader(Source(), seed=0, global_batch_size=16, **options) as batches:
        batch, expected = next(batches), 16 + 48
        while os.path.getsize("read") < expected:
            time.sleep(0.01)
        time.sleep(0.3)  # more would be read in this time
        processes = set(batch["process"]) - {os.getpid()}
        print("read", os.path.getsize("read"), "JAX", batch["jax"].any(), "workers", len(processes))
if __name__ == "__main__":
    main()
"""


def test_workers_read_no_more_ahead_than_allowed_and_import_no_jax(tmp_path):
    """Each of the two holds 6 parts of 4 examples."""
    (tmp_path / "run.py").write_text(IN_WORKERS)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run([sys.executable, "run.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert (run.stdout, run.stderr) == ("read 64 JAX False workers 2\n", "")


WITH_WORKERS = """
import time
from titok_jax.data import loader, sources
if __name__ == "__main__":
    source = sources.make_source({"name": "digits"})
    with loader.make_loader(source, seed=0, global_batch_size=32, num_workers=2) as batches:
        next(batches)
        print("ready", flush=True)
        time.sleep(600)
"""


def kill_with_workers(process: subprocess.Popen) -> None:
    """Sends SIGKILL; the worker processes must then end by themselves."""
    children = [pid for path in Path(f"/proc/{process.pid}/task").glob("*/children") for pid in path.read_text().split()]
    assert len(children) >= 2  # at least one worker, and multiprocessing's cleanup process
    process.kill()
    process.wait()

    def alive(pid: str) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    deadline = time.monotonic() + 600  # they need milliseconds
    while any(map(alive, children)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_workers_end_with_a_killed_run(tmp_path):
    (tmp_path / "run.py").write_text(WITH_WORKERS)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.Popen([sys.executable, tmp_path / "run.py"], env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert run.stdout.readline() == b"ready\n"
    kill_with_workers(run)


def test_evaluation_gives_everything_once():
    transform = transforms.make_eval_transform({"name": "center_crop_adm", "size": 16})
    source = sources.make_source({"name": "digits", "split": "test", "image_size": 32})
    labels = load_digits("test")[1]
    streams = []
    for process in range(2):
        options = {"transform": transform, "blocks": [process], "num_blocks": 2}
        with loader.make_eval_loader(source, global_batch_size=64, **options) as batches:
            streams.append(list(batches))
    assert [len(stream) for stream in streams] == [6, 6]
    assert all(batch["image"].shape == (32, 16, 16, 3) for batch in streams[0] + streams[1])
    assert all(batch["valid"].dtype == bool for batch in streams[0])
    both = [{key: np.concatenate([part[key] for part in step]) for key in step[0]} for step in zip(*streams, strict=True)]
    valid = np.concatenate([batch["valid"] for batch in both])
    assert valid.tolist() == [True] * 360 + [False] * 24
    np.testing.assert_array_equal(np.concatenate([batch["label"] for batch in both])[valid], labels)


def test_evaluation_of_less_than_a_batch():
    with loader.make_eval_loader(Positions(3), global_batch_size=8, blocks=[0], num_blocks=1) as batches:
        (batch,) = batches
    assert batch["label"].tolist() == [0, 1, 2, 2, 2, 2, 2, 2]
    assert batch["valid"].tolist() == [True] * 3 + [False] * 5


def test_loader_errors():
    with pytest.raises(ValueError, match="10 examples, fewer than one global batch of 16; lower the global batch size"):
        take(Positions(10), 1, global_batch_size=16)
    with pytest.raises(
        ValueError, match=r"global batch size 10 does not divide into 4 blocks .*; make it a .*multiple of 4"
    ):
        take(Positions(100), 1, global_batch_size=10, num_blocks=4)
    with pytest.raises(ValueError, match="no examples"):
        loader.make_eval_loader(Positions(0), global_batch_size=4)


@pytest.mark.parametrize("num_threads", [0, 2])
def test_errors_of_examples_reach_the_loop(tmp_path, num_threads):
    (tmp_path / "broken.jpg").write_bytes(encoded(0, "JPEG")[:300])
    source = sources.make_source({"name": "folder", "path": tmp_path})
    with pytest.raises(ValueError, match=r"broken\.jpg: cannot read"):
        take(source, 1, global_batch_size=1, train_transform=None, num_threads=num_threads)


def test_close_twice():
    batches = loader.make_loader(Positions(8), seed=0, global_batch_size=4)
    next(batches)
    batches.close()
    batches.close()


# Transforms


@pytest.mark.parametrize("name", GOLDEN["images"])
def test_crops_match_the_published_code(name):
    golden = GOLDEN["images"][name]
    height, width = map(int, name.split("x"))
    image = np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert sha256(image) == golden["sha256_source"]
    assert sha256(transforms.center_crop_torchvision(image, 256)) == golden["sha256_eval_uint8_HWC"]
    assert sha256(transforms.center_crop_adm(image, 256)) == golden["sha256_adm_uint8_HWC"]
    if "ten_crop_sha256_uint8_HWC" in golden:
        assert [sha256(crop) for crop in transforms.ten_crop(image, 256)] == golden["ten_crop_sha256_uint8_HWC"]


class Middle:
    """Replaces a random generator: always draws the middle of the range, half to even as in torchvision's CenterCrop."""

    def __init__(self, flip):
        self.flip = flip

    def integers(self, low, high):
        return round((low + high - 1) / 2)

    def random(self):
        return 0.0 if self.flip else 0.9


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("name", GOLDEN["images"])
def test_random_crop_drawn_in_the_middle_is_the_published_center_crop(name, flip):
    height, width = map(int, name.split("x"))
    image = np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    crop = transforms.random_resize_crop_flip(image, Middle(flip), resize_shorter_edge=256, crop_size=256)
    assert sha256(crop[:, ::-1] if flip else crop) == GOLDEN["images"][name]["sha256_eval_uint8_HWC"]


def test_random_crop_is_a_window_of_the_resized_image():
    image = pixels(0)  # the shorter side is 30 already, so nothing is resampled
    windows = {sha256(view[y : y + 24, x : x + 24]) for view in (image, image[:, ::-1]) for y in range(7) for x in range(17)}
    rng = np.random.default_rng(0)
    seen = {
        sha256(transforms.random_resize_crop_flip(image, rng, resize_shorter_edge=30, crop_size=24)) for _ in range(3000)
    }
    assert seen == windows  # every window, mirrored and not, and nothing else


def test_random_crop_resizes_as_the_published_evaluation_does():
    image = np.random.default_rng(1).integers(0, 256, (300, 410, 3), dtype=np.uint8)
    options = {"resize_shorter_edge": 64, "flip_probability": 0.0}
    resized = np.asarray(Image.fromarray(image).resize((int(64 * 410 / 300), 64), Image.Resampling.BICUBIC))
    crop = transforms.random_resize_crop_flip(image, np.random.default_rng(0), crop_size=64, **options)
    places = [left for left in range(resized.shape[1] - 63) if (resized[:, left : left + 64] == crop).all()]
    assert len(places) == 1
    with pytest.raises(ValueError, match="crop_size 65 must not exceed resize_shorter_edge 64"):
        transforms.random_resize_crop_flip(image, np.random.default_rng(0), crop_size=65, **options)


@pytest.mark.parametrize("name", GOLDEN["images"])
def test_augmentations_by_flags_draw_as_the_published_ones(name):
    """The published settings give the same bits with and without the flags, those of generators as `center_crop_flip`."""
    height, width = map(int, name.split("x"))
    image = np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    sizes = {"name": "random_resize_crop_flip", "resize_shorter_edge": 256, "crop_size": 256}

    def images(**options):
        transform, rng = transforms.make_train_transform(sizes | options), np.random.default_rng(3)
        return [sha256(transform({"image": image}, rng)["image"]) for _ in range(6)]

    rng, published = np.random.default_rng(3), []
    shape = (256, int(256 * height / width)) if width <= height else (int(256 * width / height), 256)
    resized = np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.BICUBIC))
    for _ in range(6):  # the order of the draws: top, left, flip
        top, left = (rng.integers(0, side - 255) for side in resized.shape[:2])
        crop = resized[top : top + 256, left : left + 256]
        published.append(sha256(crop[:, ::-1] if rng.random() < 0.5 else crop))
    assert images() == published
    assert images(random_crop=True, random_flip=True) == images()
    old, rng = transforms.make_train_transform({"name": "center_crop_flip", "size": 256}), np.random.default_rng(3)
    assert images(random_crop=False) == [sha256(old({"image": image}, rng)["image"]) for _ in range(6)]
    assert images(random_crop=False, random_flip=False) == [GOLDEN["images"][name]["sha256_eval_uint8_HWC"]] * 6


def test_resize_and_crop_have_their_own_sizes():
    image = np.random.default_rng(1).integers(0, 256, (90, 123, 3), np.uint8)
    resized = np.asarray(Image.fromarray(image).resize((int(72 * 123 / 90), 72), Image.Resampling.BICUBIC))
    expected = resized[4:68, 17:81]
    spec = {"name": "random_resize_crop_flip", "resize_shorter_edge": 72, "crop_size": 64}
    train = transforms.make_train_transform(spec | {"random_crop": False, "random_flip": False})
    np.testing.assert_array_equal(train({"image": image}, None)["image"], expected)
    for name in ("center_crop_torchvision", "center_crop_adm"):
        crop = transforms.make_eval_transform({"name": name, "size": 64, "resize_shorter_edge": 72})
        assert crop({"image": image})["image"].shape == (64, 64, 3)
        same = transforms.make_eval_transform({"name": name, "size": 64, "resize_shorter_edge": 64})
        usual = transforms.make_eval_transform({"name": name, "size": 64})
        np.testing.assert_array_equal(same({"image": image})["image"], usual({"image": image})["image"])
        with pytest.raises(ValueError, match="crop_size 64 must not exceed resize_shorter_edge 63"):
            transforms.make_eval_transform({"name": name, "size": 64, "resize_shorter_edge": 63})({"image": image})
    torchvision = transforms.make_eval_transform({"name": "center_crop_torchvision", "size": 64, "resize_shorter_edge": 72})
    np.testing.assert_array_equal(torchvision({"image": image})["image"], expected)


class Extreme:
    """Replaces a random generator: always draws the end of the range."""

    def __init__(self, end):
        self.end = end

    def uniform(self, low, high, size=None):
        return np.full(size or (), (low, high)[self.end])


@pytest.mark.parametrize("end", [0, 1])
def test_jitter_moves_a_point_as_it_should(end):
    image = np.zeros((33, 41, 3), np.uint8)
    image[5:8, 29:32] = 255  # its centre, in coordinates of pixel edges, is (30.5, 6.5): (10, -10) from the image's
    sign = (-1, 1)[end]

    def centre(**options):
        options = {"rotation": 0.0, "shift": 0.0, "scale": 0.0} | options
        grey = transforms.jitter(image, Extreme(end), **options)[..., 0].astype(float)
        y, x = np.indices(grey.shape) + 0.5
        return (x * grey).sum() / grey.sum() - 20.5, (y * grey).sum() / grey.sum() - 16.5

    assert centre() == pytest.approx((10, -10))
    assert centre(shift=2.0) == pytest.approx((10 + 2 * sign, -10 + 2 * sign))
    assert centre(scale=0.1) == pytest.approx((10 + sign, -10 - sign), abs=0.2)
    angle = np.radians(8 * sign)
    turned = (10 * np.cos(angle) + 10 * np.sin(angle), 10 * np.sin(angle) - 10 * np.cos(angle))
    assert centre(rotation=8.0) == pytest.approx(turned, abs=0.2)


def test_uint8_conventions():
    values = np.array([-0.5, 0.0, 0.5 / 255, 0.6 / 255, 1.4 / 255, 1.6 / 255, 0.999, 1.0, 1.5], np.float32)
    assert transforms.to_uint8_round(values).tolist() == [0, 0, 0, 1, 1, 2, 255, 255, 255]
    assert transforms.to_uint8_truncate(values).tolist() == [0, 0, 0, 0, 1, 1, 254, 255, 255]
    levels = np.arange(256, dtype=np.float32) / 255
    assert transforms.to_uint8_round(levels).tolist() == list(range(256))
    assert transforms.to_uint8_truncate(levels).tolist() == list(range(256))


@pytest.mark.parametrize(
    ("image_format", "mode"), [("PNG", "L"), ("PNG", "RGBA"), ("PNG", "P"), ("JPEG", "CMYK"), ("GIF", "P")]
)
def test_decode_gives_rgb(image_format, mode):
    image = transforms.decode_image(encoded(0, image_format, mode))
    assert image.shape == (30, 40, 3)
    assert image.dtype == np.uint8


@pytest.mark.parametrize("data", [b"", b"text", encoded(0)[:200], encoded(0, "JPEG")[:200]])
def test_decode_error(data):
    with pytest.raises(ValueError, match=r"that\.png: cannot read these .* bytes as an image"):
        transforms.decode_image(data, "that.png")


def test_center_crop_flip_mirrors_every_second_image():
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    center, rng = transforms.center_crop_torchvision(image, 24), np.random.default_rng(1)
    found = [transforms.center_crop_flip(image, rng, size=24) for _ in range(400)]
    mirrored = [np.array_equal(crop, center[:, ::-1]) for crop in found]
    assert all(m or np.array_equal(crop, center) for m, crop in zip(mirrored, found, strict=True))
    assert 160 < sum(mirrored) < 240  # 4 standard deviations


def test_transform_spec_errors():
    with pytest.raises(
        ValueError, match="unknown training transform 'mirror'; known: random_resize_crop_flip, center_crop_flip, jitter"
    ):
        transforms.make_train_transform({"name": "mirror"})
    with pytest.raises(ValueError, match=r"jitter.*'angle'.*rotation"):
        transforms.make_train_transform({"name": "jitter", "angle": 3})
    with pytest.raises(ValueError, match=r"center_crop_adm: missing.*'size'"):
        transforms.make_eval_transform({"name": "center_crop_adm"})


# Sources


def assert_images(source, labels):
    """The source gives `pixels(0)`, `pixels(1)`, ... with these labels, also after pickling."""
    for copy in (source, pickle.loads(pickle.dumps(source))):
        assert len(copy) == len(labels)
        for index, label in enumerate(labels):
            example = copy[index]
            np.testing.assert_array_equal(example["image"], pixels(index))
            assert example["label"] == label
            assert example["label"].dtype == np.int32


def test_folder_of_classes(tmp_path):
    for index, name in enumerate(["a/1.png", "a/deep/0.PNG", "b/0.png"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encoded(index))
    (tmp_path / "b/._0.png").write_bytes(b"hidden")
    (tmp_path / "notes.txt").write_text("not an image")
    source = sources.make_source({"name": "folder", "path": str(tmp_path)})
    assert_images(source, [0, 0, 1])
    assert source.class_names == ["a", "b"]
    assert [Path(path).name for path in source.paths] == ["1.png", "0.PNG", "0.png"]
    (tmp_path / "z.png").write_bytes(encoded(3))
    with pytest.raises(
        ValueError, match=r"both in sub-folders and directly in the folder \(1, e\.g\. z\.png\).*labels=False"
    ):
        sources.make_source({"name": "folder", "path": tmp_path})
    assert_images(sources.make_source({"name": "folder", "path": tmp_path, "labels": False}), [-1] * 4)


def test_folder_follows_links(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/0.png").write_bytes(encoded(0))
    (tmp_path / "images").mkdir()
    (tmp_path / "images/class").symlink_to(tmp_path / "elsewhere")
    assert_images(sources.make_source({"name": "folder", "path": tmp_path / "images"}), [0])


def test_flat_folder(tmp_path):
    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(encoded(index))
    source = sources.make_source({"name": "folder", "path": tmp_path})
    assert_images(source, [-1] * 3)
    assert source.class_names == []


def test_folder_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        sources.make_source({"name": "folder", "path": tmp_path / "nowhere"})
    with pytest.raises(ValueError, match=f"{tmp_path.name}: no images in this folder or below; expected .jpg"):
        sources.make_source({"name": "folder", "path": tmp_path})


def test_make_source_errors():
    with pytest.raises(
        ValueError, match="unknown data source 'mnist'; known: digits, folder, tfds, webdataset, parquet, arr"
    ):
        sources.make_source({"name": "mnist"})
    with pytest.raises(ValueError, match=r"data source digits: .*'path'; it takes split, image_size"):
        sources.make_source({"name": "digits", "path": "x"})
    # As in a recipe whose options were not given, or were given for another kind.
    with pytest.raises(ValueError, match=r"array_record: missing .*'paths'; it takes paths\. The others: .*folder \("):
        sources.make_source({"name": "array_record", "paths": "", "path": ""})
    with pytest.raises(
        FileNotFoundError, match=r"no: no such folder.* \(--config\.data\.source\.FIELD=VALUE sets a field of it\)"
    ):
        sources.make_source({"name": "folder", "path": "no"}, "--config.data.source")
    assert len(sources.make_source({"name": "digits", "split": "test", "paths": "", "path": ""})) == 360
    with pytest.raises(ValueError, match=r"digits has no split 'val'; it has train, held_out \(also called test\), all"):
        sources.make_source({"name": "digits", "split": "val"})


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    tfds = pytest.importorskip("tensorflow_datasets")

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            image = tfds.features.Image(shape=(30, 40, 3), encoding_format="png")
            features = {"image": image, "label": tfds.features.ClassLabel(num_classes=10)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, download_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for index in range(6):
                yield index, {"image": io.BytesIO(encoded(index)), "label": index % 4}

    folder = tmp_path_factory.mktemp("tfds")
    config = tfds.download.DownloadConfig(num_shards=3)
    Tiny(data_dir=folder, file_format="array_record").download_and_prepare(download_config=config)
    return folder


def test_tfds(tfds_dir):
    by_path = {"name": "tfds", "path": str(tfds_dir / "tiny/1.0.0")}
    by_name = {"name": "tfds", "dataset": "tiny:1.0.0", "data_dir": str(tfds_dir)}
    label_of = {pixels(index).tobytes(): index % 4 for index in range(6)}
    for spec in (by_path, by_name):
        source = sources.make_source(spec | {"split": "train"})
        examples = [source[index] for index in range(len(source))]  # TFDS shuffles while it writes
        assert {example["image"].tobytes(): int(example["label"]) for example in examples} == label_of
        assert examples[0]["label"].dtype == np.int32
        assert_same([pickle.loads(pickle.dumps(source))[3]], [examples[3]])
    assert len(sources.make_source(by_path | {"split": "train[:50%]"})) == 3
    assert sources.make_source(by_path | {"split": "train", "label_key": None})[0]["label"] == -1


def test_tfds_errors(tfds_dir, tmp_path):
    spec = {"name": "tfds", "path": str(tfds_dir / "tiny/1.0.0"), "split": "train"}
    with pytest.raises(ValueError, match="no feature pixels; it has image, label"):
        sources.make_source(spec | {"image_key": "pixels"})
    with pytest.raises(FileNotFoundError, match=r"found no set prepared with file_format='array_record' in .*nowhere"):
        sources.make_source(spec | {"path": str(tfds_dir / "nowhere")})
    with pytest.raises(FileNotFoundError, match="tfds mnist, split train: found no set prepared"):
        sources.make_source({"name": "tfds", "dataset": "mnist", "split": "train", "data_dir": str(tfds_dir)})
    with pytest.raises(ValueError, match=r"give either dataset .* or path"):
        sources.make_source({"name": "tfds", "split": "train"})
    with pytest.raises(ValueError, match="validation"):
        sources.make_source(spec | {"split": "validation"})
    copy = shutil.copytree(tfds_dir / "tiny/1.0.0", tmp_path / "tiny/1.0.0")
    (copy / "tiny-train.array_record-00001-of-00003").unlink()
    with pytest.raises(FileNotFoundError, match=r"split train: 1 of 3 files missing, first .*-00001-of-00003"):
        sources.make_source(spec | {"path": str(copy)})
    assert len(sources.make_source(spec | {"path": str(copy), "split": "train[:30%]"})) == 2  # which does not need it


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_webdataset(tmp_path):
    first = [
        (f"{i:03}.{ending}", data) for i in range(3) for ending, data in (("cls", f"{i + 7}".encode()), ("png", encoded(i)))
    ]
    first += [("._000.png", b"hidden"), ("000.json", b"{}")]
    write_tar(tmp_path / "shard-000.tar", first)
    long_name = "folder/" + "x" * 150  # longer than a plain tar header holds
    write_tar(
        tmp_path / "shard-001.tar", [(f"{long_name}.png", encoded(3)), (f"{long_name}.cls", b"2\n"), ("b.png", encoded(4))]
    )
    assert_images(sources.make_source({"name": "webdataset", "paths": str(tmp_path / "shard-*.tar")}), [7, 8, 9, 2, -1])
    both = [str(tmp_path / "shard-000.tar"), str(tmp_path / "shard-001.tar")]
    assert_images(sources.make_source({"name": "webdataset", "paths": both}), [7, 8, 9, 2, -1])
    braces = parse_source(f"webdataset:{tmp_path}/shard-{{000..001}}.tar")
    assert_images(sources.make_source(braces), [7, 8, 9, 2, -1])


def test_webdataset_errors(tmp_path):
    write_tar(tmp_path / "bare.tar", [("a.cls", b"1"), ("b.png", encoded(0))])
    write_tar(tmp_path / "words.tar", [("a.cls", b"cat"), ("a.png", encoded(0))])
    write_tar(tmp_path / "cut.tar", [("a.png", encoded(0)), ("b.png", encoded(1))])
    (tmp_path / "cut.tar").write_bytes((tmp_path / "cut.tar").read_bytes()[:6000])
    write_tar(tmp_path / "end.tar", [("a.png", encoded(0)), ("b.png", encoded(1))])
    with tarfile.open(tmp_path / "end.tar") as tar:
        end = tar.getmembers()[1].offset  # tarfile takes a cut or damage between two images for the end
    (tmp_path / "end.tar").write_bytes((tmp_path / "end.tar").read_bytes()[:end])
    (tmp_path / "text.tar").write_text("no tar")
    for name, message in [
        ("bare", r"bare\.tar: 1 samples without an image, the first is a; expected KEY\.jpg"),
        ("words", r"words\.tar: expected an uncompressed tar of images and \.cls files: .*cat"),
        ("cut", r"cut\.tar: expected an uncompressed tar"),
        ("end", r"end\.tar: expected an uncompressed tar .*cut short at byte"),
        ("text", r"text\.tar: expected an uncompressed tar"),
    ]:
        with pytest.raises(ValueError, match=message):
            sources.make_source({"name": "webdataset", "paths": str(tmp_path / f"{name}.tar")})
    with pytest.raises(FileNotFoundError, match=r"none-\*\.tar: no such file, and no file matches it"):
        sources.make_source({"name": "webdataset", "paths": str(tmp_path / "none-*.tar")})


def test_damaged_tars_are_skipped_if_asked(tmp_path, capsys):
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", [(f"{number}.png", encoded(number // 2)), (f"{number}.cls", b"4")])
    whole = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[:2000])
    spec = {"name": "webdataset", "paths": str(tmp_path / "*.tar"), "skip_damaged": True}
    source = sources.make_source(spec)
    assert_images(source, [4, 4])
    (reason,) = source.damaged
    assert reason.startswith(f"{tmp_path}/1.tar: expected an uncompressed tar")
    assert capsys.readouterr().out == f"warning: 1 of 3 tars are damaged and left out:\n  {reason}\n"
    with pytest.raises(ValueError, match=r"1\.tar: expected an uncompressed tar"):
        sources.make_source(spec | {"skip_damaged": False})
    with pytest.raises(ValueError, match=r"all 1 tars are damaged; the first: .*1\.tar: expected an uncompressed tar"):
        sources.make_source(spec | {"paths": str(tmp_path / "1.tar")})
    assert len(sources.make_source({"name": "digits", "skip_damaged": False, "label_key": ""})) == 1437  # as in a recipe
    with pytest.raises(ValueError, match=r"digits: .*'skip_damaged'"):
        sources.make_source({"name": "digits", "skip_damaged": True})


def test_a_tar_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new/a.tar"
    with webdataset.tar_writer(path) as write:
        for index, image_format in enumerate(("PNG", "WEBP", "JPEG", "BMP")):
            write(encoded(index, image_format), index)
        assert not path.exists()
    with tarfile.open(path) as tar:
        images = [f"a-00000{index}.{suffix}" for index, suffix in enumerate(("png", "webp", "jpg", "bmp"))]
        assert tar.getnames()[::2] == images
    source = sources.make_source({"name": "webdataset", "paths": path})
    assert [source.encoded(i)[:2] for i in range(2)] == [(encoded(0), 0), (encoded(1, "WEBP"), 1)]
    before = path.read_bytes()
    with pytest.raises(AttributeError), webdataset.tar_writer(tmp_path / "new/b.tar") as write:
        write(None, 5)
    with pytest.raises(FileExistsError, match=r"a\.tar exists and nothing was overwritten"):
        webdataset.tar_writer(path).__enter__()
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


# Parquet


def write_parquet(path, first=0, count=10, *, struct=True, labels=None, rows=4, names=()):
    """Images `encoded(first)` and so on, with the labels `first`, ... or as given, in row groups of `rows`."""
    images = [encoded(index) for index in range(first, first + count)]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()}) if struct else pa.large_binary()
    image = pa.array([{"bytes": data, "path": None} for data in images] if struct else images, kind)
    label = pa.array(list(range(first, first + count)) if labels is None else labels, pa.int64())
    table = pa.table({"image": image, "label": label})
    if names:
        info = {"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, path, row_group_size=rows)


def test_parquet(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", 0, 10)
    write_parquet(tmp_path / "train-1.parquet", 10, 3, struct=False)
    write_parquet(tmp_path / "train-2.parquet", 13, 0)
    source = sources.make_source(parse_source(f"parquet:{tmp_path}/train-{{0..2}}.parquet"))
    assert_images(source, list(range(13)))
    assert source.class_names == []
    assert source.encoded(11) == (encoded(11), 11, f"{tmp_path}/train-1.parquet, row 1")
    assert [int(example["label"]) for example in source] == list(range(13))  # ends with an IndexError
    table = pq.read_table(tmp_path / "train-1.parquet").rename_columns(["jpg", "cls"])
    pq.write_table(table, tmp_path / "named.parquet")
    named = {"name": "parquet", "paths": str(tmp_path / "named.parquet"), "image_key": "jpg"}
    assert int(sources.make_source(named | {"label_key": "cls"})[2]["label"]) == 12
    assert int(sources.make_source(named | {"label_key": "none"})[2]["label"]) == -1
    write_parquet(tmp_path / "few.parquet", 0, 3, labels=[1, None, -1], names="ab")
    source = sources.make_source({"name": "parquet", "paths": str(tmp_path / "few.parquet")})
    assert_images(source, [1, -1, -1])
    assert source.class_names == ["a", "b"]
    (batch,) = take(source, 1, global_batch_size=3, shuffle=False, train_transform=None)
    assert batch["image"].shape == (3, 30, 40, 3)


@pytest.mark.parametrize("order", ["forwards", "backwards", "shuffled", "by threads"])
def test_parquet_keeps_bounded_memory_in_any_order(order, tmp_path, monkeypatch):
    """Four images of about 3.7 kB in each row group, of which two may be kept for all threads."""
    write_parquet(tmp_path / "a.parquet", 0, 40)
    monkeypatch.setattr(parquet, "CACHE_BYTES", 32_000)
    source, read, sizes = sources.make_source({"name": "parquet", "paths": str(tmp_path / "a.parquet")}), [], []
    real = source._read
    monkeypatch.setattr(source, "_read", lambda place: read.append(place) or real(place))
    indices = {"backwards": range(39, -1, -1), "shuffled": np.random.default_rng(0).permutation(40).tolist()}.get(
        order, range(40)
    )

    def look(index):
        label = int(source[index]["label"])
        sizes.append((source._cache.size(), len(source._cache._kept)))
        return label

    if order == "by threads":
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(look, indices)) == list(indices)
    else:
        assert list(map(look, indices)) == list(indices)
    assert max(size for size, _ in sizes) <= 32_000
    assert max(kept for _, kept in sizes) == 2
    assert not source._cache._reading
    if order in ("forwards", "backwards"):  # each row group once
        assert sorted(read) == list(range(10))
    assert set(read) == set(range(10))


def test_each_thread_keeps_its_last_row_group(tmp_path, monkeypatch):
    """Also if none may be kept for all: threads that read parts of their own do not disturb each other."""
    write_parquet(tmp_path / "a.parquet", 0, 40)
    monkeypatch.setattr(parquet, "CACHE_BYTES", 0)
    source, read = sources.make_source({"name": "parquet", "paths": str(tmp_path / "a.parquet")}), []
    real, meet = source._read, threading.Barrier(5)
    monkeypatch.setattr(source, "_read", lambda place: read.append(place) or real(place))

    def look(part):
        for index in range(8 * part, 8 * part + 8):
            meet.wait()
            assert int(source[index]["label"]) == index

    with ThreadPoolExecutor(5) as threads:
        list(threads.map(look, range(5)))
    assert sorted(read) == list(range(10))
    assert source._cache.size() == 0


def test_parquet_errors(tmp_path):
    def refused(message, name="a.parquet", **options):
        with pytest.raises(ValueError, match=message) as caught:
            list(sources.make_source({"name": "parquet", "paths": str(tmp_path / name), **options}))
        assert "\n" not in str(caught.value)

    write_parquet(tmp_path / "a.parquet", 0, 3)
    whole = (tmp_path / "a.parquet").read_bytes()
    refused(r"a\.parquet: no column 'jpg'; it has image, label; image_key names it$", image_key="jpg")
    refused(r"a\.parquet: no column 'cls'; it has image, label; label_key names it, label_key=none", label_key="cls")
    refused(r"a\.parquet: column 'label' is int64, expected bytes, or structs with a field 'bytes'", image_key="label")
    refused(r"a\.parquet: column 'image' is struct<.*>, expected integers", label_key="image")
    for name, data in (("text", b"no Parquet"), ("empty", b""), ("cut", whole[:-100]), ("end", whole[:50] + whole[-200:])):
        (tmp_path / f"{name}.parquet").write_bytes(data)
        refused(rf"{name}\.parquet: cannot read this as Parquet \(is it complete\?\): ", f"{name}.parquet")
    middle = bytearray(whole)
    middle[4:3000] = bytes(2996)
    (tmp_path / "middle.parquet").write_bytes(middle)
    refused(r"middle\.parquet", "middle.parquet")
    write_parquet(tmp_path / "none.parquet", 0, 0)
    refused(r"none\.parquet: no rows; expected a row for each image", "none.parquet")
    for labels, found, most in (([0, 1, 2], 2, 1), ([0, -2, 1], -2, 1)):
        write_parquet(tmp_path / "label.parquet", 0, 3, labels=labels, names="ab")
        place = rf"label\.parquet, row {labels.index(found)}: its label is {found}, expected 0 to {most}, or -1 for none"
        refused(place, "label.parquet")
    pq.write_table(pa.table({"image": pa.array([None], pa.binary()), "label": [0]}), tmp_path / "null.parquet")
    refused(r"null\.parquet, row 0: cannot read these 0 bytes as an image", "null.parquet")
    with pytest.raises(FileNotFoundError, match=r"gone-\*\.parquet: no such file, .*; expected Parquet files"):
        sources.make_source({"name": "parquet", "paths": str(tmp_path / "gone-*.parquet")})
    with pytest.raises(ValueError, match=r"no paths given; expected Parquet files"):
        sources.make_source({"name": "parquet", "paths": []})
    for kind in ("parquet", "webdataset", "array_record"):
        with pytest.raises(ValueError, match=f"'{kind}:': expected {kind}:FILES"):
            parse_source(f"{kind}:")


# Records


TOKENS = [np.arange(8) * 100, np.full(8, 65535), np.array([0, 1, 2, 3, 65536, 5, 6, 2**31 - 1])]


@pytest.mark.parametrize("suffix", ["array_record", "jsonl"])
def test_token_files(tmp_path, suffix):
    for part, rows in (("a", TOKENS[:1]), ("b", TOKENS[1:])):
        with records.token_writer(tmp_path / f"{part}.{suffix}") as write:
            for tokens in rows:
                write(tokens, 207)
    source = sources.make_source({"name": "tokens", "paths": str(tmp_path / f"*.{suffix}")})
    for copy in (source, pickle.loads(pickle.dumps(source))):
        assert len(copy) == 3
        for index, tokens in enumerate(TOKENS):
            assert copy[index]["tokens"].dtype == copy[index]["label"].dtype == np.int32
            np.testing.assert_array_equal(copy[index]["tokens"], tokens)
            assert copy[index]["label"] == 207
    (batch,) = take(source, 1, global_batch_size=3, shuffle=False, train_transform=None)
    np.testing.assert_array_equal(batch["tokens"], TOKENS)


def test_published_json_line(tmp_path):
    line = GOLDEN["jsonl_line_example"]
    tokens = np.random.default_rng(700).integers(0, 1024, 256)  # as the golden file states
    (tmp_path / "published.jsonl").write_text(line + "\n" + line)
    source = sources.make_source({"name": "tokens", "paths": [tmp_path / "published.jsonl"]})
    assert len(source) == 2  # the empty line between them is no record
    np.testing.assert_array_equal(source[1]["tokens"], tokens)
    assert source[1]["label"] == 207
    with records.token_writer(tmp_path / "ours.jsonl") as write:
        write(tokens, 207)
    assert (tmp_path / "ours.jsonl").read_text() == line


def test_record_bytes():
    """The encoding is a file format: it must not drift."""
    assert records.encode_tokens(np.array([1, 258]), -1).hex() == "0100" + "ffffffff" + "0200" + "0100" + "0201"
    assert records.encode_tokens(np.array([65536]), 7).hex() == "0100" + "07000000" + "0100" + "00000100"
    assert records.encode_image(b"ab", 7).hex() == "0200" + "07000000" + "0000" + "6162"


def test_image_records(tmp_path):
    with records.image_writer(tmp_path / "images.array_record") as write:
        for index in range(3):
            write(encoded(index), index + 4)
    assert_images(sources.make_source({"name": "array_record", "paths": str(tmp_path / "images.array_record")}), [4, 5, 6])
    with pytest.raises(ValueError, match=r"images\.array_record: holds images, expected tokens"):
        sources.make_source({"name": "tokens", "paths": tmp_path / "images.array_record"})


@pytest.mark.parametrize("suffix", ["array_record", "jsonl"])
def test_a_file_appears_whole_or_not_at_all(tmp_path, suffix):
    path = tmp_path / f"new/tokens.{suffix}"
    with records.token_writer(path) as write:
        write(TOKENS[0], 1)
        assert not path.exists()
    before = path.read_bytes()
    with pytest.raises(ValueError, match="got float64"), records.token_writer(path.with_stem("others")) as write:
        write(TOKENS[1] * 1.0, 1)
    with pytest.raises(FileExistsError, match=r"tokens\.\w+ exists and nothing was overwritten"):
        records.token_writer(path).__enter__()
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_record_errors(tmp_path):
    for tokens, message in [
        (np.zeros((2, 2), int), r"integer tokens \[N\]; got int64 \[2, 2\]"),
        (np.zeros(0, int), r"1 to 65535 .*got int64 \[0\]"),
        (np.zeros(3), "got float64"),
        (np.array([-1]), r"tokens must be in 0\.\.2\^31-1; got -1\.\.-1"),
    ]:
        with pytest.raises(ValueError, match=message):
            records.encode_tokens(tokens, 0)
    for record in (b"", b"abc", b"some text of another program", records.encode_tokens(TOKENS[0], 1)[:-1]):
        with pytest.raises(ValueError, match=r"record 3: .* no record of this project"):
            records.decode_record(record, "record 3")
    with pytest.raises(ValueError, match=r"tokens\.txt: token files end in \.array_record or \.jsonl"):
        records.token_writer(tmp_path / "tokens.txt").__enter__()


def test_token_file_errors(tmp_path):
    (tmp_path / "bad.jsonl").write_text(
        '{"class_id": 1, "tokens": [1, 2]}\n{"class_id": 1}\n{"class_id": 1, "tokens": [[1]]}\nx\n'
    )
    source = sources.make_source({"name": "tokens", "paths": tmp_path / "bad.jsonl"})
    assert source[0]["tokens"].tolist() == [1, 2]
    for index, line in ((1, 2), (2, 3), (3, 4)):
        with pytest.raises(ValueError, match=rf'bad\.jsonl, line {line}: expected {{"class_id": int'):
            source[index]
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl: empty"):
        sources.make_source({"name": "tokens", "paths": tmp_path / "empty.jsonl"})
    (tmp_path / "text.array_record").write_text("not a record file")
    with pytest.raises(ValueError, match="cannot open as ArrayRecord"):
        sources.make_source({"name": "array_record", "paths": tmp_path / "text.array_record"})
    with pytest.raises(ValueError, match=r"found \.array_record, \.jsonl; token files are all"):
        sources.make_source({"name": "tokens", "paths": str(tmp_path / "*")})
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl: no such file"):
        sources.make_source({"name": "tokens", "paths": tmp_path / "gone.jsonl"})


def test_grey_of_16_bits_keeps_its_levels():
    levels = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    image = transforms.decode_image(file.getvalue())
    np.testing.assert_array_equal(image, np.repeat((levels // 256).astype(np.uint8)[..., None], 3, axis=-1))
    Image.fromarray(levels).save(file := io.BytesIO(), "TIFF")
    np.testing.assert_array_equal(transforms.decode_image(file.getvalue()), image)


@pytest.mark.parametrize(("dtype", "kind"), [(np.float32, "floats"), (np.int32, "whole numbers")])
def test_grey_of_32_bits_is_refused(dtype, kind):
    """Pillow would clip it to 0 ... 255, and floats from 0 to 1 would become black."""
    file = io.BytesIO()
    Image.fromarray(np.linspace(0, 1000, 48 * 64).reshape(48, 64).astype(dtype)).save(file, "TIFF")
    with pytest.raises(ValueError, match=rf"^x\.tif: cannot read .*its pixels are {kind} of 32 bits"):
        transforms.decode_image(file.getvalue(), "x.tif")


def token_file(path, rows):
    with records.token_writer(path) as write:
        for tokens, label in rows:
            write(np.asarray(tokens), label)
    return str(path)


@pytest.mark.parametrize("suffix", ["array_record", "jsonl"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (([1, 2, 3, 4], 10), r"label 10, expected 0 to 9; are the labels counted from 1\?"),
        (([1, 2, 3, 4], 37), "label 37, expected 0 to 9"),
        (([1, 2, 3, 4], -1), "label -1, expected 0 to 9"),
        (([1, 2, 128, 4], 3), "token 128, expected 0 to 127"),
        (([1, 2, 3], 3), "3 tokens, expected 4"),
    ],
)
def test_one_wrong_record_among_many_is_named(suffix, wrong, message, tmp_path):
    """Wherever it is, it is found when it is read, with its file and its place in it."""
    good = ([1, 2, 3, 127], 9)
    paths = [token_file(tmp_path / f"{i}.{suffix}", [good] * 5 + ([wrong] if i == 1 else [good])) for i in range(3)]
    limits = checked.Limits(num_classes=10, num_tokens=4, codebook_size=128)
    source = checked.CheckedSource(
        pickle.loads(pickle.dumps(sources.make_source({"name": "tokens", "paths": paths}))), limits
    )
    place = "record 5" if suffix == "array_record" else "line 6"
    for index in range(18):
        if index != 11:
            assert source[index]["label"] == 9
    with pytest.raises(ValueError, match=rf"1\.{suffix}, {place}: {message}"):
        source[11]
    unchecked = checked.CheckedSource(sources.make_source({"name": "tokens", "paths": paths}), checked.Limits())
    assert unchecked[11]["label"] == wrong[1]
    options = {"seed": 0, "global_batch_size": 6, "num_threads": 2, "blocks": [0], "num_blocks": 1}
    with loader.make_loader(source, **options) as batches, pytest.raises(ValueError, match=message):
        list(itertools.islice(batches, 3))


def test_a_damaged_record_file_is_named(tmp_path):
    paths = [token_file(tmp_path / f"{i}.array_record", [([1, 2, 3], i)] * 200) for i in range(2)]
    data = bytearray(Path(paths[1]).read_bytes())
    data[len(data) // 2] ^= 0xFF
    Path(paths[1]).write_bytes(data)
    try:
        source = sources.make_source({"name": "array_record", "paths": paths})
        with pytest.raises(ValueError, match=r"1\.array_record, record \d+: damaged, replace the file"):
            [source[index] for index in range(400)]
    except ValueError as error:  # where the flipped byte is in the index
        assert str(error).startswith(f"{paths[1]}: cannot open")  # noqa: PT017
    Path(paths[1]).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"1\.array_record: cannot open as ArrayRecord; it is damaged or incomplete"):
        sources.make_source({"name": "array_record", "paths": paths})


def test_a_wrong_image_label_is_named(tmp_path):
    with records.image_writer(tmp_path / "a.array_record") as write:
        for label in (0, 9, 10):
            write(encoded_png(), label)
    images = sources.make_source({"name": "array_record", "paths": str(tmp_path / "a.array_record")})
    source = checked.CheckedSource(images, checked.Limits(10))
    assert source[1]["label"] == 9
    with pytest.raises(ValueError, match=r"a\.array_record, record 2: label 10, expected 0 to 9"):
        source[2]


def encoded_png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def class_folders(root, *names):
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "a.png").write_bytes(encoded_png())
    return root


def test_classes_are_what_the_tree_says(tmp_path, monkeypatch):
    root = class_folders(tmp_path / "images", "10", "2", "1", "0", "11")
    assert sources.FolderSource(root).class_names == ["0", "1", "10", "11", "2"]  # as torchvision's ImageFolder
    # What editors, archives and operating systems leave behind is no class, and holds no images.
    class_folders(root, ".ipynb_checkpoints", "__MACOSX", ".thumbnails", "@eaDir", "0/.thumbnails", "1/@eaDir")
    source = sources.FolderSource(root)
    assert source.class_names == ["0", "1", "10", "11", "2"]
    assert len(source) == 5
    # A link to a folder above is not followed, one to elsewhere is.
    (root / "2" / "up").symlink_to(root)
    (root / "loop").symlink_to(tmp_path)
    class_folders(tmp_path / "elsewhere", "more")
    (root / "12").symlink_to(tmp_path / "elsewhere")
    source = sources.FolderSource(root)
    assert source.class_names == ["0", "1", "10", "11", "12", "2"]
    assert len(source) == 6
    # An empty class would shift the labels behind it.
    (root / "15").mkdir()
    with pytest.raises(ValueError, match=r"images: 1 class folders without images, e\.g\. 15; put their images there"):
        sources.FolderSource(root)
    assert len(sources.FolderSource(root, labels=False)) == 6
    (root / "15").rmdir()
    real = os.scandir

    def denied(place):
        if os.fspath(place).endswith("images/10"):
            raise PermissionError(13, "Permission denied", place)
        return real(place)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(PermissionError, match=r"images/10: the folder cannot be read \(Permission denied\)"):
        sources.FolderSource(root)


@pytest.mark.parametrize("number", [2**31, -(2**31) - 1, 2**63, 2**64, 10**30])
def test_numbers_beyond_int32_are_refused_not_wrapped(number, tmp_path):
    for line in (f'{{"class_id": {number}, "tokens": [1]}}', f'{{"class_id": 1, "tokens": [1, {number}]}}'):
        (tmp_path / "t.jsonl").write_text(line)
        with pytest.raises(ValueError, match=r't\.jsonl, line 1: expected {"class_id": int, "tokens": \[int, \.\.\.\]}; '):
            sources.make_source({"name": "tokens", "paths": str(tmp_path / "t.jsonl")})[0]
    for write in (records.encode_tokens, records.encode_image):
        with pytest.raises(ValueError, match=f"label {number}, expected a class index below 2"):
            write(np.array([1, 2]) if write is records.encode_tokens else b"", number)
    with pytest.raises(ValueError, match=f"^a image: label {number}, expected a class index below 2"):
        transforms.decode_example(encoded_png(), number, "a image")
    if -(2**63) <= number < 2**64:
        labels = pa.array([0, number], pa.int64() if number < 2**63 else pa.uint64())
        pq.write_table(pa.table({"image": [encoded_png()] * 2, "label": labels}), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match=rf"a\.parquet.*{number}"):
            sources.make_source({"name": "parquet", "paths": str(tmp_path / "a.parquet")})[1]


@pytest.mark.parametrize("label", ["1.5", '"1"', "true", "null", "[1]"])
def test_a_class_of_a_json_line_is_a_whole_number(label):
    with pytest.raises(ValueError, match=r"^line: expected .*class_id is"):
        records.decode_json_tokens(f'{{"class_id": {label}, "tokens": [1]}}')


def test_a_json_line_nested_without_end_is_refused():
    with pytest.raises(ValueError, match=r"^line: expected .*RecursionError"):
        records.decode_json_tokens("[" * 100_000)


def test_a_damaged_example_of_tfds_is_named(tfds_dir, tmp_path):
    shutil.copytree(tfds_dir, tmp_path / "tfds")
    shards = (tmp_path / "tfds").rglob("*train.array_record*")
    (path,) = (shard for shard in shards if encoded(2) in shard.read_bytes())
    data = bytearray(path.read_bytes())
    data[data.index(encoded(2)) + 40] ^= 255
    path.write_bytes(data)
    source = sources.make_source({"name": "tfds", "path": str(tmp_path / "tfds/tiny/1.0.0"), "split": "train"})
    source = checked.CheckedSource(source, checked.Limits(), replace=True)
    (found,) = [index for index in range(6) if source[index]["replaced"] >= 0]
    assert re.match(rf"tfds .*, split train, example {found}: damaged \(.+\)", source.damage(found))
