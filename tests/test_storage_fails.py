"""A storage that fails while a training reads from it: it is asked again, and in the end the run names the file."""

import os
import re
import time
from types import SimpleNamespace

import pytest
from test_replaced import KINDS, images
from test_train import small

from titok_jax.data import checked, sources
from titok_jax.data.checked import CheckedSource, Limits
from titok_jax.training import loop
from titok_jax.training.settings import parse_settings


def files_of(spec) -> list[str]:
    """The files that a source has, of this kind of data."""
    paths = spec.get("path") or spec["paths"]
    if os.path.isdir(paths):
        return [os.path.join(folder, name) for folder, _, names in os.walk(paths) for name in names]
    return sources.find_files(paths, "files")


class Storage:
    """Files that cannot be read for a while: they are gone, and what was open is a folder."""

    def __init__(self, files):
        self.files = [os.path.realpath(file) for file in files]
        self.opened = {}

    def fail(self) -> None:
        places = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        opened = [int(os.path.basename(p)) for p in places if os.path.exists(p) and os.readlink(p) in self.files]
        self.opened = {number: os.dup(number) for number in opened}
        folder = os.open("/", os.O_RDONLY)
        for number in self.opened:
            os.dup2(folder, number)
        os.close(folder)
        for file in self.files:
            os.rename(file, file + ".away")

    def recover(self) -> None:
        for file in self.files:
            os.rename(file + ".away", file)
        for number, kept in self.opened.items():
            os.dup2(kept, number)
            os.close(kept)
        self.opened = {}


@pytest.fixture
def pauses(monkeypatch):
    """The pauses before each new try; `pauses.then` is called after the second."""

    class Pauses(list):
        then = staticmethod(lambda: None)

        def sleep(self, seconds):
            self.append(seconds)
            if len(self) == 2:
                self.then()

    found = Pauses()
    monkeypatch.setattr(checked, "time", SimpleNamespace(monotonic=time.monotonic, sleep=found.sleep))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_storage_that_is_away_for_a_while_changes_nothing(kind, tmp_path, pauses, capsys):
    """Least of all does another image take the place of one that is not damaged."""
    spec = KINDS[kind](tmp_path / "data", images(damaged=()))
    expected = CheckedSource(sources.make_source(spec), Limits(), replace=True)[7]
    source = CheckedSource(sources.make_source(spec), Limits(), replace=True)
    assert source[2]["image"][0, 0, 0] == 2
    storage = Storage(files_of(spec))
    pauses.then = storage.recover
    storage.fail()
    found = source[7]  # of another row group than image 2
    assert {name: value.tolist() for name, value in found.items()} == {k: v.tolist() for k, v in expected.items()}
    assert pauses == [1, 3]
    assert re.match(
        rf"WARNING: the data cannot be read now, trying again in 1 s: .*{tmp_path}/data", capsys.readouterr().out
    )


def test_a_storage_that_stays_away_ends_the_run_and_is_named(tmp_path, pauses, capsys):
    spec = KINDS["folder"](tmp_path / "data", images(damaged=()))
    config = small("tokenizer", log_every=1, num_steps=20)
    config.data.batch_size = 4
    with config.unlocked():
        config.data.source = spec
        config.data.transform = None
    settings, seen = parse_settings(config), []

    def write(self, step, metrics, **options):
        seen.append(step)
        if step == 1:
            # What a failing disk gives: reading this file is an input/output error, without a name.
            for file in files_of(spec):
                os.unlink(file)
                os.symlink("/proc/self/mem", file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.MetricLog, "write", write)
        with pytest.raises(OSError, match=r"^the data cannot be read, also not at 4 more tries in 44 s: ") as error:
            loop.train(settings, tmp_path / "run")
    assert re.search(rf": \[Errno 5\] Input/output error: '{tmp_path}/data/.*png'\. Is the disk,", str(error.value))
    assert 1 <= len(seen) < 20
    assert pauses.count(30) >= 1
