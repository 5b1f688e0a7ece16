"""No lost step: a GAN training that is killed twenty times ends bit for bit like one that is not. `make soak` runs this."""

import itertools
import json
import random
import signal
import subprocess
import time

import numpy as np
import pytest
import test_train
from ml_collections import ConfigDict
from test_distributed import finish, start

STEPS, CHECKPOINT_EVERY = 240, 5


def gan() -> ConfigDict:
    """The digits' tokenizer, with two optimizers and LeCam's averages."""
    config = test_train.digits_config("smoke_tokenizer")
    config.update({"num_steps": STEPS, "log_every": 1, "checkpoint_every": CHECKPOINT_EVERY})
    config.update({"preview_every": 0, "eval_every": 0})
    config.data.batch_size = 16
    config.loss.update({"discriminator_weight": 0.1, "discriminator_start": 20, "lecam_weight": 0.001})
    config.discriminator = ConfigDict({"hidden_channels": 32, "num_stages": 2, "logits_size": 8})
    config.discriminator_optimizer = ConfigDict(config.optimizer.to_dict())
    return config


PROGRAM = """
import sys
import test_soak
from titok_jax.runtime import processes
from titok_jax.training import loop
from titok_jax.training.settings import parse_settings
processes.HEARTBEAT_SECONDS, processes.START_SECONDS = 5, 300
processes.initialize_distributed()
import jax
import numpy as np
state = loop.train(parse_settings(test_soak.gan()), sys.argv[1])
if jax.process_index() == 0:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    np.savez(sys.argv[1] + "/final.npz", **{jax.tree_util.keystr(path): leaf for path, leaf in leaves})
"""


def last_step(workdir) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kills_of(processes: int, kills: int, draw: random.Random) -> list[tuple[str, str]]:
    """(whom, when) of each kill, in random order. Kills hit all processes or a single one, each at every kind of moment."""
    whom = ["all", *(f"process {i}" for i in range(processes) if processes > 1)]
    plan = list(itertools.islice(itertools.cycle(itertools.product(whom, ["start", "step", "save"])), kills))
    draw.shuffle(plan)
    return plan


def kill_at(whom: str, moment: str, draw: random.Random, run: list[subprocess.Popen], workdir) -> bool:
    """Waits for a moment and kills one or all processes of a run; the others must then end by themselves -> whether the kill
    was during a save."""
    victims = run if whom == "all" else [run[int(whom.removeprefix("process "))]]
    before, delay, steps = last_step(workdir), draw.uniform(0, 6), draw.randint(1, 16)
    if moment == "start":  # while it imports, compiles or reads its checkpoint
        time.sleep(delay)
    else:
        checkpoints = workdir / "checkpoints"
        # A resumed run first truncates the log to its checkpoint.
        while all(process.poll() is None for process in run) and last_step(workdir) < before + steps:
            time.sleep(0.002)
        while moment == "save" and all(process.poll() is None for process in run) and not any(checkpoints.glob("*tmp*")):
            time.sleep(0.0005)
        time.sleep(draw.uniform(0, 0.05 if moment == "step" else 0.01))
    # At "start" such a file may be left from an earlier kill.
    saving = any((workdir / "checkpoints").glob("*tmp*")) and moment != "start"
    assert all(process.poll() is None for process in run)
    for process in victims:
        process.kill()
    for process in run:
        _, error = process.communicate(timeout=900)
        assert (process.returncode == -signal.SIGKILL) if process in victims else (process.returncode != 0), error[-2000:]
    print(f"killed {whom} of {len(run)} at step {last_step(workdir)}{', during a save' if saving else ''}", flush=True)
    return saving


@pytest.mark.soak
@pytest.mark.parametrize(("processes", "kills"), [(1, 10), (2, 10)])
def test_kills_at_random_moments_change_nothing(processes, kills, tmp_path):
    draw, killings = random.Random(processes), []
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    finish(start(PROGRAM, str(straight), processes=processes))
    for whom, moment in kills_of(processes, kills, draw):
        run = start(PROGRAM, str(killed), processes=processes)
        killings.append((whom, kill_at(whom, moment, draw, run, killed)))
    assert not (killed / "pretrained").exists()
    # Kills hit all processes, and either of two while the other lived; both kinds also happened during a save.
    assert ("all", True) in killings
    if processes == 2:
        assert {whom for whom, _ in killings} == {"all", "process 0", "process 1"}
        assert {("process 0", True), ("process 1", True)} & set(killings)
    printed = finish(start(PROGRAM, str(killed), processes=processes))
    assert "Continuing at step" in printed[0]
    with np.load(straight / "final.npz") as a, np.load(killed / "final.npz") as b:
        assert a.files == b.files
        assert {"lecam", "opt", "ema", "params"} <= {name.split("'")[1] for name in a.files}
        for name in a.files:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    losses = [
        [json.loads(line)["total_loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        for workdir in (straight, killed)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS
