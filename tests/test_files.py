"""Files that a user names by paths, globs and braces."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import test_data

from titok_jax.data import records, sources
from titok_jax.data.files import check_complete, find_files


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("t-{0000..0002}.tar", ["t-0000.tar", "t-0001.tar", "t-0002.tar"]),
        ("t-{8..10}.tar", ["t-8.tar", "t-9.tar", "t-10.tar"]),
        ("t-{0..10}.tar", [f"t-{number}.tar" for number in range(11)]),
        ("t-{08..10}.tar", ["t-08.tar", "t-09.tar", "t-10.tar"]),
        ("t-{2..1}.tar", ["t-2.tar", "t-1.tar"]),
        ("{val,train}.tar", ["val.tar", "train.tar"]),  # in the order written
        ("{a,b{1,2}}.tar", ["a.tar", "b1.tar", "b2.tar"]),
        ("t{,-{0..1}}.tar", ["t.tar", "t-0.tar", "t-1.tar"]),
        ("{a,b}/{08..09}.tar", ["a/08.tar", "a/09.tar", "b/08.tar", "b/09.tar"]),
        ("{b,a}-*.tar", ["b-1.tar", "b-2.tar", "a-0.tar"]),
        (f"{{{','.join(map(str, range(1000, 1100)))}}}.tar", [f"{number}.tar" for number in range(1000, 1100)]),  # long
        ("odd{x}.tar", ["odd{x}.tar"]),
        ("odd{1,2}.tar", ["odd{1,2}.tar"]),  # the name of a file
    ],
)
def test_braces_mean_the_files_that_they_mean_to_a_shell(pattern, names, tmp_path):
    for name in [*names, "t-0003.tar", "t-001.tar"]:  # the two extra names must not match
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_files(str(tmp_path / pattern), "tars")
    assert [str(Path(path).relative_to(tmp_path)) for path in found] == names
    if "odd" not in pattern and "*" not in pattern:
        shell = subprocess.run(["bash", "-c", f"printf '%s\n' {pattern}"], capture_output=True, text=True, check=True)
        assert sorted(shell.stdout.split()) == sorted(names)
        (tmp_path / names[-1]).unlink()
        with pytest.raises(FileNotFoundError, match=rf"{names[-1]}: no such file, .*; expected tars"):
            find_files(str(tmp_path / pattern), "tars")


@pytest.mark.parametrize(
    "braces",
    [
        "{0..1000000000000}",
        "{0..99999999999999999999999999}",
        "{0..999}{0..999}",
        "{a,b}" * 20,
        "{a,a}" * 30,  # the same name over and over
        "{{0..999},{0..999}}{0..999}",
        "{" * 1000,
        "{a," * 1000,
    ],
)
def test_braces_that_stand_for_too_much_are_refused_at_once(braces, tmp_path):
    with pytest.raises(
        ValueError, match=r"its braces stand for more than 100,000 names|may have 100 pairs of braces"
    ) as error:
        find_files(f"{tmp_path}/train-{braces}.tar", "tars")
    assert str(error.value).startswith(f"{tmp_path}/train-{braces}"[:200])
    assert len(str(error.value)) < 300


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def found(root: Path, pattern: str) -> list[str]:
    return [str(Path(path).relative_to(root)) for path in find_files(f"{root}/{pattern}", "tars")]


def test_folders_may_have_brackets_and_braces_in_their_names(tmp_path, monkeypatch):
    odd, other = "run [1] {a,b}", "{0..2}*?"
    make(
        tmp_path, f"{odd}/x-0.tar", f"{odd}/x-1.tar", f"{odd}/{other}/y.tar", "run 1 a/x-0.tar", "run [2]/x-2.tar", "1/y.tar"
    )
    make(tmp_path, f"{odd}/.hidden.tar", f"{odd}/.x/z.tar")
    both = [f"{odd}/x-0.tar", f"{odd}/x-1.tar"]
    assert found(tmp_path, f"{odd}/*.tar") == both
    assert found(tmp_path, f"{odd}/x-[01].tar") == both
    assert found(tmp_path, f"{odd}/x-{{0..1}}.tar") == both
    assert found(tmp_path, f"{odd}/{other}/*.tar") == [f"{odd}/{other}/y.tar"]
    assert found(tmp_path, "run*/x-2.tar") == found(tmp_path, "*/x-[2].tar") == ["run [2]/x-2.tar"]
    assert found(tmp_path, f"{odd}/**/*.tar") == sorted([*both, f"{odd}/{other}/y.tar"])
    assert found(tmp_path, "{run [2],run 1 a}/x-*.tar") == ["run [2]/x-2.tar", "run 1 a/x-0.tar"]
    assert found(tmp_path, "run [12]/x-2.tar".replace("[12]", "[[]2]")) == ["run [2]/x-2.tar"]  # what glob.escape gives
    monkeypatch.chdir(tmp_path / odd)
    assert find_files("*.tar", "tars") == ["x-0.tar", "x-1.tar"]
    assert find_files(f"./{other}/*", "tars") == [f"./{other}/y.tar"]
    monkeypatch.chdir(tmp_path)
    for wrong, why in ((odd, "a folder"), (f"{odd}/*.zip", "no such file"), ("no [1]/x-*.tar", "no such file")):
        with pytest.raises(FileNotFoundError, match=re.escape(f"{wrong}: {why}") + ".*; expected tars"):
            find_files(wrong, "tars")


def test_every_source_reads_from_such_a_folder(tmp_path):
    folder = tmp_path / "run [1] {a,b}"
    folder.mkdir()
    for number in range(2):
        name = f"x-{number:05d}-of-00002"
        test_data.write_tar(folder / f"{name}.tar", [("a.png", test_data.encoded(0)), ("a.cls", b"1")])
        test_data.write_parquet(folder / f"{name}.parquet", 0, 1, labels=[1])
        test_data.token_file(folder / f"{name}.jsonl", [([1, 2], 1)])
        with records.image_writer(folder / f"{name}.array_record") as write:
            write(test_data.encoded(0), 1)
        test_data.token_file(folder / f"t-{number:05d}-of-00002.array_record", [([1, 2], 1)])
    patterns = {"webdataset": "*.tar", "parquet": "*.parquet", "array_record": "x-*.array_record"}
    patterns |= {"tokens": "t-*.array_record"}
    for name, pattern in (*patterns.items(), ("tokens", "*.jsonl")):
        source = sources.make_source({"name": name, "paths": f"{folder}/{pattern}"})
        assert [int(source[index]["label"]) for index in range(len(source))] == [1, 1]
        path = folder / pattern.replace("*", "x-00000-of-00002" if pattern[0] == "*" else "00000-of-00002")
        kept, path = path, path.rename(tmp_path / "away")
        with pytest.raises(
            FileNotFoundError, match=rf"\{{a,b\}}: {kept.name} of 2 shards missing; .*{re.escape(pattern)} would"
        ):
            sources.make_source({"name": name, "paths": f"{folder}/{pattern}"})
        path.rename(kept)


def test_a_missing_shard_is_named(tmp_path):
    names = [f"x-{number:05d}-of-00004.tar" for number in range(4)]
    make(tmp_path, *names, "y-00001-of-00002.tar", "y-00002-of-00002.tar", "z-00000-of-00001.txt", "u.tar")
    assert len(found(tmp_path, "*.tar")) == 7  # shards may be counted from 1
    (tmp_path / names[2]).unlink()
    rest = [name for name in names if name != names[2]]
    for pattern in ("*.tar", "x-*", "x-????[0-9]-of-*.tar", "**/x*", "{x,y}-*.tar", "x-0000[123]-of-00004.tar"):
        with pytest.raises(
            FileNotFoundError, match=rf"{tmp_path}: {names[2]} of 4 shards missing; .* would read the others"
        ):
            find_files(f"{tmp_path}/{pattern}", "tars")
    # Who names files, or a part of the numbers, means these.
    assert found(tmp_path, "x-0000[013]-of-00004.tar") == rest
    assert found(tmp_path, "x-0000{0,1,3}-of-00004.tar") == rest
    assert found(tmp_path, "x-{00000..00001}-of-0000*") == rest[:2]
    assert find_files([tmp_path / name for name in rest], "tars") == [str(tmp_path / name) for name in rest]
    (tmp_path / names[0]).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}: {names[0]} and 1 more of 4 shards missing"):
        find_files(f"{tmp_path}/x-*", "tars")


def test_names_of_shards_of_other_programs():
    hub = [f"data/train-{number:05d}-of-00294-{number:x}.parquet" for number in range(294)]
    tfds = [f"d/imagenet2012-train.array_record-{number:05d}-of-01024" for number in range(1024)]
    for files in (hub, tfds):
        check_complete(files, "*/*")
    with pytest.raises(FileNotFoundError, match=r"data: train-00007-of-00294\*\.parquet of 294 shards missing"):
        check_complete([*hub[:7], *hub[8:]], "data/*.parquet")
    with pytest.raises(FileNotFoundError, match=r"d: imagenet2012-train\.array_record-00000-of-01024 of 1024"):
        check_complete(tfds[1:], "d/*")
    check_complete(["a-00000-of-00002.tar", "a-00001-of-00002.tar", "a-00001-of-00002.tar.json"], "a-*.tar")


def test_links_in_a_circle_end_and_folders_that_cannot_be_read_are_errors(tmp_path, monkeypatch):
    make(tmp_path, "a/b/x.tar", "a/y.tar")
    for name in ("up", "again"):  # each step would double the paths
        (tmp_path / "a/b" / name).symlink_to(tmp_path)
    assert found(tmp_path, "**/*.tar") == ["a/b/x.tar", "a/y.tar"]
    assert found(tmp_path, "a/**") == ["a/b/x.tar", "a/y.tar"]

    def denied(folder):
        raise PermissionError(13, "Permission denied", folder)

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, denied)
    for pattern in ("a/*.tar", "**/*.tar"):
        with pytest.raises(PermissionError, match=r"Permission denied"):
            find_files(f"{tmp_path}/{pattern}", "tars")
