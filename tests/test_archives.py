"""Tars that strangers made: what they say about themselves is not believed, and nothing in them is followed or unpacked."""

import gzip
import pathlib
import random
import re
import tarfile

import pytest
import test_data

from titok_jax.data.webdataset import WebDatasetSource

TOOL = pathlib.Path(__file__).parents[1] / "tools" / "prepare_imagenet.py"
IMAGE = test_data.encoded(0)


def member(name, data=b"", size=None, kind=tarfile.REGTYPE, form=tarfile.GNU_FORMAT, **fields):
    """The bytes of a file in a tar; `size` is what its header claims."""
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data) if size is None else size, kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(form, errors="surrogateescape") + data + bytes(-len(data) % 512)


def raw_size(data, size):
    """The header with other bytes for the size, and the right checksum."""
    head = bytearray(data[:512])
    head[124:136] = size
    head[148:156] = b"%06o\0 " % (sum(head[:148]) + 8 * 32 + sum(head[156:]))
    return bytes(head) + data[512:]


def sparse_pax(version):
    """A sparse file of 1 TB with a few bytes, as GNU tar writes it in the pax format."""
    headers = {"GNU.sparse.realsize": str(10**12), "GNU.sparse.size": str(10**12)}
    if version == 1:
        headers |= {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.png"}
        data = b"1\n0\n100\n".ljust(512, b"\0") + bytes(100)
        return member("GNUSparseFile.0/a.png", data, form=tarfile.PAX_FORMAT, pax_headers=headers)
    headers |= {"GNU.sparse.map": f"0,{len(IMAGE)}", "GNU.sparse.numblocks": "1"}
    return member("a.png", IMAGE, form=tarfile.PAX_FORMAT, pax_headers=headers)


END = bytes(1024)
GOOD = member("a.png", IMAGE) + member("a.cls", b"3")
LONG = "x" * 10_000
LABELLED = member("b.png", IMAGE)
HOSTILE = {
    "sparse, old": (member("a.png", IMAGE, kind=tarfile.GNUTYPE_SPARSE), r"a\.png is sparse"),
    "sparse, pax 0.1": (sparse_pax(0), r"a\.png is sparse"),
    "sparse, pax 1.0": (sparse_pax(1), r"a\.png is sparse"),
    "larger than the tar": (GOOD + member("b.png", IMAGE, size=10**9), r"unexpected end of data: something .* 1,000,0"),
    "larger than any file": (GOOD + member("b.png", IMAGE, size=2**80), r"unexpected end of data"),
    "negative size": (GOOD + raw_size(member("b.png", IMAGE), b"\xff" * 10 + b"\0\0"), r"b\.png is sparse or has no size"),
    "negative size, pax": (
        GOOD + member("b.png", IMAGE, form=tarfile.PAX_FORMAT, pax_headers={"size": "-1024"}),
        r"b\.png is sparse or has no size",
    ),
    "a name of a terabyte": (member("a", size=10**12, kind=b"L") + GOOD, r"header of 1,000,000,000,\d+ bytes"),
    "attributes of a terabyte": (member("a", size=10**12, kind=b"x") + GOOD, r"header of 1,000,000,000,\d+ bytes"),
    "names of names": (member("a", b"name\0", kind=b"L") * 3000 + GOOD, r"damaged at byte .*: maximum recursion"),
    "a label of a gigabyte": (LABELLED + member("b.cls", size=2**30), r"b\.cls has 1,073,741,824 bytes"),
    "a label of 33 bytes": (LABELLED + member("b.cls", b"1".rjust(33)), r"b\.cls has 33 bytes, at most 32"),
    "a label beyond int32": (LABELLED + member("b.cls", b"2147483648"), r"b\.cls holds '2147483648', expected"),
    "a label of 32 digits": (LABELLED + member("b.cls", b"9" * 32), r"b\.cls holds '9{32}', expected a class"),
    "a label that is none": (LABELLED + member("b.cls", b"1_0"), r"b\.cls holds '1_0', expected a class"),
    "one name twice": (GOOD + member("a.png", IMAGE), r"a\.png is the second image of its sample"),
    "two images": (GOOD + member("a.jpg", IMAGE), r"a\.jpg is the second image of its sample"),
    "two labels": (GOOD + member("a.cls", b"4"), r"a\.cls is the second label of its sample"),
    "only links": (member("a.png", kind=tarfile.SYMTYPE, linkname="/etc/passwd"), r"empty; expected KEY\.jpg"),
    "a long name": (member(f"{LONG}.cls", b"1"), r"the first is x{200}; expected KEY\.jpg"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_tar_claims_is_not_believed(name, tmp_path):
    data, message = HOSTILE[name]
    (tmp_path / "x.tar").write_bytes(data + END)
    with pytest.raises(ValueError, match=rf"x\.tar: .*({message})") as error:
        WebDatasetSource(tmp_path / "x.tar")
    assert len(str(error.value)) < 500
    (tmp_path / "good.tar").write_bytes(GOOD + END)
    both = WebDatasetSource([tmp_path / "x.tar", tmp_path / "good.tar"], skip_damaged=True)
    assert both[0]["label"] == 3
    assert len(both.damaged) == 1


def test_nothing_in_a_tar_is_followed_or_unpacked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.png").write_bytes(b"secret")
    data = b"".join(
        [
            member("../../up.png", IMAGE),
            member("/absolute.png", IMAGE),
            *(member(f"l{kind!r}.png", kind=kind, linkname="b.png") for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE)),
            *(member(f"d{kind!r}.png", kind=kind) for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)),
            member("folder.png", kind=tarfile.DIRTYPE),
            member("esc\x1b[2J\n\udcff.png", IMAGE),
            member("esc\x1b[2J\n\udcff.cls", b"no"),
            END,
        ]
    )
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(r"esc\x1b[2J\n\udcff.cls holds 'no'")):
        WebDatasetSource("x.tar")
    (tmp_path / "x.tar").write_bytes(data.replace(b"no" + bytes(510), b"7 " + bytes(510)))
    source = WebDatasetSource("x.tar")
    assert [int(source[i]["label"]) for i in range(len(source))] == [-1, -1, 7]
    assert [source.encoded(i)[0] for i in range(3)] == [IMAGE] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.png", "x.tar"]


