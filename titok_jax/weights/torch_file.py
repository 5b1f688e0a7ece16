"""PyTorch files: a pickle, inside a zip archive since PyTorch 1.6. This is the only module that imports torch."""

import ctypes
import mmap
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from titok_jax.weights.convert import WeightsError


def import_torch(path: Path, purpose: str):
    """Returns the module torch. If it is not installed, raises WeightsError.

    Args:
      path: the PyTorch file.
      purpose: what torch is needed for, "read" or "write".
    """
    try:
        import torch
    except ImportError:
        raise WeightsError(
            f"{path} is a PyTorch file and PyTorch is not installed, which is needed to {purpose} it: "
            "pip install torch, or convert it to .safetensors where PyTorch is (tools/convert_weights.py)"
        ) from None
    return torch


class _TorchTensor:
    """A PyTorch tensor with a numpy dtype.

    Args:
      mapped: whether the tensor's memory is mapped from the file. Its pages are released once it is copied to an array.
    """

    def __init__(self, tensor: Any, torch: Any, mapped: bool):
        self._tensor, self._bfloat16 = tensor, tensor.dtype == torch.bfloat16
        self._int16, self._mapped = torch.int16, mapped
        self.shape = tuple(tensor.shape)
        name = str(tensor.dtype).removeprefix("torch.")
        self.dtype = np.dtype(ml_dtypes.bfloat16) if self._bfloat16 else np.dtype(name)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        tensor = self._tensor.detach()
        array = tensor.view(self._int16).numpy().view(ml_dtypes.bfloat16) if self._bfloat16 else tensor.numpy()
        array = np.array(array, dtype)
        if self._mapped:
            storage = tensor.untyped_storage()
            _release(storage.data_ptr(), storage.nbytes())
        return array


def _release(address: int, length: int) -> None:
    """Releases the memory of an unchanged, private file mapping. Later accesses read the file again."""
    if length and hasattr(mmap, "MADV_DONTNEED"):
        start = address // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(address + length - start), ctypes.c_int(mmap.MADV_DONTNEED)
        )


def _check_archive(path: Path) -> None:
    """Checks a PyTorch zip archive against its checksums, if it has them. PyTorch itself does not check them."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if compressed or sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("its archive is not one of PyTorch")
        for entry in entries:
            with archive.open(entry) as file:
                while entry.CRC and file.read(1 << 20):
                    pass


def read_torch(path: Path) -> dict[str, _TorchTensor]:
    torch = import_torch(path, "read")
    mapped = zipfile.is_zipfile(path)  # the old format (before PyTorch 1.6) cannot be mapped into memory
    try:
        if mapped:
            _check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch.load raises RuntimeError, UnpicklingError, EOFError, KeyError, AttributeError, ...
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = next((line for line in lines if "Unsupported" in line or "GLOBAL" in line), lines[0])
        raise WeightsError(
            f"{path} is damaged, or holds more than tensors, such as code, which is not run: {reason[:300]}"
        ) from None
    if not isinstance(state, Mapping):
        raise WeightsError(f"{path}: expected a state dict (names and tensors), found {type(state).__name__}")
    tensors = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise WeightsError(
                f"{path}: expected a state dict (names and tensors), found {type(tensor).__name__} under {name!r}; save "
                "only the state dict of the model"
            )
        try:
            tensors[name] = _TorchTensor(tensor, torch, mapped)
            if tensor.layout != torch.strided:
                raise TypeError
        except TypeError:
            raise WeightsError(f"{path}: tensor {name} is {tensor.dtype} and {tensor.layout}, which is not read") from None
    return tensors


def write_torch(path: str | os.PathLike, tensors: Mapping[str, Any]) -> None:
    """Writes {name: tensor} as `torch.save` writes a state dict. Returns when it is on the disk.

    Raises:
      WeightsError: PyTorch is not installed.
    """
    torch = import_torch(Path(path), "write")
    state = {}
    for name, tensor in tensors.items():
        array = np.array(tensor)  # a copy, because PyTorch does not accept read-only arrays
        if array.dtype == ml_dtypes.bfloat16:
            state[name] = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        else:
            state[name] = torch.from_numpy(array)
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
