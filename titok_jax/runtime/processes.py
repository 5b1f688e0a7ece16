"""Runs with several processes: how the processes connect, and how they notice that one has died."""

import glob
import os
import urllib.error
import urllib.request
from typing import Any

import jax
from jax.experimental import multihost_utils

# A process that dies silently is noticed after this time. The others then end too, so that all can be restarted together.
HEARTBEAT_SECONDS = 30

# How long a process waits for the others when it ends, and when it starts.
SHUTDOWN_SECONDS, START_SECONDS = 60, 300


def initialize_distributed() -> None:
    """Connects this process to the other processes of its run. Call it before anything asks JAX for its devices.

    On a TPU pod, start the same command on every host; JAX finds the other hosts. On GPUs and CPUs, each process needs three
    environment variables: JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0, to which all connect), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID. On one host without these variables, this function connects nothing.

    If a process dies, the others end with an error within `HEARTBEAT_SECONDS` instead of waiting for ever. A second call
    does nothing.

    Raises:
      ValueError: only some of the variables are set, or their values are wrong; or this machine has TPU chips that JAX
        cannot use, and JAX_PLATFORMS does not ask for the CPU.
    """
    if jax.distributed.is_initialized():
        return
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    tpu = _has_tpu() and os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu")
    arguments: dict[str, Any] | None = None
    if given:
        try:
            address, count, index = given[names[0]], int(given[names[1]]), int(given[names[2]])
        except (KeyError, ValueError):
            found = ", ".join(f"{name}={given.get(name, '')}" for name in names)
            raise ValueError(f"expected HOST:PORT and two numbers in the environment, found {found}") from None
        if ":" not in address or not 0 <= index < count:
            raise ValueError(
                f"{names[0]} is {address!r}, expected HOST:PORT; {names[2]} is {index}, expected 0 to {count - 1}"
            )
        who = f"process {index} of {count} at {address}"
        arguments = {"coordinator_address": address, "num_processes": count, "process_id": index}
    elif tpu and _tpu_hosts() > 1:
        who, arguments = f"a host of {_tpu_hosts()} with TPU chips", {}
    if arguments is not None:
        print(f"{who}: waiting for the others, {START_SECONDS} s at most; was the command started for all?", flush=True)
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
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


def _has_tpu() -> bool:
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))  # up to v4; from v5e on


def _tpu_hosts() -> int:
    """The number of hosts in this machine's TPU slices, from its environment (GKE) or Google's metadata server.

    Returns 1 if neither knows it, for example on a TPU machine that is not part of a pod.
    """
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES") or _metadata("worker-network-endpoints")
    slices = os.environ.get("MEGASCALE_NUM_SLICES") or "1"
    return len(hosts.split(",")) * int(slices)


def _metadata(name: str) -> str:
    url = f"http://metadata.google.internal/computeMetadata/v1/instance/attributes/{name}"
    try:
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        with urllib.request.urlopen(request, timeout=5) as reply:
            return reply.read().decode()
    except (urllib.error.URLError, TimeoutError):
        return ""
