"""Several processes on one run: how they meet, and how a dead one is noticed."""

import glob
import os
import urllib.error
import urllib.request
from typing import Any

import jax
from jax.experimental import multihost_utils

# A process that has died without a word is noticed after so long; the others then end too, to be started again together.
HEARTBEAT_SECONDS = 30


# So long a process that has ended waits for the others, and one that has started for them.
SHUTDOWN_SECONDS, START_SECONDS = 60, 300


def initialize_distributed() -> None:
    """Joins this process to the others of its run; to be called before anything asks JAX for its devices.

    On every host of a TPU pod the same command is started, and JAX finds out the rest. Elsewhere (GPUs, CPUs) each process
    gets three environment variables: JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0, where they meet),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID. On one host without these variables nothing is joined.

    If a process dies, the others end within `HEARTBEAT_SECONDS` with an error, rather than wait for it for ever. Called
    again, this does nothing.

    Raises:
      ValueError: only some of the variables are set, or no numbers; this machine has TPU chips that JAX cannot use, and
        nobody asked for the CPU.
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
        # The first exchange of arrays between CPUs (gloo) waits for half a minute only, which a loaded machine may need to
        # start the others: so all meet at the coordinator first.
        from orbax.checkpoint import multihost

        multihost.get_barrier_sync_fn()(key="titok_jax_started", timeout_ms=1000 * START_SECONDS)
        multihost_utils.sync_global_devices("started")


def _has_tpu() -> bool:
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))  # up to v4, and from v5e on


def _tpu_hosts() -> int:
    """How many hosts the TPU slices of this machine have, as its environment (GKE) or Google's metadata server says; 1 if
    nothing is known, as on machines with a TPU that are no part of a pod."""
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
