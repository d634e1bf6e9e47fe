"""Packed vectors: the components of a row as little-endian bytes, one after the other.

What is stored is float32 or float16, which the number of bytes tells apart. Packed vectors of other programs
may have any type of DTYPES.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tokenizer.errors import DataError

DTYPES = {  # what a component is -> NumPy type of its bytes
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "<u2",
    "float64": "<f8",
    "int8": "<i1",
    "uint8": "<u1",
}
STORED = ("float32", "float16")


def width_of(dtype: str) -> int:
    """Bytes of a component."""
    return np.dtype(DTYPES[dtype]).itemsize


def decode(data: bytes | memoryview, dtype: str) -> npt.NDArray[Any]:
    """The components in `data`, float64 for float64, float32 for others; a view where they are float32 already."""
    numbers = np.frombuffer(data, DTYPES[dtype])
    if dtype == "bfloat16":  # the upper half of a float32
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers.astype(np.float64 if dtype == "float64" else np.float32, copy=False)


def stored_dtype(size: int, dim: int) -> str:
    """Of which of STORED a row of `size` bytes is, for `dim` components.

    Raises:
        DataError: of neither.
    """
    for dtype in STORED:
        if size == dim * width_of(dtype):
            return dtype
    raise DataError(
        f"an embedding has {size} bytes; expected {4 * dim} (float32) or {2 * dim} (float16), for dimension {dim}"
    )


def unpack_row(row: bytes, dim: int) -> npt.NDArray[np.float32]:
    """(dim,) components of one stored row.

    Raises:
        DataError: it has bytes for another number of components.
    """
    return decode(row, stored_dtype(len(row), dim))
