"""Columns of packed vectors: Arrow arrays of bytes to float32 matrices and back.

`item_embeddings` has float32 or float16. Sources may have more types, which `infer_packed` infers from samples where
only one fits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from jobs.errors import SchemaError
from tokenizer.packed import DTYPES, STORED, decode, width_of

Float32 = npt.NDArray[np.float32]
MAX_SPREAD = 5.0  # in powers of two, of the middle half of the components: 1.9 for normally distributed ones
LEAST_FLOAT16 = 2.0**-12  # typical component; smaller ones are too coarse in float16 to be of use


def unpack(column: pa.Array, dim: int) -> Float32:
    """(N, dim) float32 from a binary Arrow array without nulls; a view of the Arrow memory where it is float32 already.

    Raises:
        SchemaError: a row is not `dim` components of one width.
    """
    n = len(column)
    if n == 0:
        return np.empty((0, dim), np.float32)
    _, offset_buffer, data = column.buffers()
    offset_type = np.int64 if pa.types.is_large_binary(column.type) else np.int32
    offsets = np.frombuffer(offset_buffer, offset_type)[column.offset : column.offset + n + 1]
    lengths = np.diff(offsets)
    dtype = next((dtype for dtype in STORED if (lengths == dim * width_of(dtype)).all()), None)
    if dtype is None:
        raise SchemaError(
            f"packed embeddings hold {sorted(set(lengths.tolist()))[:5]} bytes; expected {4 * dim} (float32) or "
            f"{2 * dim} (float16) in every row, for dimension {dim}"
        )
    return decode(memoryview(data)[offsets[0] : offsets[-1]], dtype).reshape(n, dim)


def pack(x: npt.NDArray[np.floating[Any]], dtype: str, valid: npt.NDArray[np.bool_] | None = None) -> pa.Array:
    """Rows of x (N, D) as a binary array of `dtype` float32 or float16; null where not `valid`."""
    stored = np.ascontiguousarray(x, DTYPES[dtype])
    n, width = len(stored), stored.shape[1] * stored.itemsize
    offsets = pa.array(np.arange(n + 1) * width).cast(pa.int32())  # refuses to pass 2 GiB
    bitmap = None if valid is None else pa.array(valid).buffers()[1]
    return pa.Array.from_buffers(pa.binary(), n, [bitmap, offsets.buffers()[1], pa.py_buffer(stored)])


def infer_packed(rows: Sequence[bytes], column: str, dim: int | None, dtype: str | None = None) -> tuple[str, int]:
    """The dtype and dimension of the packed `column` of which `rows` is a sample, where `dim` and `dtype` do not say.

    The commonest length of a row decides, if it is that of more than half of them. With `dim` it gives the width of a
    component: 8 bytes are float64, 4 float32. The types that remain are tried on the rows: floats that are really of
    another width or kind have components that are no numbers, spread over many orders of magnitude, or have zeros at
    every other position. The only type that gives plausible vectors is the result. int8 and uint8 look like any bytes:
    they must be named.

    Raises:
        SchemaError: no type is plausible, or several are.
    """
    lengths = Counter(len(row) for row in rows if row)
    remedy = f"Say what they are: load.packed_dtype={{{column} = 'float32'}} (or {', '.join(list(DTYPES)[1:])})"
    if not lengths:
        raise SchemaError(
            f"column {column!r} of packed vectors: its first rows hold none; expected bytes. "
            f"If they come later, give load.dims={{{column} = D}} and load.packed_dtype={{{column} = 'float32'}}"
        )
    if dim is not None:
        fitting = Counter({n: count for n, count in lengths.items() if n in (dim, 2 * dim, 4 * dim, 8 * dim)})
        if not fitting:
            raise SchemaError(
                f"column {column!r} has rows of {_counted(lengths)} bytes; none is 2, 4 or 8 times the dimension "
                f"{dim}. Expected vectors of {dim} components; set load.dims={{{column} = D}} to another number if "
                "they are right"
            )
        lengths = fitting
    length, count = lengths.most_common(1)[0]
    if dtype is None and 2 * count <= lengths.total():
        raise SchemaError(
            f"column {column!r} has rows of {_counted(lengths)} bytes and none has the majority. {remedy}"
        )
    if dtype is not None:
        if dim is None and length % width_of(dtype):
            raise SchemaError(
                f"column {column!r} has rows of {length} bytes, which are no {dtype} of {width_of(dtype)} bytes each. "
                f"{remedy}"
            )
        return dtype, dim or length // width_of(dtype)
    floats = [name for name in DTYPES if "float" in name and length % width_of(name) == 0]
    if dim is not None:
        floats = [name for name in floats if width_of(name) * dim == length]
        if len(floats) == 1:
            return floats[0], dim
    chosen = [row for row in rows if len(row) == length]
    plausible = [name for name in floats if _plausible(chosen, name)]
    if len(plausible) != 1:
        could_be = " or ".join(f"{length // width_of(name)} {name}" for name in plausible)
        raise SchemaError(
            f"column {column!r} has rows of {length} bytes, which "
            + (f"could be {could_be}. {remedy}" if plausible else f"look like vectors under no float type. {remedy}")
        )
    return plausible[0], length // width_of(plausible[0])


def _counted(lengths: Counter[int]) -> str:
    return ", ".join(f"{length} ({count} rows)" for length, count in lengths.most_common(4))


def _plausible(rows: Sequence[bytes], dtype: str) -> bool:
    """Do rows of one length look like vectors of `dtype`, at their even and at their odd positions?"""
    with np.errstate(invalid="ignore", over="ignore"):
        x = np.abs(decode(b"".join(rows), dtype).astype(np.float64)).reshape(len(rows), -1)
    x = x[np.isfinite(x).all(1)]
    if 2 * len(x) < len(rows):
        return False
    lanes = [lane[lane > 0] for lane in (x[:, 0::2], x[:, 1::2]) if lane.size]
    if any(not len(lane) for lane in lanes):
        return False
    least, most = (LEAST_FLOAT16, 2.0**16) if dtype == "float16" else (2.0**-40, 2.0**40)
    for lane in lanes:
        first, middle, third = np.quantile(np.log2(lane), [0.25, 0.5, 0.75])
        if third - first > MAX_SPREAD or not np.log2(least) <= middle <= np.log2(most):
            return False
    return True
