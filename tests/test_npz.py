"""Files of arrays from elsewhere: what is wrong with one is a sentence that names it, before memory or minutes are spent."""

import io
import json
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest

from titok_jax.evaluation import image_sources, metrics, references
from titok_jax.runtime.npz import NpzFile
from titok_jax.runtime.shards import Shards

IMAGES = np.arange(4 * 5 * 5 * 3, dtype=np.uint8).reshape(4, 5, 5, 3)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def header(shape, descr="|u1") -> bytes:
    """An array that is only claimed."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


def packed(method: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return file.getvalue()


def changed(data: bytes, local: int, central: int, value: int) -> bytes:
    """An archive of one member with a byte changed in both of its headers."""
    data = bytearray(data)
    data[local] = data[data.rindex(b"PK\1\2") + central] = value
    return bytes(data)


def claiming(size: int) -> bytes:
    """An archive whose member claims more bytes than its compressed data can hold."""
    data = bytearray(packed(zipfile.ZIP_DEFLATED, arr_0=npy(IMAGES)))
    place = data.rindex(b"PK\1\2") + 24
    data[place : place + 4] = size.to_bytes(4, "little")
    return bytes(data)


GOOD = npy(IMAGES)
DEFLATED = packed(zipfile.ZIP_DEFLATED, arr_0=GOOD)
BAD_IMAGES = {
    "one array": (GOOD, "it is a single array, as in .npy files"),
    "text": (b"no archive", "File is not a zip file"),
    "empty file": (b"", "File is not a zip file"),
    "no images": (packed(a=GOOD, b=GOOD), "it holds a, b, expected arr_0"),
    "no members": (packed(), "it holds nothing, expected arr_0"),
    "more than there are": (
        packed(arr_0=header((10**10, 32, 32, 3))),
        "claims to be uint8 [10000000000, 32, 32, 3] of 30,720,",
    ),
    "overflow": (packed(arr_0=header((2**40, 2**40, 2**40, 3))), "claims to be"),
    "negative": (packed(arr_0=header((-4, 5, 5, 3)) + GOOD[128:]), "claims to be uint8 [-4, 5, 5, 3]"),
    "fewer than there are": (packed(arr_0=header((3, 5, 5, 3)) + GOOD[128:]), "of 225 bytes, but has 300"),
    "of nothing": (packed(arr_0=header((10**12,), "|V0")), "claims to be |V0"),
    "deflate bomb": (claiming(2**31), "arr_0 claims 2,147,483,648 bytes, more than"),
    "encrypted": (changed(packed(arr_0=GOOD), 6, 8, 1), "arr_0 is encrypted"),
    "bzip2": (packed(zipfile.ZIP_BZIP2, arr_0=GOOD), "arr_0 is compressed by method 12, expected none or DEFLATE"),
    "lzma": (packed(zipfile.ZIP_LZMA, arr_0=GOOD), "arr_0 is compressed by method 14"),
    "unknown method": (changed(packed(arr_0=GOOD), 8, 10, 99), "arr_0 is compressed by method 99"),
    "damaged deflate": (DEFLATED[:45] + b"\xff" * 15 + DEFLATED[60:], "Error -3 while decompressing"),
    "damaged header": (packed(arr_0=GOOD[:20] + b"(" * 30 + GOOD[50:]), ""),
    "deep header": (packed(arr_0=GOOD[:10] + b"[" * 110 + GOOD[120:]), ""),
    "other version": (packed(arr_0=GOOD[:6] + b"\3" + GOOD[7:]), "arr_0 is of version (3, 0)"),
    "objects": (packed(arr_0=npy(np.array([{}], object))), "arr_0 holds Python objects, which are not loaded"),
    "zero images": (packed(arr_0=npy(IMAGES[:0])), "arr_0 is [0, 5, 5, 3], no image at all"),
    "zero pixels": (packed(arr_0=npy(IMAGES[:, :0, :0])), "arr_0 is [4, 0, 0, 3], no image at all"),
    "grey": (packed(arr_0=npy(IMAGES[..., 0])), "arr_0 is uint8 [4, 5, 5], expected uint8 [n, size, size, 3]"),
    "names as labels": (
        packed(arr_0=GOOD, labels=npy(np.array(list("abcd")))),
        "labels is <U1 [4], expected whole numbers [4]",
    ),
    "few labels": (packed(arr_0=GOOD, labels=npy(np.arange(3))), "labels is int64 [3], expected whole numbers [4]"),
    "large labels": (packed(arr_0=GOOD, labels=npy(np.array([1, 2**31, 2, 3]))), "label 2147483648, expected a class index"),
    "endless labels": (packed(arr_0=GOOD, labels=header((10**12,), "<i8")), "labels claims to be int64 [1000000000000]"),
}


@pytest.mark.parametrize(("data", "reason"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_images(data, reason, tmp_path):
    (tmp_path / "a.npz").write_bytes(data)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"^/.*a\.npz(:| is no \.npz file that can be read:) .") as error:
        image_sources.NpzImages(tmp_path / "a.npz").read(slice(0, 4))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_the_same_name_twice(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            for _ in range(2):
                archive.writestr("arr_0.npy", GOOD)
    with pytest.raises(ValueError, match="it holds arr_0 twice"):
        image_sources.NpzImages(tmp_path / "a.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_writes_is_read(save, tmp_path):
    arrays = {
        "a": np.arange(6.0).reshape(2, 3),
        "b": np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3)),
        "c": np.array(7),
        "d": np.array("text äß"),
        "e": np.zeros((0, 3), np.float32),
        "f": np.array([True, False]),
    }
    save(tmp_path / "a.npz", **arrays)
    with NpzFile(tmp_path / "a.npz") as file:
        assert file.names == tuple("abcdef")
        for name, array in arrays.items():
            found = file.read(name)
            assert (found.dtype, found.shape) == (array.dtype, array.shape)
            np.testing.assert_array_equal(found, array)
        assert file.text("d", 100) == "text äß"
        with pytest.raises(ValueError, match="d has 28 bytes, expected at most 27"):
            file.text("d", 27)
        with pytest.raises(ValueError, match="a is float64 \\[2, 3\\], expected a text"):
            file.text("a", 100)


def saved(path, **changes):
    """A reference as `Reference.save` writes it, with other arrays; None: without."""
    values = np.random.default_rng(0).random((9, 6))
    stats = metrics.FeatureStatistics(6, "n").update(values)
    about = {"image_size": 5, "num_images": 9, "network": "n"}
    references.Reference(stats, None, values.astype(np.float32), about).save(path, replace=False)
    with np.load(path) as file:
        arrays = dict(file) | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


BAD_REFERENCES = {
    "about is a list": ({"about": "[1]"}, "its entry about is not what --save-reference writes"),
    "about is empty": ({"about": "{}"}, "its entry about is not"),
    "about is no JSON": ({"about": "{"}, "its entry about is not"),
    "about is nested": ({"about": "[" * 50_000}, "its entry about is not"),
    "about has a text for a size": ({"about": '{"image_size": "5"}'}, "its entry about is not"),
    "about has no number": ({"about": '{"image_size": 5, "num_images": "x"}'}, "its entry about is not"),
    "about is an array": ({"about": np.zeros(3)}, "its entry about is not"),
    "about is long": ({"about": "x" * 2**19}, "its entry about is not"),
    "another network": (
        {"about": '{"image_size": 5, "network": "m"}'},
        "its entry about is not",
    ),
    "no neighbourhoods": ({"neighbourhoods": None}, "expected neighbourhoods"),
    "other neighbourhoods": (
        {"neighbourhoods": np.zeros((9, 5))},
        "neighbourhoods is float64 [9, 5], expected finite floats [m, 6]",
    ),
    "texts": ({"neighbourhoods": np.array(["x"])}, "neighbourhoods is <U1 [1], expected finite floats"),
    "not finite": ({"neighbourhoods": np.full((9, 6), np.nan)}, "expected finite floats [m, 6]"),
    "no statistics": ({"mu": None}, "holds no mu"),
    "several counts": ({"count": np.arange(3)}, "count is int64 [3], expected one whole number"),
    "a count that is a text": ({"count": "9"}, "count is <U1 [], expected one whole number"),
    "two networks": ({"network": np.array(["a", "b"])}, "network is <U1 [2], expected a text"),
}


@pytest.mark.parametrize(("changes", "reason"), BAD_REFERENCES.values(), ids=BAD_REFERENCES)
def test_references(changes, reason, tmp_path):
    path = saved(tmp_path / "a.npz", **changes)
    with pytest.raises(ValueError, match=r"^/.*a\.npz") as error:
        references.read_reference(path, "n", 5)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_reference_knows_its_network(tmp_path):
    path = saved(tmp_path / "a.npz")
    found = references.read_reference(path, "n", 5)
    assert found.about == {"image_size": 5, "num_images": 9, "network": "n"}
    for other in ("m", "digits"):
        with pytest.raises(ValueError, match=f"holds features of n, but this evaluation is in those of {other}"):
            references.read_reference(path, other, 5)
    # A file with images and statistics, as ADM's are, may name the network too.
    np.savez(tmp_path / "b.npz", IMAGES, mu=np.zeros(6), sigma=np.eye(6), network="m")
    with pytest.raises(ValueError, match="holds features of m, but this evaluation is in those of n"):
        references.read_reference(tmp_path / "b.npz", "n", 5)
    np.savez(tmp_path / "b.npz", IMAGES, mu=np.zeros(6), sigma=np.eye(6))
    assert len(references.read_reference(tmp_path / "b.npz", "n", 5)) == 4


def test_statistics_are_not_larger_than_any_network_gives(tmp_path, monkeypatch):
    """A megabyte of compressed zeros would be a gigabyte of statistics, and several in float64."""
    monkeypatch.setattr("titok_jax.runtime.npz.NpzFile.read.__defaults__", (1000,))
    np.savez_compressed(tmp_path / "a.npz", mu=np.zeros(12), sigma=np.zeros((12, 12)))
    with pytest.raises(ValueError, match="sigma has 1,152 bytes, expected at most 1,000"):
        metrics.FeatureStatistics.load(tmp_path / "a.npz")


def test_pieces_of_a_job(tmp_path):
    with pytest.raises(ValueError, match=r"s: 0 items in pieces of 4, expected at least 1: there is nothing to make"):
        Shards(tmp_path / "s", {}, 0, 4)
    shards = Shards(tmp_path / "s", {}, 4, 4)
    shards.write(0, x=np.arange(3))
    for data in (GOOD, b"", packed(x=header((10**12,))), changed(packed(x=GOOD), 6, 8, 1)):
        (tmp_path / "s" / "00000.npz").write_bytes(data)
        with pytest.raises(
            ValueError, match=r"00000\.npz is damaged \(.+\); remove it, and the same command makes it again"
        ):
            shards.read(0)


def test_about_is_kept(tmp_path):
    values = np.random.default_rng(0).random((9, 6))
    stats = metrics.FeatureStatistics(6, "n").update(values)
    about = {"source": "x", "image_size": 5, "num_images": None, "crop": "adm"}
    references.Reference(stats, stats, values.astype(np.float32), about).save(tmp_path / "a.npz", replace=False)
    found = references.read_reference(tmp_path / "a.npz", "n", 5)
    assert found.about == json.loads(json.dumps(about)) | {"network": "n"}
    assert found.spatial.dim == 6
