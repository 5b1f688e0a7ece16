"""A tensor in a file, and the dtypes and shapes that files may hold."""

import math
from collections.abc import Callable
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from titok_jax.weights.convert import WeightsError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

MOST_AXES = 32
MOST_TENSORS = 100_000  # in a file


def num_bytes(shape: Any, dtype: np.dtype) -> int | None:
    """The number of bytes of a tensor whose shape a file gives; None if it cannot be the shape of one: it is no list of at
    most 32 whole numbers from 0 to 2**63 - 1. (The product of a long list of long numbers would take minutes.)"""
    if not isinstance(shape, list | tuple) or len(shape) > MOST_AXES:
        return None
    if any(type(number) is not int or not 0 <= number < 2**63 for number in shape):
        return None
    return math.prod(shape) * dtype.itemsize


class Tensor:
    """A tensor in a file. Its data is read when it is converted to an array.

    Args:
      verify: a function of the array's bytes that raises WeightsError if they are not the ones written.
    """

    def __init__(
        self,
        file: BinaryIO,
        offset: int,
        shape: tuple[int, ...],
        dtype: np.dtype,
        verify: Callable[[np.ndarray], None] | None = None,
    ):
        self._file, self._offset, self._verify = file, offset, verify
        self.shape, self.dtype = shape, dtype

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = np.empty(self.shape, self.dtype)
        raw = array.reshape(-1).view(np.uint8)
        if array.nbytes:
            self._file.seek(self._offset)
            if self._file.readinto(raw) != array.nbytes:
                raise WeightsError(f"{self._file.name} became shorter while it was read")
        if self._verify is not None:
            self._verify(raw)
        return array if dtype is None else array.astype(dtype)
