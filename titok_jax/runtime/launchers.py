"""What starts several processes of one command: Slurm's `srun`, and `mpirun`. Imports no JAX.

JAX reads their variables itself. This file says which of its methods to take, and which GPUs a process drives.
"""

import importlib.util
import os
from typing import Any

# How a process is named in messages, and arguments for `jax.distributed.initialize`.
Joined = tuple[str, dict[str, Any]]

# What JAX reads of Slurm. `sbatch` and `salloc` set some of these by themselves; only `srun` sets all.
_OF_A_STEP = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")

# Variables with the number of processes, and what to do when a process computes alone although there should be several.
_BY_HAND = "set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID for each"
_SIZES = {
    "OMPI_COMM_WORLD_SIZE": f"pip install mpi4py, with which JAX finds the processes of this MPI; or {_BY_HAND}",
    "PMI_SIZE": f"pip install mpi4py, with which JAX finds the processes of this MPI; or {_BY_HAND}",
    "SLURM_NTASKS": "start the command with srun",
    "WORLD_SIZE": f"one process drives all devices of a machine, so one is enough on one machine; on several, {_BY_HAND}",
}


def several_processes() -> Joined | None:
    """How this process joins the others, if a launcher has started more than one; else None."""
    # Open MPI comes first, as in JAX: inside a Slurm job, its processes also have the variables of the step that started it.
    if (count := _number("OMPI_COMM_WORLD_SIZE")) > 1:
        method = "ompi" if "OMPI_MCA_orte_hnp_uri" in os.environ else "mpi4py"  # which version 5 no longer sets
        index, mine = _number("OMPI_COMM_WORLD_RANK"), _number("OMPI_COMM_WORLD_LOCAL_SIZE") == 1
    elif all(name in os.environ for name in _OF_A_STEP) and (count := _tasks()) > 1:
        method, index, mine = "slurm", _number("SLURM_PROCID"), _number("SLURM_STEP_NUM_NODES") == count
    elif (count := _number("PMI_SIZE")) > 1:
        method, index, mine = "mpi4py", _number("PMI_RANK"), _number("MPI_LOCALNRANKS") == 1
    else:
        return None
    if method == "mpi4py" and importlib.util.find_spec("mpi4py") is None:
        return None
    arguments: dict[str, Any] = {"cluster_detection_method": method}
    if method == "slurm":
        arguments["num_processes"] = count
    # JAX would give every process the one GPU of its local number: also a process that is alone on its machine, and one to
    # which the launcher shows a single GPU, whose number is then 0. An empty list means all that the process sees.
    sees_one = bool(gpus := os.environ.get("CUDA_VISIBLE_DEVICES")) and "," not in gpus
    if (mine or sees_one) and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        arguments["local_device_ids"] = []
    by = {"slurm": "srun", "ompi": "mpirun", "mpi4py": "MPI"}[method]
    return f"process {index} of {count}, started by {by}", arguments


def alone() -> str | None:
    """A warning for a process that computes alone, if the environment speaks of several processes."""
    for name, advice in _SIZES.items():
        if (count := _number(name)) > 1:
            return f"{name} is {count}, but this process computes alone: {advice}"
    return None


def _tasks() -> int:
    """The number of processes in this step of a Slurm job. An interactive shell is a step of one, in a job of any size."""
    return _number("SLURM_STEP_NUM_TASKS") or _number("SLURM_NTASKS")


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else 0
