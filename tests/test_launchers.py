"""Processes that Slurm and MPI start: with the variables that these set, two real ones join."""

import os
import pathlib
import random
import socket
import subprocess
import sys

import pytest

from titok_jax.runtime import launchers, processes

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = """
from titok_jax.runtime import processes
processes.initialize_distributed()
import jax
print("this is", jax.process_index(), "of", jax.process_count(), "with", jax.device_count(), "devices", flush=True)
"""


def free_port() -> int:
    """A free port of those that JAX takes: 61440 and the 12 lowest bits of the job's number."""
    for port in random.sample(range(61440, 65536), 50):
        with socket.socket() as free:
            try:
                free.bind(("localhost", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")


def slurm(index: int, port: int, count: int = 2) -> dict[str, str]:
    """What `srun --nodes=1 --ntasks=COUNT` sets in a task."""
    return {
        "SLURM_JOB_ID": str(4096 * 1234 + port - 61440),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NNODES": "1",
        "SLURM_NPROCS": str(count),
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
        "SLURM_NODEID": "0",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_NUM_TASKS": str(count),
        "SLURM_STEP_TASKS_PER_NODE": str(count),
    }


def open_mpi(index: int, port: int, count: int = 2) -> dict[str, str]:
    """What `mpirun -np COUNT` of Open MPI 4 sets in a process."""
    return {
        "OMPI_MCA_orte_hnp_uri": f"{4096 * (port - 61440)}.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": str(count),
        "OMPI_COMM_WORLD_RANK": str(index),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(count),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(index),
    }


@pytest.mark.parametrize(("launcher", "by"), [(slurm, "srun"), (open_mpi, "mpirun")])
def test_two_processes_of_a_launcher_join(launcher, by):
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "2", **launcher(index, port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    for index, process in enumerate(started):
        out, error = process.communicate(timeout=600)
        assert process.returncode == 0, error[-4000:]
        assert f"process {index} of 2, started by {by}: waiting for the others" in out
        assert f"this is {index} of 2 with 4 devices" in out


def test_the_batch_file_starts_one_process_on_each_machine(tmp_path):
    file = ROOT / "tpu_scripts/slurm.sbatch"
    (tmp_path / "srun").write_text(f"#!/usr/bin/env bash\nprintf '%s\\n' \"$@\" >{tmp_path}/asked\nexit 3\n")
    (tmp_path / "srun").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", file, "--config", "stage1:l32", "--workdir", "a b"], env=environment)
    assert done.returncode == 3
    asked = (tmp_path / "asked").read_text().splitlines()
    train = ["python", "-m", "titok_jax.train", "--config", "stage1:l32", "--workdir", "a b"]
    assert asked == ["--kill-on-bad-exit=1", *train]
    lines = file.read_text().splitlines()
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH "))
    assert options["ntasks-per-node"] == "1"
    signal, _, seconds = options["signal"].partition("@")  # to the processes of srun, at which a training saves
    assert signal == "TERM"
    assert int(seconds) >= 60
    # sbatch reads its options up to the first command only.
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])


def joined(monkeypatch, variables: dict[str, str], mpi4py: bool = False):
    for name in (*slurm(0, 61440), *open_mpi(0, 61440), "PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launchers.importlib.util, "find_spec", lambda name: mpi4py or None)
    return launchers.several_processes()


ALONE_ON_ITS_NODE = {"SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "0"}
OPEN_MPI_5 = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
OTHER_MPI = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALNRANKS": "1"}
SLURM = {"cluster_detection_method": "slurm", "num_processes": 2}


@pytest.mark.parametrize(
    ("variables", "mpi4py", "by", "arguments"),
    [
        # JAX itself gives a process of Slurm and Open MPI the one GPU of its local number. [] means all that it sees.
        (slurm(1, 61440), False, "srun", SLURM),
        (slurm(1, 61440) | ALONE_ON_ITS_NODE, False, "srun", {**SLURM, "local_device_ids": []}),
        (slurm(1, 61440) | {"CUDA_VISIBLE_DEVICES": "0"}, False, "srun", {**SLURM, "local_device_ids": []}),
        (slurm(1, 61440) | {"CUDA_VISIBLE_DEVICES": "0,1"}, False, "srun", SLURM),
        (slurm(1, 61440) | ALONE_ON_ITS_NODE | {"JAX_LOCAL_DEVICE_IDS": "3"}, False, "srun", SLURM),
        (open_mpi(1, 61440), False, "mpirun", {"cluster_detection_method": "ompi"}),
        (slurm(0, 61440, 3) | open_mpi(1, 61440), False, "mpirun", {"cluster_detection_method": "ompi"}),
        (OPEN_MPI_5, True, "MPI", {"cluster_detection_method": "mpi4py"}),
        (OTHER_MPI, True, "MPI", {"cluster_detection_method": "mpi4py", "local_device_ids": []}),
    ],
)
def test_how_a_process_joins(monkeypatch, variables, mpi4py, by, arguments):
    assert joined(monkeypatch, variables, mpi4py) == (f"process 1 of 2, started by {by}", arguments)


# The script of sbatch has these by itself.
IN_A_SCRIPT = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("variables", "warning"),
    [
        ({}, None),
        (slurm(0, 61440, count=1), None),
        (IN_A_SCRIPT, "SLURM_NTASKS is 8, but this process computes alone: start the command with srun"),
        # An interactive shell of salloc is a step of one task.
        (slurm(0, 61440, 8) | {"SLURM_STEP_NUM_TASKS": "1"}, "SLURM_NTASKS is 8, but this process computes alone"),
        (OPEN_MPI_5, "OMPI_COMM_WORLD_SIZE is 2, but this process computes alone: pip install mpi4py"),
        ({"PMI_SIZE": "4"}, "PMI_SIZE is 4, but this process computes alone: pip install mpi4py"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE is 8, but this process computes alone: one process drives all devices"),
    ],
)
def test_a_process_that_computes_alone_says_so(monkeypatch, capsys, variables, warning):
    assert joined(monkeypatch, variables) is None
    monkeypatch.setattr(processes.jax.distributed, "initialize", None)
    processes.initialize_distributed()
    found = capsys.readouterr().out
    assert found.startswith(f"warning: {warning}") if warning else not found


def test_variables_of_jax_come_before_a_launcher(monkeypatch):
    """And a process then drives all GPUs of its machine, whatever its number there."""
    given = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    assert joined(monkeypatch, slurm(0, 61440, 3) | given)[0] == "process 0 of 3, started by srun"

    def initialize(**arguments):
        raise OSError({name: value for name, value in arguments.items() if "timeout" not in name})

    monkeypatch.setattr(processes.jax.distributed, "initialize", initialize)
    with pytest.raises(OSError) as found:
        processes.initialize_distributed()
    assert found.value.args[0] == {
        "coordinator_address": "a:1",
        "num_processes": 2,
        "process_id": 1,
        "cluster_detection_method": "deactivate",
    }
