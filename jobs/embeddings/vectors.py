"""Columns of vectors, as lists of numbers or as packed bytes, read as matrices."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from jobs.embeddings.packed import Float32
from jobs.files.values import is_bytes, is_list, is_number
from tokenizer.packed import decode


def is_vector(kind: pa.DataType) -> bool:
    """Can a column of this type hold vectors: lists of numbers (or lists that are all empty), or packed bytes."""
    return is_bytes(kind) or (is_list(kind) and (is_number(kind.value_type) or pa.types.is_null(kind.value_type)))


def lengths_of(column: pa.Array) -> npt.NDArray[np.int64]:
    """Components of each row, bytes if it is packed; -1 for null."""
    lengths = pc.binary_length(column) if is_bytes(column.type) else pc.list_value_length(column)
    filled: npt.NDArray[np.int64] = pc.fill_null(lengths, -1).to_numpy(zero_copy_only=False)
    return filled


def matrix_of(column: pa.Array, usable: npt.NDArray[np.bool_], dim: int, dtype: str | None) -> Float32:
    """(N, dim) float32 of the `usable` rows, which have `dim` components, zeros in others; a null component is NaN.

    `dtype` says what the components of a packed column are; None for lists.
    """
    x = np.zeros((len(column), dim), np.float32)
    rows = np.flatnonzero(usable)
    if len(rows) == 0:
        return x
    chosen = column.take(pa.array(rows))
    if dtype is not None:
        flat = decode(b"".join(chosen.to_pylist()), dtype)
    else:
        values = chosen.flatten()
        if pa.types.is_decimal(values.type) or pa.types.is_null(values.type):
            values = values.cast(pa.float64())
        flat = values.to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore"):  # a double beyond float32 becomes Inf
        x[rows] = flat.astype(np.float32).reshape(len(rows), dim)
    return x
