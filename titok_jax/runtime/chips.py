"""Accelerators: what their makers publish of them. Imports no JAX."""

from typing import NamedTuple


class Chip(NamedTuple):
    """A TPU chip. A chip with megacore (v4, v5p) is one device. All figures except `clock_ghz` are published.

    Attributes:
      topology: name in topology descriptions.
      device_kinds: what JAX calls a device of it.
      hbm: GiB of memory that the compiler lets a program use.
      tflops: peak TFLOP/s in bfloat16; a multiply-add counts as two operations.
      clock_ghz: the clock at which the matrix units reach `tflops`. It converts the compiler's cycles to seconds.
      ici: GB/s out of a chip over all its links, in one direction.
      bandwidth: GB/s of the chip's memory.
      cores: TensorCores.
    """

    topology: str
    device_kinds: tuple[str, ...]
    hbm: float
    tflops: float
    clock_ghz: float
    ici: float
    bandwidth: float
    cores: int


CHIPS = {
    "v4": Chip("v4", ("TPU v4",), 30.75, 275.0, 1.05, 150.0, 1228.0, 2),
    "v5e": Chip("v5e", ("TPU v5 lite", "TPU v5e"), 15.75, 197.0, 1.5, 100.0, 819.0, 1),
    "v5p": Chip("v5p", ("TPU v5", "TPU v5p"), 95.74, 459.0, 1.75, 300.0, 2765.0, 2),
    "v6e": Chip("v6e", ("TPU v6 lite", "TPU v6e"), 31.25, 918.0, 1.75, 224.0, 1640.0, 1),
}

# Peak TFLOP/s of GPUs in bfloat16 without sparsity, by the beginning of what JAX calls them. A longer name counts first.
_GPUS = {
    "NVIDIA A100": 312.0,
    "NVIDIA H100": 989.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA H200": 989.0,
    "NVIDIA L4": 121.0,
    "NVIDIA L40S": 362.0,
}


def peak_tflops(device_kind: str) -> float | None:
    """The peak TFLOP/s in bfloat16 of a device, by `jax.Device.device_kind`; None if it is not known."""
    for chip in CHIPS.values():
        if device_kind in chip.device_kinds:
            return chip.tflops
    found = [name for name in _GPUS if f"{device_kind} ".startswith((f"{name} ", f"{name}-"))]
    return _GPUS[max(found, key=len)] if found else None
