"""Seeded mutations of what people give to this package: model folders, recipes by flags, data, archives, images, notes.

  python tests/mutations.py --count 10000 --seed 0
  python tests/mutations.py --kind model_folder --number 4711   # one case, with its traceback

Each case changes one thing that is right, and reads it as the package does. Allowed are a result and a ValueError or OSError
(which commands print in one line). Anything else fails: another exception, more than 10 seconds, more than 2 GB of memory,
and a model that loads with other numbers or sizes than were saved. Prints a JSON line of counts for each kind, and the cases
that failed.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import traceback
import warnings
import zipfile

import jax
import numpy as np
import PIL.Image
import pyarrow.parquet
import tiny_models
from etils import epath

from titok_jax import models
from titok_jax.data import transforms
from titok_jax.data.checked import CheckedSource, Limits
from titok_jax.data.records import token_writer
from titok_jax.data.sources import make_source
from titok_jax.data.webdataset import tar_writer
from titok_jax.evaluation.image_sources import NpzImages
from titok_jax.evaluation.references import read_reference
from titok_jax.models.generator import GeneratorConfig
from titok_jax.models.maskgit_vqgan import MaskgitVQGANConfig
from titok_jax.models.titok import TiTokConfig
from titok_jax.runtime import sharding
from titok_jax.runtime.messages import printable
from titok_jax.runtime.shards import Shards
from titok_jax.training.checkpoint import Checkpoints, quiet_checkpointing
from titok_jax.training.log import MetricLog
from titok_jax.training.log_files import LogFolder
from titok_jax.training.recipes import read_config
from titok_jax.training.settings import parse_settings
from titok_jax.weights import convert, pretrained
from titok_jax.weights.flax_file import write_flax

SECONDS, MEMORY = 10, 2 * 2**30
VQGAN = MaskgitVQGANConfig(hidden_channels=32, channel_mult=(1, 1), num_res_blocks=1, z_channels=8, codebook_size=16)
ODD = [None, True, False, -1, 0, 1, 3, 7, 2**31, 2**63, 10**30, -(10**12), 0.5, -1e-9, 1e308, float("nan"), float("inf")]
ODD += ["", "x", "10", "1e3", "../../etc/passwd", "\x00\x1b[2J", "é" * 300, "vq", "large", [], [1], [[]], {}, {"a": {}}]
ODD += ["9" * 5000, [[[[[[]]]]]], {"a": [1, {"b": None}]}]


# ---------------------------------------------------------------------------------------------------------------------
# What changes bytes, JSON and images


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flips, cuts, repeats, fills, or replaces bytes."""
    data, way, n = bytearray(data), rng.randrange(8), len(data)
    at = rng.randrange(n) if n else 0
    if way == 0:
        data[at : at + 1] = bytes([rng.randrange(256)])
    elif way == 1:
        del data[at:]
    elif way == 2:
        del data[at : at + rng.choice([1, 2, 8, 512])]
    elif way == 3:
        data[at:at] = rng.randbytes(rng.choice([1, 3, 8, 512]))
    elif way == 4:
        data[at : at + 8] = rng.choice([b"\x00" * 8, b"\xff" * 8, struct.pack("<q", -1), struct.pack("<Q", 2**62)])
    elif way == 5:
        for _ in range(20):
            data[rng.randrange(n)] ^= 1 << rng.randrange(8)
    elif way == 6:
        data = bytearray(rng.choice([b"", b"\n", b"{}", b"[]", b"null", rng.randbytes(100), bytes(data) * 2, b"PK\x03\x04"]))
    else:
        start = min(at, 200)
        data[start : start + 1] = bytes([rng.randrange(256)])  # headers come first
    return bytes(data)


