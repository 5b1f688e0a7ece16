"""Pieces of long jobs: existing ones are kept, missing ones are named, and ones that do not fit together are refused."""

import numpy as np
import pytest

from titok_jax.runtime.shards import Shards

SETTINGS = {"seed": 1, "temperature": 2.0}


def begin(folder, settings=SETTINGS, length=14, size=3, **options):
    return Shards(folder, settings, length, size, **options)


def test_pieces_come_back_in_order(tmp_path):
    shards = begin(tmp_path / "s")
    assert shards.missing() == [0, 1, 2, 3, 4]
    assert [shards.items(number) for number in (0, 3, 4)] == [slice(0, 3), slice(9, 12), slice(12, 14)]
    for number in (3, 0, 4):
        shards.write(number, images=np.full((2, 3), number, np.uint8), loss=np.float64(number / 3))
    again = begin(tmp_path / "s")  # as after a kill
    assert again.missing() == [1, 2]
    with pytest.raises(FileNotFoundError):
        list(again)
    wanted = []

    def pieces(numbers):
        for number in numbers:
            wanted.append(number)
            yield {"images": np.full((2, 3), number, np.uint8), "loss": np.float64(number / 3)}

    assert again.make(pieces, quiet=True).startswith("6 images in ")
    assert again.make(pieces, quiet=True) == "all 14 images were there"
    assert wanted == [1, 2]
    pieces = list(again)
    assert [int(piece["images"][1, 2]) for piece in pieces] == [0, 1, 2, 3, 4]
    assert [float(piece["loss"]) for piece in pieces] == [number / 3 for number in range(5)]  # every bit
    assert pieces[0]["images"].dtype == np.uint8


def test_processes_share_the_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(Shards, "wait", lambda self, event: None)  # here the processes run one after the other
    parts = [begin(tmp_path / "s", process_index=i, process_count=3) for i in range(3)]
    assert [part.missing() for part in parts] == [[0, 3], [1, 4], [2]]
    assert [part.first for part in parts] == [True, False, False]
    for part in reversed(parts):
        for number in part.missing():
            part.write(number, x=np.array(number))
    assert [int(piece["x"]) for piece in parts[0]] == [0, 1, 2, 3, 4]
    assert begin(tmp_path / "s").missing() == []  # for any other number of processes too
    with pytest.raises(FileNotFoundError, match="process 1 does not see it; name an output in a folder that all"):
        begin(tmp_path / "elsewhere", process_index=1, process_count=2)


def test_other_settings_are_refused(tmp_path):
    begin(tmp_path / "s").write(0, x=np.zeros(1))
    with pytest.raises(ValueError, match=r"other settings \(seed: 1 there, 2 now; steps: None there, 8 now\)"):
        begin(tmp_path / "s", {"seed": 2, "temperature": 2.0, "steps": 8})
    with pytest.raises(ValueError, match=r"\(temperature: 2.0 there, None now\)"):
        begin(tmp_path / "s", {"seed": 1})
    assert begin(tmp_path / "s").missing() == [1, 2, 3, 4]
    assert begin(tmp_path / "s", restart=True).missing() == [1, 2, 3, 4]  # with the same settings the job goes on
    assert begin(tmp_path / "s", {"seed": 2}, restart=True).missing() == [0, 1, 2, 3, 4]
    assert begin(tmp_path / "s", {"seed": 2}).missing() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"\(num: 14 there, 15 now; batch_size: 3 there, 4 now\)"):
        begin(tmp_path / "s", {"seed": 2}, 15, 4)


def test_what_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "00001.npz").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=r"files of other origin \(00001.npz\)"):
        begin(tmp_path / "photos", restart=True)
    (tmp_path / "file").write_bytes(b"precious")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        begin(tmp_path / "file")
    shards = begin(tmp_path / "s")
    shards.write(0, x=np.zeros(1))
    (tmp_path / "s" / f".00001.partial-{17:016x}.npz").write_bytes(b"half")  # left by a killed process
    (tmp_path / "s" / "notes.txt").write_bytes(b"precious")
    shards.remove()
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["notes.txt"]
    (tmp_path / "s" / "notes.txt").unlink()
    shards.remove()
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("name", ["0001_mine.npz", "1.npz", "settings.json", "00001.npz.bak", ".lock-mine"])
def test_other_names_than_those_of_pieces_are_not_removed(name, tmp_path):
    """Neither in a folder of ours nor in a folder of the user's."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text('{"num": 14, "batch_size": 3}')
    if not name.startswith("."):  # hidden files, as of operating systems, do not matter
        with pytest.raises(FileExistsError, match=rf"mine holds files of other origin \({name}\)"):
            begin(tmp_path / "mine", restart=True)
        assert [path.name for path in (tmp_path / "mine").iterdir()] == [name]
        assert (tmp_path / "mine" / name).read_text() == '{"num": 14, "batch_size": 3}'
    if name == "settings.json":
        return
    shards = begin(tmp_path / "s")
    shards.write(1, x=np.zeros(1))
    (tmp_path / "s" / name).write_text("mine")
    if not name.startswith("."):
        with pytest.raises(FileExistsError, match=rf"holds files of other origin \({name}\)"):
            begin(tmp_path / "s", {"seed": 2}, restart=True)
        assert begin(tmp_path / "s").missing() == [0, 2, 3, 4]  # nothing was removed
    shards.remove()
    assert [path.name for path in (tmp_path / "s").iterdir()] == [name]
    assert (tmp_path / "s" / name).read_text() == "mine"


def test_a_piece_of_another_run_is_not_taken(tmp_path):
    """As on a file system without locks, where a second run has replaced the first one's settings."""
    first = begin(tmp_path / "s")
    second = begin(tmp_path / "s", {"seed": 2}, restart=True)
    second.write(0, x=np.zeros(1))
    first.write(1, x=np.ones(1))
    assert second.read(0)["x"].tolist() == [0]
    with pytest.raises(ValueError, match=r"00001\.npz was made by another run; remove it, and the same command makes it"):
        second.read(1)
    with pytest.raises(ValueError, match=r"00000\.npz was made by another run"):
        first.read(0)
    assert begin(tmp_path / "s", {"seed": 2}).read(0)["x"].tolist() == [0]  # after a kill it is the same run


def test_damage_is_named(tmp_path):
    shards = begin(tmp_path / "s")
    shards.write(0, x=np.arange(1000))
    path = tmp_path / "s" / "00000.npz"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"00000.npz is damaged .* remove it"):
        shards.read(0)
