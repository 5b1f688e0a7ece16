"""Runs with several processes: how the processes connect, and how they notice that one has died."""

import glob
import os
import re
import urllib.error
import urllib.request

import jax
from jax.experimental import multihost_utils

from titok_jax.runtime import launchers

# A process that dies silently is noticed after this time. The others then end too, so that all can be restarted together.
HEARTBEAT_SECONDS = 30

# How long a process waits for the others when it ends, and when it starts.
SHUTDOWN_SECONDS, START_SECONDS = 60, 300


def initialize_distributed() -> None:
    """Connects this process to the other processes of its run. Call it before anything asks JAX for its devices.

    The first of these that is there decides:

    - The variables JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0, to which all connect), JAX_NUM_PROCESSES and
      JAX_PROCESS_ID, all three.
    - A launcher that started several processes: Slurm's `srun`, Open MPI's `mpirun`. With other kinds of MPI, and with Open
      MPI from version 5 on, JAX needs the package mpi4py.
    - A TPU pod, on which the same command is started on every host.

    JAX finds the other processes itself (`jax.distributed.initialize`). One process on a machine drives all of its devices.
    Of several on a machine, started by a launcher, each has the one GPU of its local number, as JAX has it; the variable
    JAX_LOCAL_DEVICE_IDS says otherwise. In all other cases this function connects nothing, and prints a warning if the
    environment speaks of several processes.

    If a process dies, the others end with an error within `HEARTBEAT_SECONDS` instead of waiting for ever. A second call
    does nothing.

    Raises:
      ValueError: only some of the variables are set, or their values are wrong; or this machine has TPU chips that JAX
        cannot use, and JAX_PLATFORMS does not ask for the CPU.
    """
    if jax.distributed.is_initialized():
        return
    tpu = _has_tpu() and os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu")
    who, arguments = _named_by_variables() or launchers.several_processes() or (_pod() if tpu else None) or ("", None)
    if arguments is not None:
        print(f"{who}: waiting for the others, {START_SECONDS} s at most; was the command started for all?", flush=True)
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    elif warning := launchers.alone():
        print(f"warning: {warning}", flush=True)
    if tpu and jax.default_backend() == "cpu":
        raise ValueError(
            "this machine has TPU chips, but JAX found the CPU only; is libtpu installed (pip install 'jax[tpu]'), and does "
            "no other process hold the chips? To compute on the CPU, set JAX_PLATFORMS=cpu"
        )
    if arguments is not None:
        # The first exchange of arrays between CPUs (gloo) waits only half a minute. A loaded machine may need longer to
        # start all processes, so they first wait for each other at the coordinator.
        from orbax.checkpoint import multihost

        multihost.get_barrier_sync_fn()(key="titok_jax_started", timeout_ms=1000 * START_SECONDS)
        multihost_utils.sync_global_devices("started")


def _named_by_variables() -> launchers.Joined | None:
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if not given:
        return None
    try:
        address, count, index = given[names[0]], int(given[names[1]]), int(given[names[2]])
    except (KeyError, ValueError):
        found = ", ".join(f"{name}={given.get(name, '')}" for name in names)
        raise ValueError(f"expected HOST:PORT and two numbers in the environment, found {found}") from None
    if ":" not in address or not 0 <= index < count:
        raise ValueError(f"{names[0]} is {address!r}, expected HOST:PORT; {names[2]} is {index}, expected 0 to {count - 1}")
    arguments = {"coordinator_address": address, "num_processes": count, "process_id": index}
    # Otherwise JAX would look for a launcher all the same, and take its number of this process for that of its only GPU.
    arguments["cluster_detection_method"] = "deactivate"
    return f"process {index} of {count} at {address}", arguments


def _pod() -> launchers.Joined | None:
    hosts = _tpu_hosts()
    return (f"a host of {hosts} with TPU chips", {}) if hosts > 1 else None


def _has_tpu() -> bool:
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))  # up to v4; from v5e on


def _tpu_hosts() -> int:
    """The number of hosts in all TPU slices of this run, from the environment (GKE) or Google's metadata server.

    Returns 1 if neither knows it, for example on a TPU machine that is not part of a pod.
    """
    slices = os.environ.get("MEGASCALE_NUM_SLICES")
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    if not hosts:
        hosts = _metadata("worker-network-endpoints")
        # Machines of a queued resource with several slices have a line "MEGASCALE_NUM_SLICES: '2'" there.
        line = re.search(r"^MEGASCALE_NUM_SLICES: *'?(\d+)", _metadata("tpu-env"), re.MULTILINE) if hosts else None
        slices = slices or (line and line[1])
    return len(hosts.split(",")) * int(slices or 1)


def _metadata(name: str) -> str:
    url = f"http://metadata.google.internal/computeMetadata/v1/instance/attributes/{name}"
    try:
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        with urllib.request.urlopen(request, timeout=5) as reply:
            return reply.read().decode()
    except (urllib.error.URLError, TimeoutError):
        return ""
