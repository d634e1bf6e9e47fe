"""Packed vectors: a row of float32 or float16 components as little-endian bytes, the form in which Spark moves them fastest."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from jobs.tables import SchemaError

Float32 = npt.NDArray[np.float32]
WIDTHS = {4: "<f4", 2: "<f2"}  # bytes a component -> NumPy type


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
    width = int(lengths[0]) // dim
    if width not in WIDTHS or (lengths != width * dim).any():
        raise SchemaError(
            f"packed embeddings hold {sorted(set(lengths.tolist()))[:5]} bytes; expected {4 * dim} (float32) or {2 * dim} "
            f"(float16) in every row, for dimension {dim}"
        )
    flat = np.frombuffer(data, WIDTHS[width], count=n * dim, offset=int(offsets[0]))
    return flat.reshape(n, dim).astype(np.float32, copy=False)


def pack(x: Float32, dtype: str, valid: npt.NDArray[np.bool_] | None = None) -> pa.Array:
    """Rows of (N, D) as a binary array, `dtype` float32 or float16; null where not `valid`. No row is copied by itself."""
    stored = np.ascontiguousarray(x, {"float32": "<f4", "float16": "<f2"}[dtype])
    n, width = len(stored), stored.shape[1] * stored.itemsize
    offsets = pa.array(np.arange(n + 1) * width).cast(pa.int32())  # refuses to pass 2 GiB
    bitmap = None if valid is None else pa.array(valid).buffers()[1]
    return pa.Array.from_buffers(pa.binary(), n, [bitmap, offsets.buffers()[1], pa.py_buffer(stored)])


def as_float_arrays(embeddings: DataFrame) -> DataFrame:
    """`item_embeddings` with `embedding` as ARRAY<FLOAT>, for people and SQL; several times slower to move than the bytes."""

    # In Arrow, not pandas, whose import every worker of every job would wait a second for.
    def floats(packed: pa.Array, dim: pa.Array) -> pa.Array:
        rows = zip(packed.to_pylist(), dim.to_pylist(), strict=True)
        vectors = [np.frombuffer(data, WIDTHS[len(data) // d]).astype("<f4") for data, d in rows]
        return pa.array(vectors, pa.list_(pa.float32()))

    return embeddings.withColumn("embedding", F.arrow_udf(floats, "array<float>")("embedding", "dim"))
