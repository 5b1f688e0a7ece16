"""Commands lose nothing: two runs do not mix, what appears meanwhile is not replaced, and a full disk is named.

The models are stand-ins that make noise, so nothing is compiled.
"""

import gc
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny_models

from titok_jax import evaluate, pretokenize, reconstruct, sample
from titok_jax.data import token_shards
from titok_jax.data.records import image_writer, token_writer
from titok_jax.data.webdataset import tar_writer
from titok_jax.evaluation import references, runs
from titok_jax.evaluation.metrics import FeatureStatistics
from titok_jax.runtime import locks
from titok_jax.weights import pretrained

SHARD = "tokens-00000-of-00001.jsonl"
SAMPLE = ["--num", "6", "--batch-size", "2", "--out"]


@pytest.fixture
def between(monkeypatch):
    """A list of functions; each is called after one more batch, shard or image of a command, in whatever run this is."""
    events = []

    def event():
        if events:
            events.pop(0)()

    def sampled(tokenizer, generator, labels, seed, *, batch_size, numbers, **options):
        for number in numbers:
            yield slice(number * batch_size, (number + 1) * batch_size), None, np.full((2, 32, 32, 3), 10 * seed, np.uint8)
            event()

    def reconstructed(tokenizer, images, **options):
        yield slice(0, len(images)), np.zeros((len(images), 8), int), np.zeros((len(images), 32, 32, 3), np.float32)
        event()

    def recorded(source, positions, **options):
        for _ in positions:
            yield np.zeros(8, int), 3
        event()

    def evaluated(run):
        event()
        return {"metrics": {f"metric {number}": 1.0 for number in range(200)}}

    monkeypatch.setattr(sample, "sample", sampled)
    monkeypatch.setattr(reconstruct, "reconstruct", reconstructed)
    monkeypatch.setattr(token_shards, "records", recorded)
    monkeypatch.setattr(runs, "Evaluation", lambda *args: SimpleNamespace(result={}))
    monkeypatch.setattr(runs, "run_reconstruction", evaluated)
    return events


class Command(NamedTuple):
    """A command: its module, the arguments in front of its output, the output, what it puts in place, its lock."""

    module: Any
    arguments: list[str]
    out: str
    placed: str
    lock: str


COMMANDS = [
    Command(sample, SAMPLE, "a.npz", "a.npz", "a.npz.shards/.lock"),
    Command(sample, SAMPLE, "folder", "folder", "folder.shards/.lock"),
    Command(reconstruct, ["--num", "2", "--out"], "folder", "folder", ".folder.lock"),
    Command(pretokenize, ["digits:test", "--format", "jsonl", "--out"], "folder", f"folder/{SHARD}", "folder/.lock"),
    Command(evaluate, ["--reconstruct", "digits:test", "--json"], "a.json", "a.json", "a.json.shards/.lock"),
]


@pytest.fixture(params=COMMANDS, ids=lambda command: f"{command.module.__name__} {command.out}")
def command(request):
    return request.param


def run(command, folder, *more):
    return command.module.main([*command.arguments, str(folder / command.out), *more])


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.usefixtures("between")
def test_each_command_is_refused_while_another_one_works_there(command, tmp_path, capsys):
    beside = command.lock.startswith(".")
    place = tmp_path / command.out if beside else (tmp_path / command.lock).parent
    with locks.lock_run(place, beside=beside):
        assert command.lock in names(tmp_path)
        for more in [[], ["--overwrite"]][: 1 if command.module is pretokenize else 2]:
            assert run(command, tmp_path, *more) == 2
            (message,) = capsys.readouterr().err.splitlines()
            who = r"error: another run \(\S+, process \d+\) is at work in "
            assert re.fullmatch(rf"{who}{place}; wait for it, or choose another output", message)
    assert run(command, tmp_path) == 0
    assert not [name for name in names(tmp_path) if "lock" in name or "shards" in name]


def test_two_runs_do_not_mix_their_images(between, tmp_path, capsys):
    arguments, refused = [*SAMPLE, str(tmp_path / "a.npz")], []

    def second():
        refused.append(sample.main([*arguments, "--seed", "2", "--overwrite"]))

    between.append(second)
    assert sample.main([*arguments, "--seed", "1"]) == 0
    assert refused == [2]
    assert "is at work in" in capsys.readouterr().err
    assert set(np.load(tmp_path / "a.npz")["arr_0"].ravel().tolist()) == {10}
    assert sample.main([*arguments, "--seed", "2", "--overwrite"]) == 0
    assert set(np.load(tmp_path / "a.npz")["arr_0"].ravel().tolist()) == {20}


