"""TPU slices: their chips, and their devices to compile for without one."""

import importlib.metadata
import os
from typing import Any, NamedTuple


class Chip(NamedTuple):
    """A TPU chip; with megacore (v4, v5p) it is one device. Published figures, but for the clock: see `clock_ghz`.

    Attributes:
      topology: name in topology descriptions.
      hbm: GiB of memory that the compiler lets a program use.
      tflops: peak bfloat16 multiply-adds, counted as two operations.
      clock_ghz: the clock at which the matrix units give `tflops`; turns the compiler's cycles into seconds.
      ici: GB/s out of a chip over all its links, in one direction.
    """

    topology: str
    hbm: float
    tflops: float
    clock_ghz: float
    ici: float


CHIPS = {
    "v4": Chip("v4", 30.75, 275.0, 1.05, 150.0),
    "v5e": Chip("v5e", 15.75, 197.0, 1.5, 100.0),
    "v5p": Chip("v5p", 95.74, 459.0, 1.75, 300.0),
    "v6e": Chip("v6e", 31.25, 918.0, 1.75, 224.0),
}


# Google's names: of v4 and v5p they count TensorCores, two to a chip; of v5e and v6e, chips.
SLICES = {
    "v4-8": "2x2x1",
    "v4-32": "2x2x4",
    "v5e-4": "2x2",
    "v5e-16": "4x4",
    "v5p-32": "2x2x4",
    "v5p-128": "4x4x4",
    "v6e-64": "8x8",
    "v6e-256": "16x16",
}


def slice_chip(name: str) -> Chip:
    """The chip of a slice.

    Raises:
      ValueError: an unknown slice.
    """
    if name not in SLICES:
        raise ValueError(f"--slice is {name!r}, expected one of {', '.join(SLICES)}")
    return CHIPS[name.split("-")[0]]


def topology_devices(name: str) -> list[Any]:
    """The devices of a slice, one per chip, to be compiled for. Call it before anything else of JAX.

    Raises:
      ValueError: an unknown slice, or the TPU compiler is not installed.
    """
    chip = slice_chip(name)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("the TPU compiler is not installed: pip install libtpu, of the version in constraints.txt")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # asks the metadata server of a cloud machine otherwise
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # it holds no chip, so it need not be alone on the machine
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from jax.experimental import topologies

    # On v4 a device is a chip where "megacore" is said, else a core; v5p is so by itself.
    options = {"chip_config_name": "megacore"} if chip.topology == "v4" else {}
    return list(topologies.get_topology_desc(f"{chip.topology}:{SLICES[name]}", "tpu", **options).devices)
