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

from titok_jax.runtime.messages import first_lines, say_once, shown
from titok_jax.weights.convert import WeightsError

# PyTorch without CUDA, 200 MB in place of gigabytes. It reads files as well.
INSTALL = "pip install torch --index-url https://download.pytorch.org/whl/cpu"

# Keys of a trainer's file under which the weights are.
_WRAPPERS = ("state_dict", "model")

# Dicts that are no weights, by their keys.
_OTHERS = {
    "an optimizer's state": {"state", "param_groups"},
    "a learning rate schedule's state": {"last_epoch", "_step_count"},
}


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
            f"{path} is a PyTorch file and PyTorch is not installed, which is needed to {purpose} it: {INSTALL}, or convert "
            "it to .safetensors where PyTorch is (tools/convert_weights.py)"
        ) from None
    return torch


def _numpy_dtype(tensor: Any, torch: Any) -> np.dtype:
    """The dtype of a tensor. Raises TypeError if numpy does not have it."""
    if tensor.dtype == torch.bfloat16:
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(str(tensor.dtype).removeprefix("torch."))


class _TorchTensor:
    """A PyTorch tensor with a numpy dtype.

    Args:
      mapped: whether the tensor's memory is mapped from the file. Its pages are released once it is copied to an array.
    """

    def __init__(self, tensor: Any, torch: Any, mapped: bool):
        self._tensor, self._bfloat16 = tensor, tensor.dtype == torch.bfloat16
        self._int16, self._mapped = torch.int16, mapped
        self.shape, self.dtype = tuple(tensor.shape), _numpy_dtype(tensor, torch)

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
    """The tensors of a PyTorch file by name, each read on use.

    Raises:
      WeightsError: PyTorch is not installed; the file is damaged or holds other things than tensors; or tensors that claim
        more numbers than the file has.
    """
    torch = import_torch(path, "read")
    mapped = zipfile.is_zipfile(path)  # the old format (before PyTorch 1.6) cannot be mapped into memory
    try:
        if mapped:
            _check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch.load raises RuntimeError, UnpicklingError, EOFError, KeyError, AttributeError, ...
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = next((line for line in lines if "Unsupported" in line or "GLOBAL" in line), lines[0])
        reason = reason.partition(" Please use ")[0]  # which is how to have the code run
        raise WeightsError(
            f"{path} is damaged, or holds more than tensors, such as code, which is not run: {shown(reason)}"
        ) from None
    state = _state_dict(path, state, torch)
    for name, tensor in state.items():
        _check_tensor(path, name, tensor, torch)
    claimed = sum(tensor.nbytes for tensor in state.values())
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in state.values()}
    if claimed > 2 * sum(storages.values()):  # 2: a network may use one tensor under two names
        raise WeightsError(f"{path}: its tensors are of {claimed:,} bytes, but it has only {sum(storages.values()):,}")
    return {name: _TorchTensor(tensor, torch, mapped) for name, tensor in state.items()}


def _state_dict(path: Path, state: Any, torch: Any) -> Mapping[str, Any]:
    """The names and tensors in what a file holds: it may have them under a key, beside other things. Says if so."""

    def is_state_dict(value: Any) -> bool:
        return isinstance(value, Mapping) and all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items()
        )

    if is_state_dict(state):
        return state
    expected = "expected a state dict (names and tensors)"
    if not isinstance(state, Mapping):
        raise WeightsError(f"{path}: {expected}, found {type(state).__name__}")
    for key in _WRAPPERS:
        if key in state and is_state_dict(state[key]):
            others = ", ".join(first_lines([shown(other) for other in state if other != key]))
            say_once(f"{path}: taking what it has under {key!r}" + (f", not {others}" if others else ""))
            return state[key]
    for what, keys in _OTHERS.items():
        if keys <= state.keys():
            raise WeightsError(f"{path} is {what}: {expected} of a model")
    name, value = next((n, v) for n, v in state.items() if not (isinstance(n, str) and isinstance(v, torch.Tensor)))
    raise WeightsError(
        f"{path}: {expected}, found {type(value).__name__} under '{shown(name)}'; save only the state dict of the model"
    )


def _check_tensor(path: Path, name: str, tensor: Any, torch: Any) -> None:
    """Raises WeightsError for a tensor that is not a plain array, or that shows its memory more than once."""
    try:
        _numpy_dtype(tensor, torch)
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_nested
        plain = plain and not tensor.is_neg() and not tensor.is_conj()
    except TypeError:  # a dtype that numpy does not have
        plain = False
    if not plain:
        kind = f"{tensor.dtype} and {tensor.layout} on {tensor.device.type}"
        raise WeightsError(f"{path}: tensor {shown(name)} is {kind}, which is not read")
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise WeightsError(
            f"{path}: tensor {shown(name)} is of {tensor.nbytes:,} bytes, but the file has only "
            f"{tensor.untyped_storage().nbytes():,} for it"
        )


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
