"""A training that hangs ends, and says where it hung."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
from test_train import ROOT, small

from titok_jax.data.sources import DigitsSource
from titok_jax.training import loop, watchdog
from titok_jax.training.settings import parse_settings
from titok_jax.training.watchdog import Watchdog

HANGS = """
import threading
from titok_jax.training.watchdog import Watchdog
def read_that_blocks():
    threading.Event().wait()
with Watchdog(0.001) as dog:
    dog.at("the batch of step 7")
    read_that_blocks()
"""


def test_a_process_that_hangs_ends_with_its_stacks_and_a_status_of_its_own(tmp_path):
    stamp = tmp_path / "progress"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TITOK_JAX_PROGRESS": str(stamp)}
    done = subprocess.run([sys.executable, "-c", HANGS], env=env, capture_output=True, text=True)
    assert done.returncode == 75  # neither 2, which babysit takes for a wrong request, nor 126 or 127
    assert ", line 5 in read_that_blocks\n" in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "error: no progress for 0.001 minutes at the batch of step 7; the stacks of all threads are above. The same command "
        "continues (status 75). --config.watchdog_minutes sets the minutes of a step, 0: no watch"
    )
    assert 0 < int(stamp.read_text()) - time.time() <= 600  # others wait a little longer


def test_only_silence_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("TITOK_JAX_PROGRESS", str(tmp_path / "progress"))
    with Watchdog(10) as dog:

        def silent(looks: int) -> bool:
            return max(map(dog.expired, [20] * looks), default=False)

        assert not silent(12 * 30)  # what comes before the first step may take longer
        dog.at("step 1")
        assert not dog.expired(20)  # something new: it counts from here
        until = int((tmp_path / "progress").read_text())
        assert not silent(20)
        assert int((tmp_path / "progress").read_text()) - until in range(-400, -390)
        assert not dog.expired(1e6)  # the machine was asleep, or the process stopped
        assert not silent(9)
        assert silent(1)
        dog.at("the checkpoint", watchdog.LONG)
        assert not silent(4 * 30)
        assert silent(2)


def test_zero_minutes_are_no_watch(tmp_path, monkeypatch):
    monkeypatch.setenv("TITOK_JAX_PROGRESS", str(tmp_path / "progress"))
    before = threading.active_count()
    with Watchdog(0):
        assert threading.active_count() == before
    assert not (tmp_path / "progress").exists()


def test_a_training_whose_read_blocks_says_so_in_its_log(tmp_path, monkeypatch, capfd):
    """Instead of ending the process, which is that of the tests, the end lets the read go on."""
    ended, statuses, real, reads = threading.Event(), [], DigitsSource.__getitem__, []

    def read(self, index):
        reads.append(index)
        if len(reads) > 16 * 5:
            ended.wait()
        return real(self, index)

    def end(status):
        statuses.append(status)
        ended.set()

    monkeypatch.setattr(DigitsSource, "__getitem__", read)
    monkeypatch.setattr(watchdog.os, "_exit", end)
    config = small("tokenizer", num_steps=8, log_every=1, watchdog_minutes=0.05)
    config.data.num_threads = 1
    loop.train(parse_settings(config), tmp_path)
    assert set(statuses) == {75}
    logged = (tmp_path / "log.txt").read_text()
    assert "error: no progress for 0.05 minutes at the batch of step " in logged
    assert "which the data source has not given; the stacks of all threads are above." in logged
    assert f'File "{__file__}", line {read.__code__.co_firstlineno + 3} in read' in logged
    assert "in read" in capfd.readouterr().err
    assert json.loads((tmp_path / "config.json").read_text())["watchdog_minutes"] == 0.05


@pytest.mark.long
def test_the_workers_of_a_training_say_where_they_wait(tmp_path):
    program = """
import multiprocessing, os, signal, time
import numpy as np
from titok_jax.data import loader
class Blocks:
    def __len__(self):
        return 8
    def __getitem__(self, index):
        if index == 5:
            print("blocked", flush=True)
            time.sleep(600)
        return {"label": np.int32(index)}
if __name__ == "__main__":
    from titok_jax.training.watchdog import Watchdog
    with Watchdog(0.05) as dog, loader.make_loader(Blocks(), seed=0, global_batch_size=1, num_workers=1, num_threads=1,
                                                   blocks=[0], num_blocks=1) as batches:
        for _ in batches:
            dog.at("the next batch")
"""
    (tmp_path / "program.py").write_text(program)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, tmp_path / "program.py"], env=env, capture_output=True, text=True)
    assert done.returncode == 75, done.stderr
    assert 'program.py", line 11 in __getitem__' in done.stderr


@pytest.mark.parametrize("minutes", [-1, float("nan")])
def test_minutes_are_a_number(minutes):
    config = small("tokenizer")
    with config.unlocked():
        config.watchdog_minutes = minutes
    with pytest.raises(ValueError, match=r"config\.watchdog_minutes is .*, expected a number from 0 to 100,000"):
        parse_settings(config)