def test_two_runs_do_not_mix_where_nothing_can_be_locked(between, tmp_path, monkeypatch, capsys):
    arguments, ended = [*SAMPLE, str(tmp_path / "a.npz")], []

    def flock(*args):
        raise OSError("no locks here")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    between += [lambda: ended.append(sample.main([*arguments, "--seed", "2", "--overwrite"]))]
    assert sample.main([*arguments, "--seed", "1"]) == 2
    printed = capsys.readouterr()
    assert f"warning: {tmp_path}/a.npz.shards cannot be locked (no locks here)" in printed.out
    assert ended == [0]
    assert "No such file or directory" in printed.err or "was made by another run" in printed.err
    assert set(np.load(tmp_path / "a.npz")["arr_0"].ravel().tolist()) == {20}


@pytest.mark.parametrize("mine", ["file", "folder"])
def test_what_appears_during_a_run_stays(mine, command, between, tmp_path, capsys):
    place = tmp_path / command.placed
    notes = place / "notes.txt" if mine == "folder" else place

    def appear():
        notes.parent.mkdir(exist_ok=True)
        notes.write_text("mine")

    between.append(appear)
    assert run(command, tmp_path) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    found = re.fullmatch(rf"error: {place} has appeared during the work and is not replaced; what was made is (\S+)", error)
    assert found, error
    assert notes.read_text() == "mine"
    assert Path(found[1]).is_dir() == (command.placed == "folder")
    assert Path(found[1]).stat().st_size > 0


@pytest.mark.usefixtures("between")
@pytest.mark.filterwarnings("error")  # an error in the end of an object is none that ends a test
@pytest.mark.parametrize(
    ("command", "size", "file"),
    [
        (COMMANDS[0], 60, "a.npz.shards/settings.json"),
        (COMMANDS[0], 2000, "a.npz.shards/00000.npz"),
        (COMMANDS[0], 14_000, "a.npz"),  # the pieces are smaller
        (COMMANDS[1], 2000, "folder.shards/00000.npz"),
        (COMMANDS[2], 2000, "folder"),
        (COMMANDS[3], 60, "folder/pretokenize.json"),
        (COMMANDS[3], 2000, f"folder/{SHARD}"),
        (COMMANDS[4], 2000, "a.json"),
    ],
)
def test_a_full_disk_is_one_line_that_names_the_file(command, size, file, tmp_path, capsys, full_disk):
    with full_disk(size):
        assert run(command, tmp_path) == 2
    gc.collect()
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert printed.err.splitlines()[-1] == f"error: cannot write {tmp_path / file}: File too large"
    assert not (tmp_path / command.placed).exists()
    assert run(command, tmp_path) == 0


@pytest.mark.parametrize("writer", [image_writer, token_writer, tar_writer, "statistics", "reference", "model"])
def test_other_writers_name_a_full_disk_too(writer, tmp_path, full_disk):
    statistics = FeatureStatistics(30)
    statistics.update(np.random.default_rng(0).normal(size=(9, 30)))
    reference = references.Reference(statistics, None, np.zeros((9, 30), np.float32), {})
    path = tmp_path / ("a.tar" if writer is tar_writer else "a.array_record")
    rows = np.arange(3000)

    def write():
        if writer == "statistics":
            statistics.save(path)
        elif writer == "reference":
            reference.save(path, replace=False)
        elif writer == "model":
            pretrained.save(path, tiny_models.TOKENIZER, tiny_models.params(tiny_models.TOKENIZER))
        else:
            with writer(path) as add:
                for _ in range(100):
                    add(rows % 256 if writer is token_writer else rows.tobytes(), 3)

    with full_disk(1000), pytest.raises(OSError, match=rf"^cannot write {path}: "):
        write()
    assert names(tmp_path) == []
    write()
    assert names(tmp_path)[0] == path.name
    if writer != "statistics":
        with pytest.raises(FileExistsError):
            write()
