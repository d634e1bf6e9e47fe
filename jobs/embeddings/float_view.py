"""`item_embeddings` with vectors as lists of numbers, for people and SQL."""

from __future__ import annotations

import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from tokenizer.packed import unpack_row


def as_float_arrays(embeddings: DataFrame) -> DataFrame:
    """`item_embeddings` with `embedding` as ARRAY<FLOAT>; several times slower to move than the bytes."""

    # In Arrow, not pandas, whose import every worker of every job would wait a second for.
    def floats(packed: pa.Array, dim: pa.Array) -> pa.Array:
        rows = zip(packed.to_pylist(), dim.to_pylist(), strict=True)
        return pa.array([unpack_row(data, d) for data, d in rows], pa.list_(pa.float32()))

    packed_floats = F.arrow_udf(floats, "array<float>")  # type: ignore[attr-defined]
    return embeddings.withColumn("embedding", packed_floats("embedding", "dim"))
