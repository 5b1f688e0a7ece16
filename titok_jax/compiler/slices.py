"""TPU slices: their chips, and descriptions of their devices for compilation without a TPU."""

import importlib.metadata
import os
from typing import Any

from titok_jax.runtime.chips import CHIPS, Chip

# {Google's name: topology}. The names of v4 and v5p count TensorCores, two per chip: v5p-128 is 64 chips. Those of v5e and
# v6e count chips. gcloud writes v5litepod-16 for v5e-16 (`named_slice`). "2xv5e-256" is two slices v5e-256.
SLICES = {
    "v4-8": "2x2x1",
    "v4-32": "2x2x4",
    "v5e-4": "2x2",
    "v5e-16": "4x4",
    "v5e-256": "16x16",
    "2xv5e-256": "16x16",
    "v5p-32": "2x2x4",
    "v5p-128": "4x4x4",
    "v5p-256": "4x4x8",
    "v6e-64": "8x8",
    "v6e-256": "16x16",
}


def named_slice(name: str) -> str:
    """The name of a slice here, given that or gcloud's: "v5litepod-16" -> "v5e-16".

    Raises:
      ValueError: an unknown slice.
    """
    found = name.replace("v5litepod-", "v5e-")
    if found not in SLICES:
        raise ValueError(f"--slice is {name!r}, expected one of {', '.join(SLICES)}")
    return found


def _split(name: str) -> tuple[int, str]:
    """The number of slices, and the chip: "2xv5e-256" -> (2, "v5e")."""
    number, _, one = name.rpartition("x")
    return int(number or 1), one.split("-")[0]


def slice_chip(name: str) -> Chip:
    """The chip of a slice, or of several.

    Raises:
      ValueError: an unknown slice.
    """
    return CHIPS[_split(named_slice(name))[1]]


def topology_devices(name: str) -> list[Any]:
    """The devices of a slice, or of several, one per chip, for compilation. Call this before any other use of JAX.

    Raises:
      ValueError: an unknown slice, or the TPU compiler is not installed.
    """
    chip = slice_chip(name)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("the TPU compiler is not installed: pip install libtpu, of the version in constraints.txt")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # otherwise libtpu asks the metadata server of a cloud machine
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several processes may load it: none holds a chip
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from jax.experimental import topologies

    # On v4 a device is a chip only with the option "megacore", otherwise a core. On v5p it is always a chip.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if chip.topology == "v4" else {}
    if (slices := _split(name)[0]) > 1:
        options["num_slices"] = slices
    return list(topologies.get_topology_desc(f"{chip.topology}:{SLICES[name]}", "tpu", **options).devices)
