"""tools/prepare_imagenet.py: every format in which ImageNet is kept, with labels and original bytes; kills; bad inputs."""

import errno
import fcntl
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
from PIL import Image

from titok_jax.data.records import image_writer
from titok_jax.data.sources import make_source

TOOL = pathlib.Path(__file__).parents[1] / "tools" / "prepare_imagenet.py"
WNIDS = ["n01440764", "n01443537", "n01484850", "n01491361", "n01494475"]
ILSVRC_IDS = [4, 2, 5, 1, 3]  # the kit's ids of these classes are in another order, as in the real kit


@pytest.fixture
def small(tool, monkeypatch):
    """The tool, set up for an ImageNet with 5 classes of 4 images."""
    monkeypatch.setattr(tool, "NUM_CLASSES", 5)
    for name, split in tool.SPLITS.items():
        small = tool.Split(images=20, per_class=(4, 4), tfds=split.tfds, shards=3)
        monkeypatch.setitem(tool.SPLITS, name, small)
    return tool


def picture(seed: int, form: str = "JPEG", mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (9, 11, 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(file, form)
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in files.items():
            add(tar, name, data)
    return buffer.getvalue()


# Each class has 4 images. Among all of them are a PNG named JPEG and one in CMYK, as in ImageNet.
FORMATS = {7: ("PNG", "RGB"), 13: ("JPEG", "CMYK"), 14: ("JPEG", "L")}
IMAGES = {
    f"{wnid}/{wnid}_{number}.JPEG": (picture(4 * label + number, *FORMATS.get(4 * label + number, ())), label)
    for label, wnid in enumerate(WNIDS)
    for number in range(4)
}


def train_archive(path, images=IMAGES, order=(3, 0, 4, 1, 2)):
    classes = {
        f"{wnid}.tar": tar_of({name.split("/")[1]: data for name, (data, _) in images.items() if name.startswith(wnid)})
        for wnid in (WNIDS[i] for i in order)
    }
    path.write_bytes(tar_of(classes))
    return path


def devkit(path, truth):
    fields = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
    rows = [(number, wnid, f"name of {wnid}", 0) for number, wnid in sorted(zip(ILSVRC_IDS, WNIDS, strict=True))]
    rows += [(6, "n00001740", "entity", 5)]  # their hypernym in WordNet: its id sorts first, but it is no class
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": np.array(rows, fields).reshape(-1, 1)})
    folder = "ILSVRC2012_devkit_t12/data"
    files = {
        f"{folder}/meta.mat": meta.getvalue(),
        f"{folder}/ILSVRC2012_validation_ground_truth.txt": "".join(f"{number}\n" for number in truth).encode(),
    }
    path.write_bytes(tar_of(files, "w:gz"))
    return path


def val_archive(folder):
    """The images, not in the order of their numbers, with the kit beside them."""
    images = list(IMAGES.values())
    names = [f"ILSVRC2012_val_{i + 1:08}.JPEG" for i in range(20)]
    shuffled = np.random.default_rng(0).permutation(20)
    path = folder / "ILSVRC2012_img_val.tar"
    path.write_bytes(tar_of({names[i]: images[i][0] for i in shuffled}))
    devkit(folder / "ILSVRC2012_devkit_t12.tar.gz", [ILSVRC_IDS[label] for _, label in images])
    return path


def class_folders(folder):
    for name, (data, _) in IMAGES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def webdataset(folder):
    folder.mkdir()
    for split in ("train", "validation"):  # the other split must not get in
        images = list(IMAGES.values()) if split == "train" else [(picture(99), 1)]
        for shard in range(0, len(images), 8):
            files = {}
            for i, (data, label) in enumerate(images[shard : shard + 8]):
                files |= {f"{shard + i:05}.cls": str(label).encode(), f"{shard + i:05}.jpg": data}
            (folder / f"imagenet1k-{split}-{shard:04}.tar").write_bytes(tar_of(files))
    return folder


def tfds_set(folder):
    tfds = pytest.importorskip("tensorflow_datasets")

    class Imagenet2012(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("5.1.0")

        def _info(self):
            features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=5)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, download_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for name, (data, label) in IMAGES.items():
                yield name, {"image": io.BytesIO(data), "label": label}

    Imagenet2012(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def parquet_files(folder):
    """As on the hub: in data/, each file with a few row groups, validation and test beside the training images."""
    (folder / "data").mkdir(parents=True)
    images = list(IMAGES.values())
    for split, rows in (("train", images), ("validation", [(picture(99), 1)]), ("test", [(picture(98), -1)])):
        for shard in range(0, len(rows), 8):
            part = rows[shard : shard + 8]
            table = pa.table(
                {"image": [{"bytes": data, "path": "x.JPEG"} for data, _ in part], "label": [label for _, label in part]}
            )
            pq.write_table(table, folder / f"data/{split}-{shard // 8:05}-of-00003.parquet", row_group_size=3)
    return folder


def read(folder, split="train"):
    """[(bytes, label)] of a result, read the way training reads it."""
    source = make_source({"name": "array_record", "paths": str(folder / f"{split}-*")})
    examples = [source[i] for i in range(len(source))]  # every image can be decoded
    assert all(example["image"].shape == (9, 11, 3) for example in examples)
    records = [source._records[i] for i in range(len(source))]
    return [(record[8:], int(example["label"])) for record, example in zip(records, examples, strict=True)]


FORMS_OF_INPUT = {
    "archive": ("train", lambda folder: train_archive(folder / "ILSVRC2012_img_train.tar")),
    "archive in a folder": ("train", lambda folder: train_archive(folder / "ILSVRC2012_img_train.tar").parent),
    "validation archive": ("val", val_archive),
    "class folders": ("train", lambda folder: class_folders(folder / "any")),
    "folder of splits": ("val", lambda folder: class_folders(folder / "val").parent),
    "tars": ("train", lambda folder: webdataset(folder / "tars") / "*-train-*.tar"),
    "tars by braces": ("train", lambda folder: webdataset(folder / "tars") / "imagenet1k-train-00{00,08,16}.tar"),
    "folder of tars": ("train", lambda folder: webdataset(folder / "tars")),
    "tfds": ("train", tfds_set),
    "parquet": ("train", lambda folder: parquet_files(folder / "imagenet-1k")),
    "parquet by braces": ("train", lambda folder: parquet_files(folder / "a") / "data/train-{00000..00002}-*.parquet"),
}


@pytest.mark.parametrize("form", FORMS_OF_INPUT)
def test_every_form_gives_the_same_images(form, small, tmp_path, capsys):
    split, make = FORMS_OF_INPUT[form]
    (tmp_path / "in").mkdir()
    given = make(tmp_path / "in")
    assert small.main([str(given), "--split", split, "--out", str(tmp_path / "out")]) == 0
    assert sorted(read(tmp_path / "out", split)) == sorted(IMAGES.values())
    assert "20 images in 3 shards of " + split in (out := capsys.readouterr().out)
    assert "all is as in ImageNet" in out
    names = [f"{split}-{i:05}-of-00003.array_record" for i in range(3)] + [f"{split}.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    report = json.loads((tmp_path / "out" / f"{split}.json").read_text())
    assert report["images_per_class"] == [4] * 5
    if "archive" in form or ("folder" in form and "tars" not in form):
        assert report["class_names"] == WNIDS


def test_images_are_spread_over_the_shards(small, tmp_path):
    train_archive(tmp_path / "ILSVRC2012_img_train.tar", order=range(5))
    for workers in (1, 4):
        command = [str(tmp_path), "--split", "train", "--shards", "4", "--workers", str(workers)]
        assert small.main([*command, "--out", str(tmp_path / str(workers))]) == 0
    for shard in range(4):
        name = f"train-{shard:05}-of-00004.array_record"
        source = make_source({"name": "array_record", "paths": str(tmp_path / "1" / name)})
        assert [int(source[i]["label"]) for i in range(5)] == [0, 1, 2, 3, 4]  # one of each class, as every class has 4
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "4" / name).read_bytes()


def read_tars(folder, split="train"):
    """[(bytes, label)] of a result in tars, read the way training reads it."""
    source = make_source({"name": "webdataset", "paths": str(folder / f"{split}-*.tar")})
    assert all(source[i]["image"].shape == (9, 11, 3) for i in range(len(source)))
    return [source.encoded(i)[:2] for i in range(len(source))]


def test_tars_are_written_whole_and_go_on(small, tmp_path, capsys, monkeypatch):
    given = parquet_files(tmp_path / "in")
    command = [str(given), "--split", "train", "--out", str(tmp_path / "out"), "--format", "webdataset", "--workers", "1"]
    real, made = small.write_shard, []

    def killed(source, indices, path, *rest):
        made.append(path.name)
        if "00001" in path.name and len(made) == 2:
            raise KeyboardInterrupt
        return real(source, indices, path, *rest)

    monkeypatch.setattr(small, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        small.main(command)
    names = [f"train-0000{i}-of-00003.tar" for i in range(3)]
    assert not (tmp_path / "out" / names[1]).exists()
    before = (tmp_path / "out" / names[0]).read_bytes()
    assert small.main([arg for arg in command if arg not in ("--format", "webdataset")]) == 2
    assert "exists and nothing was overwritten" in capsys.readouterr().err
    assert small.main(command) == 0
    assert made.count(names[0]) == 1 < made.count(names[1])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*names, "train.json"]
    assert sorted(read_tars(tmp_path / "out")) == sorted(IMAGES.values())
    assert (tmp_path / "out" / names[0]).read_bytes() == before
    with tarfile.open(tmp_path / "out" / names[1]) as tar:  # IMAGES[7] is a PNG
        endings = ("1.png", "1.cls", "2.jpg", "2.cls")
        assert tar.getnames()[2:6] == [f"train-00001-of-00003-00000{ending}" for ending in endings]
    # The tars are an input again; the other format then takes their place.
    back = [str(tmp_path / "out"), "--split", "train", "--out", str(tmp_path / "back")]
    assert small.main(back) == 0
    assert sorted(read(tmp_path / "back")) == sorted(IMAGES.values())
    assert small.main([*back, "--format", "webdataset", "--overwrite"]) == 0
    assert {path.suffix for path in (tmp_path / "back").iterdir()} == {".tar", ".json"}


def test_damaged_tars_are_skipped_if_asked(small, tmp_path, capsys):
    folder = webdataset(tmp_path / "tars")
    damaged = folder / "imagenet1k-train-0000.tar"
    cut(damaged, 3000)
    command = [str(folder), "--split", "train", "--out", str(tmp_path / "out")]
    assert small.main(command) == 2
    assert "imagenet1k-train-0000.tar: " in capsys.readouterr().err
    assert small.main([*command, "--skip-damaged"]) == 1
    out = capsys.readouterr().out
    assert f"warning: 1 of 3 tars are damaged and left out:\n  {damaged}: " in out
    assert f"WARNING: 1 damaged tars were left out, the first is {damaged}: " in out
    assert sorted(read(tmp_path / "out")) == sorted(list(IMAGES.values())[8:])


def many(folder, count=600):
    """An archive that takes a while to process."""
    images = {f"{WNIDS[i % 5]}/{WNIDS[i % 5]}_{i}.JPEG": (picture(i), i % 5) for i in range(count)}
    images[f"{WNIDS[0]}/{WNIDS[0]}_0.JPEG"] = (b"no image", 0)
    return train_archive(folder / "ILSVRC2012_img_train.tar", images), sorted(list(images.values())[1:])


def test_the_command_goes_on_after_sigkill(tool, tmp_path, capsys):
    archive, images = many(tmp_path)
    out = tmp_path / "out"
    command = [str(archive), "--split", "train", "--out", str(out), "--shards", "60"]
    env = {**os.environ, "PYTHONPATH": str(TOOL.parents[1])}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, TOOL, *command], env=env, **quiet)
    deadline = time.monotonic() + 900
    while len(list(out.glob("train.shards/[0-9]*.npz"))) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    noted = [int(path.stem) for path in out.glob("train.shards/[0-9]*.npz")]
    there = {path: path.stat().st_mtime_ns for n in noted for path in out.glob(f"train-{n:05}-*.array_record")}
    assert 3 <= len(there) == len(noted) < 60
    with image_writer(out / "train-00059-of-00060.array_record"):
        (partial,) = out.glob(".train-00059*")
        left = partial.name
    (out / left).write_bytes(b"of a killed writer")
    (out / "train-00059-of-00060.array_record").unlink()
    for arguments, message in [(["--shards", "30"], "exists"), (["--no-verify"], "verify: True there, False now")]:
        assert tool.main([*command, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert tool.main(command) == 1  # 600 images are not ImageNet
    assert "599 images in 60 shards" in capsys.readouterr().out
    assert sorted(read(out)) == images
    assert {path: path.stat().st_mtime_ns for path in there} == there  # they were not made again
    assert {path.suffix for path in out.iterdir()} == {".array_record", ".json", ".txt"}
    (listed,) = (out / "train.left_out.txt").read_text().splitlines()  # also if its shard was made before the kill
    assert f"{WNIDS[0]}/{WNIDS[0]}_0.JPEG: cannot read these 8 bytes as an image" in listed


def test_a_result_is_replaced_only_if_asked_for(small, tmp_path, capsys):
    archive = train_archive(tmp_path / "ILSVRC2012_img_train.tar")
    command = [str(archive), "--split", "train", "--out", str(tmp_path / "out")]
    assert small.main(command) == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    for arguments in ([], ["--shards", "2"]):
        assert small.main([*command, *arguments]) == 2
        assert "train.json exists and nothing was overwritten" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    (tmp_path / "out/train.json").unlink()  # nothing tells to which result the files belong
    assert small.main([*command, "--shards", "2"]) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert small.main([*command, "--shards", "2", "--overwrite"]) == 0
    assert len(list((tmp_path / "out").glob("train-*"))) == 2
    assert sorted(read(tmp_path / "out")) == sorted(IMAGES.values())
    # The other split is written beside it.
    val_archive(tmp_path)
    assert small.main([str(tmp_path), "--split", "val", "--out", str(tmp_path / "out")]) == 0
    assert sorted(read(tmp_path / "out", "val")) == sorted(read(tmp_path / "out")) == sorted(IMAGES.values())


MINE = ["train-extra-mine.array_record", ".train-notes.txt", "train.shards/notes.txt", ".train-00000-of-00003.partial-1.tar"]


def keep(out, names=MINE):
    """Writes files of the user's -> a function that checks that they are there."""
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")

    def check():
        assert {name: (out / name).read_text() for name in names} == dict.fromkeys(names, "mine")

    return check


def test_files_of_the_user_stay(small, tmp_path, capsys):
    archive = train_archive(tmp_path / "ILSVRC2012_img_train.tar")
    out = tmp_path / "out"
    command = [str(archive), "--split", "train", "--out", str(out)]
    check = keep(out)
    for more in ([], ["--overwrite"]):  # a folder in the place of ours is refused
        assert small.main([*command, *more]) == 2
        assert "train.shards holds files of other origin (notes.txt)" in capsys.readouterr().err
        check()
    (out / "train.shards/notes.txt").unlink()
    check = keep(out, [name for name in MINE if "shards" not in name])
    left = out / f".train-00007-of-00009.partial-{17:016x}.array_record"
    left.write_text("half")
    assert small.main(command) == 0
    assert not left.exists()
    check()
    extra = out / "train-extra-mine.array_record"
    assert f"WARNING: {extra} is of other origin, and the pattern train-* matches it too" in capsys.readouterr().out
    check = keep(out)
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert small.main([*command, "--overwrite"]) == 2
    assert "train.shards holds files of other origin (notes.txt)" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before  # the result is still whole
    check()
    (out / "train.shards/notes.txt").unlink()
    assert small.main([*command, "--overwrite", "--shards", "2"]) == 0
    assert len(list(out.glob("train-0*"))) == 2


def test_what_it_would_write_is_not_replaced_unasked(small, tmp_path, capsys, monkeypatch):
    folder = class_folders(tmp_path / "in")
    (folder / WNIDS[0] / f"{WNIDS[0]}_0.JPEG").write_bytes(b"no image")
    out = tmp_path / "out"
    command = [str(folder), "--split", "train", "--out", str(out)]
    check = keep(out, ["train.left_out.txt"])
    assert small.main(command) == 2
    assert f"{out}/train.left_out.txt exists and nothing was overwritten" in capsys.readouterr().err
    check()
    (out / "train.left_out.txt").unlink()
    real = small.check_shards
    for name in ("train.json", "train.left_out.txt"):  # it appears during the work

        def during(*args, name=name):
            during.check = keep(out, [name])
            return real(*args)

        monkeypatch.setattr(small, "check_shards", during)
        assert small.main(command) == 2
        assert f"{out}/{name} has appeared during the work" in capsys.readouterr().err
        during.check()
        (out / name).unlink()
        monkeypatch.setattr(small, "check_shards", real)
    assert small.main(command) == 1
    assert "no image" not in (out / "train.left_out.txt").read_text()


def test_another_input_is_no_continuation(small, tmp_path, capsys, monkeypatch):
    archive = train_archive(tmp_path / "ILSVRC2012_img_train.tar")
    command = [str(archive), "--split", "train", "--out", str(tmp_path / "out"), "--workers", "1"]
    real = small.write_shard

    def killed(source, indices, path, *rest):
        if "00001" in path.name:
            raise KeyboardInterrupt
        return real(source, indices, path, *rest)

    monkeypatch.setattr(small, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        small.main(command)
    monkeypatch.setattr(small, "write_shard", real)
    images = dict(IMAGES)
    images[f"{WNIDS[0]}/{WNIDS[0]}_0.JPEG"] = (picture(3) + bytes(20_000), 0)
    train_archive(archive, images)
    assert small.main(command) == 2
    assert "other settings (files: " in capsys.readouterr().err
    assert small.main([*command, "--overwrite"]) == 0
    assert sorted(read(tmp_path / "out")) == sorted(images.values())


def test_a_shard_that_was_damaged_is_named_and_made_again(small, tmp_path, capsys, monkeypatch):
    command = [str(train_archive(tmp_path / "ILSVRC2012_img_train.tar")), "--split", "train", "--out", str(tmp_path / "out")]
    damaged = tmp_path / "out/train-00001-of-00003.array_record"
    real = small.check_shards

    def during(*args):
        cut(damaged, 100)
        return real(*args)

    monkeypatch.setattr(small, "check_shards", during)
    assert small.main(command) == 2
    assert f"{damaged} holds 0 images, 7 were written; remove it" in capsys.readouterr().err
    monkeypatch.setattr(small, "check_shards", real)
    damaged.unlink()
    assert small.main(command) == 0
    assert sorted(read(tmp_path / "out")) == sorted(IMAGES.values())


def test_two_at_once(small, tmp_path, capsys, monkeypatch):
    archive = train_archive(tmp_path / "ILSVRC2012_img_train.tar")
    command = [str(archive), "--split", "train", "--out", str(tmp_path / "out")]
    real, results = small.check_shards, []

    def during(*args):
        for arguments in ([], ["--overwrite"], ["--overwrite", "--shards", "2"]):
            results.append(small.main([*command, *arguments]))
            assert "is at work in" in capsys.readouterr().err
        return real(*args)

    monkeypatch.setattr(small, "check_shards", during)
    assert small.main(command) == 0
    assert results == [2, 2, 2]
    assert sorted(read(tmp_path / "out")) == sorted(IMAGES.values())


def test_where_a_file_system_has_no_locks_it_warns_and_goes_on(small, tmp_path, capsys, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    archive = train_archive(tmp_path / "ILSVRC2012_img_train.tar")
    assert small.main([str(archive), "--split", "train", "--out", str(tmp_path / "out")]) == 0
    work = tmp_path / "out/train.shards"
    assert f"warning: {work} cannot be locked ([Errno 37] No locks available): nothing stops" in capsys.readouterr().out
    assert not work.exists()


def test_what_is_not_as_in_imagenet_is_said(small, tmp_path, capsys):
    folder = class_folders(tmp_path / "in")
    cut = folder / WNIDS[1] / f"{WNIDS[1]}_2.JPEG"
    cut.write_bytes(cut.read_bytes()[:-40])
    (folder / WNIDS[2] / f"{WNIDS[2]}_0.JPEG").write_bytes(b"")
    assert small.main([str(folder), "--split", "train", "--out", str(tmp_path / "out")]) == 1
    out = capsys.readouterr().out
    for message in (
        "2 images were left out, the first is ",
        "18 images, ImageNet's train has 20",
        "2 classes have not 4 images as in ImageNet, the first is 1 (n01443537) with 3",
    ):
        assert f"WARNING: {message}" in out
    left_out = sorted((tmp_path / "out/train.left_out.txt").read_text().splitlines())
    assert [line.split(": ")[0] for line in left_out] == [str(cut), str(folder / WNIDS[2] / f"{WNIDS[2]}_0.JPEG")]
    assert "truncated" in left_out[0]
    assert len(read(tmp_path / "out")) == 18
    # Without decoding, the truncated image passes; an empty one never does.
    assert small.main([str(folder), "--split", "train", "--out", str(tmp_path / "fast"), "--no-verify"]) == 1
    assert "19 images in 3 shards" in capsys.readouterr().out
    # A missing class would shift the labels of all later classes.
    shutil.rmtree(folder / WNIDS[0])
    assert small.main([str(folder), "--split", "train", "--out", str(tmp_path / "four")]) == 1
    assert "WARNING: images of 4 classes, ImageNet has 5, so labels may mean other classes" in capsys.readouterr().out


def test_labels_out_of_range_are_left_out(small, tmp_path, capsys):
    files = {}
    for i, (data, label) in enumerate([(picture(0), 4), (picture(1), 5), (picture(2), 0)]):
        files |= {f"{i}.jpg": data, f"{i}.cls": str(label).encode()}
    (tmp_path / "a.tar").write_bytes(tar_of({**files, "3.jpg": picture(3)}))
    assert small.main([str(tmp_path / "a.tar"), "--split", "train", "--out", str(tmp_path / "out"), "--shards", "1"]) == 1
    first, second = (tmp_path / "out/train.left_out.txt").read_text().splitlines()
    assert "a.tar, image 1 at byte" in first
    assert first.endswith("its label is 5, expected 0 to 4")
    assert second.endswith("its label is -1, expected 0 to 4")
    assert read(tmp_path / "out") == [(picture(0), 4), (picture(2), 0)]


@pytest.mark.parametrize("form", ["array_record", "webdataset"])
def test_a_full_disk_leaves_no_partial_shard(form, small, tmp_path, capsys, full_disk):
    archive, images = many(tmp_path)
    command = [str(archive), "--split", "train", "--out", str(tmp_path / "out"), "--shards", "2", "--format", form]
    with full_disk(100_000):
        assert small.main(command) == 2
    assert "cannot write" in (error := capsys.readouterr().err)
    assert f"-of-00002.{'tar' if form == 'webdataset' else form}" in error
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train.shards"]
    assert small.main(command) == 1
    assert sorted((read_tars if form == "webdataset" else read)(tmp_path / "out")) == images


def cut(path, length):
    path.write_bytes(path.read_bytes()[:length])


def broken_inputs(folder):
    """{name: (arguments, message)}"""
    train = train_archive(folder / "train.tar")
    (folder / "v").mkdir()
    val = val_archive(folder / "v")
    kit = val.parent / "ILSVRC2012_devkit_t12.tar.gz"
    for name, source, length in (("cut_outer", train, 30_000), ("cut_val", val, 9_000), ("cut_kit.tar.gz", kit, 300)):
        cut(pathlib.Path(shutil.copy(source, folder / name)), length)
    with tarfile.open(train) as tar:
        second = tar.getmembers()[1]
    for name, place in (("cut_between", second.offset), ("damaged", second.offset_data + 20_480)):
        shutil.copy(train, folder / name)
        if name == "cut_between":  # tarfile alone takes this cut for the end
            cut(folder / name, place)
    inner = bytearray((folder / "damaged").read_bytes())
    with tarfile.open(fileobj=io.BytesIO(bytes(inner[second.offset_data :][: second.size]))) as tar:
        header = second.offset_data + tar.getmembers()[2].offset
    inner[header : header + 20] = b"\xff" * 20
    (folder / "damaged").write_bytes(inner)
    (folder / "other.tar").write_bytes(tar_of({"readme.tar": b""}))
    (folder / "zip.tar").write_bytes(tar_of({"a.jpg": picture(0)}, "w:gz"))
    (folder / "empty").mkdir()
    (folder / "flat").mkdir()
    (folder / "flat/1.jpg").write_bytes(picture(0))
    (folder / "alone").mkdir()
    shutil.copy(val, folder / "alone")
    devkit(folder / "short.tar.gz", [1] * 19)
    (folder / "wrong.tar.gz").write_bytes(
        tar_of({"data/meta.mat": b"?", "ILSVRC2012_validation_ground_truth.txt": b"1"}, "w:gz")
    )
    (folder / "half.tar.gz").write_bytes(tar_of({"data/meta.mat": b"?"}, "w:gz"))
    (folder / "bare.tar").write_bytes(tar_of({"a.jpg": picture(0)}))
    (folder / "text.parquet").write_text("not Parquet")
    pq.write_table(pa.table({"picture": [picture(0)], "label": [7]}), folder / "names.parquet")
    (parquet_files(folder / "hub") / "data/train-00001-of-00003.parquet").unlink()
    alone = folder / "alone" / val.name
    return [
        ([folder / "hub"], "train", "hub/data: train-00001-of-00003.parquet of 3 shards missing; "),
        (
            [folder / "cut_outer"],
            "train",
            "cut_outer: unexpected end of data: something in it ends at byte 32,256 of 30,000; ",
        ),
        ([folder / "cut_between"], "train", "cut_between: damaged or cut short at byte"),
        ([folder / "damaged"], "train", f"damaged, {second.name}: damaged or cut short at byte"),
        ([folder / "cut_val", "--devkit", kit], "val", "cut_val: unexpected end of data"),
        ([val, "--devkit", folder / "cut_kit.tar.gz"], "val", "cut_kit.tar.gz: "),
        ([alone], "val", "alone/ILSVRC2012_devkit_t12.tar.gz: no such file; the labels"),
        ([val, "--devkit", folder / "short.tar.gz"], "val", "expected ILSVRC2012_val_00000001.JPEG to 00000019"),
        ([val, "--devkit", folder / "wrong.tar.gz"], "val", "wrong.tar.gz: its meta.mat and ground truth are not"),
        ([val, "--devkit", folder / "half.tar.gz"], "val", "half.tar.gz: holds no ILSVRC2012_validation_ground_truth.txt"),
        ([train], "val", "this is ImageNet's train archive; give it alone, with --split train"),
        ([val], "train", "this is ImageNet's val archive"),
        ([folder / "other.tar"], "train", "holds readme.tar; expected tars named after WordNet ids"),
        ([folder / "text.parquet"], "train", "text.parquet: cannot read this as Parquet (is it complete?): "),
        ([folder / "names.parquet"], "train", "names.parquet: no column 'image'; it has picture, label; image_key names it"),
        (
            [folder / "names.parquet", "--image-key", "picture", "--shards", "1"],
            "train",
            "row 0: its label is 7, exp",
        ),
        ([folder / "zip.tar"], "train", "zip.tar: expected an uncompressed tar: "),
        ([folder / "bare.tar", "--shards", "1"], "train", "its label is -1, expected 0 to 4"),
        ([folder / "empty"], "train", "Known are also ILSVRC2012_img_train.tar, WebDataset tars, Parquet files and a TFDS"),
        ([folder / "flat"], "train", "the images lie directly in the folder"),
        ([folder / "nowhere"], "train", "nowhere: no such file, and no file matches it as a pattern; expected a folder"),
        (["gs://bucket/train.tar"], "train", "gs://bucket/train.tar: expected a local path"),
        ([train, "--out", "gs://bucket/imagenet"], "train", "gs://bucket/imagenet: expected a local path"),
        ([val, "--devkit", "gs://bucket/kit.tar.gz"], "val", "gs://bucket/kit.tar.gz: expected a local path"),
        ([train, "--shards", "0"], "train", "--shards is 0"),
        ([train, "--shards", "21"], "train", "more than the 20 images"),
    ]


def test_bad_input_is_refused_before_anything_is_written(small, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, split, message in broken_inputs(tmp_path):
        assert small.main(["--split", split, "--out", str(tmp_path / "out"), *map(str, arguments)]) == 2, message
        error = capsys.readouterr().err
        assert error.rpartition("error: ")[2].count("\n") == 1, error
        assert message in error
        assert not (tmp_path / "out").exists()
    assert not (tmp_path / "gs:").exists()


def test_help_has_examples(tool, capsys):
    with pytest.raises(SystemExit, match="0"):
        tool.main(["--help"])
    assert "ILSVRC2012_img_train.tar --split train" in capsys.readouterr().out