def paths_of(tree, prefix=()):
    """All places in a tree of dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*prefix, key)
        yield from paths_of(value, (*prefix, key))


def mutate_tree(rng: random.Random, tree):
    """Changes, removes, moves or adds one value of a tree."""
    tree = json.loads(json.dumps(tree))
    *above, last = rng.choice(list(paths_of(tree)))
    place = tree
    for key in above:
        place = place[key]
    way = rng.randrange(5)
    if way == 0 and isinstance(place, dict):
        del place[last]
    elif way == 1 and isinstance(place[last], int):
        place[last] = place[last] * rng.choice([2, 3, -1, 1000, 10**9]) + rng.choice([0, 1])
    elif way == 2 and isinstance(place, dict):
        place[rng.choice(["x", last + "2", ""])] = rng.choice(ODD)
    else:
        place[last] = rng.choice(ODD)
    return tree


def mutate_json(rng: random.Random, text: str) -> bytes:
    """A mutated tree, or text that is broken in other ways: duplicate keys, deep nesting, other encodings."""
    way = rng.randrange(10)
    if way > 2:
        return json.dumps(mutate_tree(rng, json.loads(text))).encode()
    if way == 0:
        return mutate_bytes(rng, text.encode())
    if way == 1:
        key = rng.choice([str(path[-1]) for path in paths_of(json.loads(text))])
        return text.replace(f'"{key}":', f'"{key}": {json.dumps(rng.choice(ODD))}, "{key}":', 1).encode()
    depth = 100_000
    return rng.choice(
        [
            b"[" * depth,
            b'{"a":' * depth,
            text.encode("utf-16"),
            b"\xef\xbb\xbf" + text.encode(),
            b"NaN",
            b'"text"',
            b"\xff\xfe",
        ]
    )


def an_image(rng: random.Random) -> bytes:
    """An encoded image of a usual or an unusual kind."""
    mode = rng.choice(["RGB", "RGB", "L", "CMYK", "RGBA", "P", "I;16", "1", "LA"])
    size = rng.choice([(40, 30), (32, 32), (1, 1), (1, 20_000), (20_000, 1), (3, 500)])
    image = PIL.Image.new(mode, size)
    if mode in ("RGB", "L", "RGBA"):
        image.putdata(
            [tuple(rng.randrange(256) for _ in mode) if len(mode) > 1 else 9 for _ in range(min(900, size[0] * size[1]))]
        )
    kinds = {"CMYK": ["JPEG", "TIFF"], "RGB": ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"], "L": ["JPEG", "PNG", "BMP"]}
    kind, options = rng.choice(kinds.get(mode, ["PNG", "TIFF"])), {}
    if kind in ("JPEG", "PNG", "WEBP") and rng.randrange(3) == 0:
        exif = PIL.Image.Exif()
        exif[0x0112] = rng.choice([1, 3, 6, 8, 9, 99])
        options["exif"] = exif
    if kind in ("GIF", "WEBP") and rng.randrange(2):
        options |= {"save_all": True, "append_images": [image, image]}
    out = io.BytesIO()
    if kind == "WEBP" and max(size) > 16_383:
        kind = "PNG"
        options = {}
    image.save(out, kind, **options)
    return out.getvalue()


def bomb(rng: random.Random) -> bytes:
    """A PNG that says it is huge."""
    import zlib

    width, height = rng.choice([(2**31 - 1, 2**31 - 1), (100_000, 100_000), (1, 2**30), (20_000, 20_000), (0, 5)])
    header = struct.pack(">IIBBBBB", width, height, 8, rng.choice([0, 2, 6]), 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(10_000))), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n"
    for name, content in chunks:
        data += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return data


# ---------------------------------------------------------------------------------------------------------------------
# The kinds: `__init__(folder)` makes what is right, `case(rng, place)` changes it and returns what reads it.


class ModelFolder:
    """A saved model, with checksums: what loads must be what was saved."""

    configs = (tiny_models.TOKENIZER, tiny_models.GENERATOR, tiny_models.VAE, VQGAN)
    weight = 20

    def __init__(self, folder: pathlib.Path):
        self.folders = [folder / str(number) for number in range(len(self.configs))]
        for place, config in zip(self.folders, self.configs, strict=True):
            self.write(place, config)

    def write(self, place, config):
        tiny_models.save(place, config, tokenizer=None)

    def case(self, rng, place):
        number = rng.randrange(len(self.configs))
        config = self.configs[number]
        shutil.copytree(self.folders[number], place)
        other = self.folders[rng.randrange(len(self.configs))]
        weights = self.weights(place)
        way = rng.randrange(10)
        if way < 5:
            file = place / "config.json"
            file.write_bytes(mutate_json(rng, file.read_text()))
        elif way < 7:
            weights.write_bytes(mutate_bytes(rng, weights.read_bytes()))
        elif way < 9:
            self.change_header(rng, weights)
        else:
            shutil.copy(*rng.choice([(other / "config.json", place), (self.weights(other), weights)]))
        kind = rng.choice([type(config)] * 5 + [TiTokConfig, GeneratorConfig, MaskgitVQGANConfig])

        def read():
            found, params = pretrained.load(str(place), kind)
            same = models.family_of(found).name == models.family_of(config).name
            sizes = {k: v for k, v in vars(found).items() if k != "sampling"}
            same = same and sizes == {k: v for k, v in vars(config).items() if k != "sampling"}
            ours, theirs = convert.flatten(tiny_models.params(config)), convert.flatten(params)
            same = same and ours.keys() == theirs.keys() and all(np.array_equal(ours[n], theirs[n]) for n in ours)
            if not same and self.knows:
                raise AssertionError(f"loaded though wrong: {found}")

        return read

    knows = True  # the folder has checksums

    def weights(self, folder):
        return folder / "model.safetensors"

    def change_header(self, rng, file):
        data = file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = mutate_json(rng, data[8 : 8 + length].decode())
        file.write_bytes(struct.pack("<Q", rng.choice([len(header)] * 5 + [2**63, 0])) + header + data[8 + length :])


class ForeignFolder(ModelFolder):
    """The same without checksums, as the safetensors library writes it: numbers may be wrong, but nothing breaks."""

    knows = False
    weight = 12

    def write(self, place, config):
        tiny_models.save(place, config, tokenizer=None)
        file = place / "model.safetensors"
        data = file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__")
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


class FlaxFile(ModelFolder):
    """The published form of the MaskGIT-VQGAN: a msgpack file."""

    configs = (VQGAN,)
    knows = False
    weight = 6

    def write(self, place, config):
        place.mkdir(parents=True)
        tree: dict = {}
        for path, array in convert.flatten(tiny_models.params(config)).items():
            node = tree
            *above, last = path.split("/")
            for key in above:
                node = node.setdefault(key, {})
            node[last] = array
        write_flax(place / "weights.msgpack", {"params": tree})
        (place / "config.json").write_text("{}")

    def weights(self, folder):
        return folder / "weights.msgpack"

    def change_header(self, rng, file):
        file.write_bytes(mutate_bytes(rng, file.read_bytes()))

    def case(self, rng, place):
        shutil.copytree(self.folders[0], place)
        file = self.weights(place)
        file.write_bytes(mutate_bytes(rng, file.read_bytes()))
        return lambda: pretrained.load(str(file), MaskgitVQGANConfig)


class Recipe:
    """A recipe with one to three flags of odd values."""

    weight = 12
    names = ("digits:smoke_tokenizer", "digits:smoke_generator", "single_stage:bl64_vq8k", "stage1:smoke", "generator:b64")

    def __init__(self, folder):
        self.fields = {name: list(self.walk(read_config(name, []))) for name in self.names}

    def walk(self, config, prefix="config"):
        for key, value in config.items():
            if hasattr(value, "items"):
                yield from self.walk(value, f"{prefix}.{key}")
            else:
                yield f"{prefix}.{key}"

    def case(self, rng, place):
        name = rng.choice(self.names)
        odd = [str(value) for value in ODD] + ["10**12", "1e18", "-0.0", "()", "(1,2)", "None", "true", "1_000_000_000_000"]
        flags = [f"--{rng.choice(self.fields[name])}={rng.choice(odd)}" for _ in range(rng.choice([1, 1, 2, 3]))]
        return lambda: parse_settings(read_config(name, flags))


class Tokens:
    """Token records: ArrayRecord and JSON lines."""

    weight = 14

    def __init__(self, folder):
        folder.mkdir()
        self.files = [folder / "t.array_record", folder / "t.jsonl"]
        for file in self.files:
            with token_writer(file) as write:
                for number in range(12):
                    write(np.arange(8) + number, number % 10)

    def case(self, rng, place):
        place.mkdir()
        file = rng.choice(self.files)
        changed = place / file.name
        if file.suffix == ".jsonl" and rng.randrange(2):
            lines = file.read_text().splitlines()
            at = rng.randrange(len(lines))
            lines[at] = mutate_json(rng, lines[at]).decode(errors="surrogateescape")
            changed.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
        else:
            changed.write_bytes(mutate_bytes(rng, file.read_bytes()))

        def read():
            source = CheckedSource(make_source({"name": "tokens", "paths": str(changed)}), Limits(10, 8, 32))
            for number in range(len(source)):
                source[number]

        return read


class Archive:
    """A tar of images and classes, with members of every kind."""

    weight = 12

    def __init__(self, folder):
        folder.mkdir()
        self.file = folder / "a.tar"
        self.image = an_image(random.Random(1))
        with tar_writer(self.file) as write:
            for number in range(4):
                write(self.image, number)

    def case(self, rng, place):
        place.mkdir()
        changed = place / "a.tar"
        if rng.randrange(2):
            changed.write_bytes(mutate_bytes(rng, self.file.read_bytes()))
        else:
            with tarfile.open(changed, "w", format=rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])) as tar:
                for number in range(rng.randrange(1, 5)):
                    self.add(rng, tar, f"k{number}", place)

        def read():
            source = make_source({"name": "webdataset", "paths": str(changed)})
            for number in range(len(source)):
                source[number]
            outside = [p for p in place.parent.rglob("*") if p.is_file() and p.name == "escaped.jpg"]
            assert not outside, outside

        return read

    def add(self, rng, tar, key, place):
        names = [
            f"{key}.jpg",
            f"{key}.jpg",
            f"../{key}/escaped.jpg",
            "/tmp/escaped.jpg",
            f"a/{key}.png",
            ".hidden.jpg",
            "k0.jpg",
            "x" * 300 + ".jpg",
        ]
        member = tarfile.TarInfo(rng.choice(names))
        kind = rng.randrange(8)
        content = self.image
        if kind == 0:
            member.type, member.linkname = rng.choice([tarfile.SYMTYPE, tarfile.LNKTYPE]), "/etc/passwd"
        elif kind == 1:
            member.type = rng.choice(
                [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.GNUTYPE_SPARSE]
            )
        elif kind == 2:
            content = mutate_bytes(rng, content)
        if kind not in (0, 1):
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        else:
            tar.addfile(member)
        if rng.randrange(4):
            text = rng.choice([b"3", b"-1", b"", b"x", b"9" * 5000, b"99999999999999999999", b"1.5", b" 7 \n"])
            label = tarfile.TarInfo(f"{key}.cls")
            label.size = len(text)
            tar.addfile(label, io.BytesIO(text))


class Images:
    """Encoded images, usual and unusual, whole and damaged; decoded and cropped as everywhere."""

    weight = 14

    def __init__(self, folder):
        pass

    def case(self, rng, place):
        data = bomb(rng) if rng.randrange(8) == 0 else an_image(rng)
        if rng.randrange(2):
            data = mutate_bytes(rng, data)
        crop = rng.choice(
            [
                transforms.center_crop_adm,
                transforms.center_crop_torchvision,
                lambda image, size: transforms.ten_crop(image, size),
            ]
        )

        def read():
            image = transforms.decode_image(data)
            assert image.dtype == np.uint8
            assert image.ndim == 3
            out = crop(image, 32)
            assert out.shape[-3:] == (32, 32, 3)

        return read


class Arrays:
    """.npz files: images, reference statistics, pieces of a job and their settings."""

    weight = 12

    def __init__(self, folder):
        folder.mkdir()
        rng = np.random.default_rng(0)
        np.savez(folder / "images.npz", arr_0=rng.integers(0, 255, (4, 8, 8, 3)).astype(np.uint8), labels=np.arange(4))
        about = {"image_size": 8, "network": "net", "source": "x", "num_images": 4, "crop": "adm"}
        np.savez(
            folder / "reference.npz",
            network="net",
            mu=np.zeros(3),
            sigma=np.eye(3),
            count=4,
            neighbourhoods=np.zeros((2, 3)),
            about=json.dumps(about),
        )
        self.files = [folder / "images.npz", folder / "reference.npz"]
        self.shards = folder / "shards"
        Shards(self.shards, {"seed": 0}, 4, 2).write(0, images=np.zeros((2, 4)))

    def case(self, rng, place):
        if rng.randrange(3) == 0:
            shutil.copytree(self.shards, place)
            file = place / rng.choice(["settings.json", "00000.npz"])
            text = file.read_bytes()
            file.write_bytes(mutate_json(rng, text.decode()) if file.suffix == ".json" else mutate_bytes(rng, text))
            return lambda: Shards(place, {"seed": 0}, 4, 2).read(0)
        place.mkdir()
        file = rng.choice(self.files)
        changed = place / file.name
        if rng.randrange(2):
            changed.write_bytes(mutate_bytes(rng, file.read_bytes()))
        else:
            self.rewrite(rng, file, changed)

        def read():
            if file.name == "images.npz":
                images = NpzImages(changed)
                images.read(slice(0, min(2, len(images))))
            read_reference(changed, "net", 8)

        return read

    def rewrite(self, rng, file, changed):
        """The same members, one with another header, content, compression or name."""
        with zipfile.ZipFile(file) as old, zipfile.ZipFile(changed, "w") as new:
            names = old.namelist()
            which = rng.choice(names)
            for name in names:
                data = old.read(name)
                method = zipfile.ZIP_STORED
                if name == which:
                    method = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
                    way = rng.randrange(5)
                    if way == 0:
                        data = mutate_bytes(rng, data)
                    elif way == 1:
                        shape = rng.choice(
                            [(10**12,), (10**10, 8, 8, 3), (0, 8, 8, 3), (4, 8, 9, 3), (-1,), (2**40, 2**40), ()]
                        )
                        header = {"descr": rng.choice(["|u1", "<f8", "|O", "<U9"]), "fortran_order": False, "shape": shape}
                        out = io.BytesIO()
                        with contextlib.suppress(ValueError):
                            np.lib.format.write_array_header_1_0(out, header)
                        data = out.getvalue() + data[-96:]
                    elif way == 2:
                        name = rng.choice(["x.npy", "about", "../arr_0.npy", "labels.npy"])
                    elif way == 3:
                        about = json.dumps(mutate_tree(rng, {"about": {"image_size": 8, "num_images": 4}}))
                        out = io.BytesIO()
                        np.save(out, np.asarray(about))
                        data = out.getvalue()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    new.writestr(name, data, method)


class Table:
    """A Parquet file of images and classes."""

    weight = 6

    def __init__(self, folder):
        folder.mkdir()
        self.file = folder / "t.parquet"
        image = an_image(random.Random(1))
        rows = {"image": [{"bytes": image, "path": f"{n}.jpg"} for n in range(6)], "label": list(range(6))}
        pyarrow.parquet.write_table(pyarrow.table(rows), self.file, row_group_size=3)

    def case(self, rng, place):
        place.mkdir()
        changed = place / self.file.name
        changed.write_bytes(mutate_bytes(rng, self.file.read_bytes()))

        def read():
            source = make_source({"name": "parquet", "paths": str(changed)})
            for number in range(min(len(source), 100)):
                source[number]

        return read


class Checkpoint:
    """The checkpoint of a run: what is restored must be what was saved, or nothing is."""

    weight = 3

    def __init__(self, folder):
        folder.mkdir()
        self.folder, self.state = folder / "checkpoints", {"w": np.arange(4096.0, dtype=np.float32), "step": np.int32(3)}
        with Checkpoints(self.folder) as checkpoints:
            checkpoints.save(3, jax.tree.map(jax.numpy.asarray, self.state), {"seed": 0, "model": {"width": 3}})
        abstract = jax.eval_shape(lambda: self.state)
        self.target = abstract, sharding.state_shardings(sharding.make_mesh(), abstract)

    def case(self, rng, place):
        shutil.copytree(self.folder, place)
        files = sorted(path for path in place.rglob("*") if path.is_file())
        file = rng.choice(files)
        way = rng.randrange(6)
        if way == 0:
            file.unlink()
        elif way < 3 and file.read_bytes()[:1] == b"{":
            file.write_bytes(mutate_json(rng, file.read_text()))
        else:
            file.write_bytes(mutate_bytes(rng, file.read_bytes()))

        def read():
            with Checkpoints(place) as checkpoints:
                found = checkpoints.restore_newest(*self.target, lambda step, config: None)
            if found is None:
                return
            for name, array in self.state.items():
                assert np.array_equal(found[1][name], array), "restored though wrong"

        return read


class Notes:
    """metrics.jsonl of a workdir."""

    weight = 6

    def __init__(self, folder):
        folder.mkdir()
        self.text = "".join(json.dumps({"step": step, "loss": 1.0 / step, "eval/psnr": None}) + "\n" for step in range(1, 6))

    def case(self, rng, place):
        place.mkdir()
        lines = self.text.splitlines()
        at = rng.randrange(len(lines))
        lines[at] = mutate_json(rng, lines[at]).decode(errors="replace")
        (place / "metrics.jsonl").write_text("\n".join(lines), errors="replace")

        def read():
            log = MetricLog(LogFolder(epath.Path(place)), first_step=4, num_steps=9)
            log.close()

        return read


KINDS = {
    kind.__name__: kind
    for kind in (ModelFolder, ForeignFolder, FlaxFile, Recipe, Tokens, Archive, Images, Arrays, Table, Checkpoint, Notes)
}


# ---------------------------------------------------------------------------------------------------------------------


class TooSlow(BaseException):
    """More than SECONDS; no `except Exception` catches it."""


def run_case(kind, name: str, number: int, seed: int, folder: pathlib.Path) -> str:
    """Runs one case. Returns "accepted", "refused" or what went wrong."""
    rng = random.Random(f"{seed} {name} {number}")
    place = folder / "case"
    shutil.rmtree(place, ignore_errors=True)
    read = kind.case(rng, place)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        read()
        return "accepted"
    except (ValueError, OSError) as error:
        said = printable(str(error))  # as commands print it
        if len(said) > 4000:
            return f"a message of {len(said)} characters"
        return "refused"
    except TooSlow:
        return f"longer than {SECONDS} s"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]} ({pathlib.Path(where.filename).name}:{where.lineno})"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="cases in all (default 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=list(KINDS), help="only this kind")
    parser.add_argument("--number", type=int, help="only this case of --kind; its exception is not caught")
    args = parser.parse_args()

    def late(*_):
        raise TooSlow

    signal.signal(signal.SIGALRM, late)
    warnings.simplefilter("ignore")
    quiet_checkpointing()
    kinds = {args.kind: KINDS[args.kind]} if args.kind else KINDS
    total = sum(kind.weight for kind in kinds.values())
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        if args.number is not None:
            kind, place = KINDS[args.kind](pathlib.Path(folder) / args.kind), pathlib.Path(folder) / "case"
            print(kind.case(random.Random(f"{args.seed} {args.kind} {args.number}"), place)())
            return 0
        failed = False
        for name, make in kinds.items():
            child = os.fork()  # of its own for each kind, so that the memory of one does not count for the next
            if not child:
                try:
                    os._exit(run_kind(name, round(args.count * make.weight / total), args.seed, pathlib.Path(folder)))
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
            failed |= os.waitpid(child, 0)[1] != 0
    return int(failed)


def run_kind(name: str, count: int, seed: int, folder: pathlib.Path) -> int:
    """Runs the cases of one kind and prints their counts. Returns 1 if any failed."""
    jax.devices()
    size = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    kind, counts, wrong = KINDS[name](folder / name), collections.Counter(), {}
    with open(os.devnull, "w") as nowhere:
        for number in range(count):
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                found = run_case(kind, name, number, seed, folder)
            counts[found if found in ("accepted", "refused") else "wrong"] += 1
            if found not in ("accepted", "refused"):
                wrong.setdefault(found, []).append(number)
    print(json.dumps({"kind": name, **counts}), flush=True)
    for found, numbers in wrong.items():
        print(f"  {len(numbers)} x {found}; cases {numbers[:3]}", flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