def test_any_damage_of_headers_is_one_kind_of_error(tmp_path):
    """Seeded changes of headers, most with the right checksum."""
    rng, path = random.Random(0), tmp_path / "x.tar"
    forms = [sparse_pax(1) + END]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        names = {"é" * 120 + f"{i}.{end}": data for i in range(2) for end, data in (("jpg", IMAGE), ("cls", b"1"))}
        files = [member(name, data, form=form) for name, data in names.items()]
        forms.append(b"".join([*files, member("../x", kind=tarfile.SYMTYPE, linkname="/"), END]))
    sizes = [b"\xff" * 12, b"\x80" + b"\0" * 3 + b"\x7f" * 8, b"77777777777\0", b"-0000000100\0", b"\0" * 12]
    read = 0
    for _ in range(1000):
        data = bytearray(rng.choice(forms))
        heads = [place for place in range(0, len(data), 512) if data[place + 257 : place + 262] == b"ustar"]
        for place in rng.choices(heads, k=rng.randint(1, 3)):
            change = rng.randrange(4)
            if change == 0:
                data[place + 124 : place + 136] = rng.choice(sizes)
            elif change == 1:
                data[place + 156] = rng.choice(b"01234567SLKxgVMDN\0")
            elif change == 2:
                data[place + rng.randrange(512)] = rng.randrange(256)
            else:
                data[rng.randrange(len(data))] = rng.randrange(256)
            if rng.random() < 0.8:
                head = bytes(data[place : place + 512])
                data[place : place + 512] = raw_size(head, head[124:136])
        path.write_bytes(data if rng.random() < 0.8 else data[: rng.randrange(len(data))])
        try:
            WebDatasetSource(path)
            read += 1
        except ValueError as error:
            assert str(error).startswith(str(path))  # noqa: PT017
    assert 20 < read < 500


def test_the_kit_of_imagenet_is_bounded(tool, tmp_path):
    """Archives of ImageNet, the command's own kinds of input."""
    kit = tmp_path / "kit.tar.gz"
    kit.write_bytes(gzip.compress(member("meta.mat", bytes(2**21)) + END))
    with pytest.raises(ValueError, match=r"kit\.tar\.gz: holds no meta\.mat"):
        tool.read_devkit(kit)
    with gzip.open(kit, "wb", compresslevel=1) as file:  # 100 MB of nothing
        file.write(member("a", size=10**8)[:512] + bytes(10**8))
    with pytest.raises(ValueError, match=r"kit\.tar\.gz: unexpected end of data: something in it ends at byte 100,"):
        tool.read_devkit(kit)
    kit.write_bytes(b"text")
    with pytest.raises(ValueError, match=r"kit\.tar\.gz: .*; is it complete\?"):
        tool.read_devkit(kit)
    inner = member("n01440764_1.JPEG", IMAGE) + member("n01440764_2.JPEG", IMAGE, size=5000)
    (tmp_path / "train.tar").write_bytes(member("n01440764.tar", inner) + member("n01440765.tar", IMAGE * 100) + END)
    with pytest.raises(ValueError, match=r"train\.tar, n01440764\.tar: unexpected end of data: something in it"):
        tool.train_archive(tmp_path / "train.tar")
