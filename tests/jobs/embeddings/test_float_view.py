"""float_view: packed vectors as lists of numbers."""

from __future__ import annotations

import pytest
from data import topics
from pyspark.sql import SparkSession

from jobs.embeddings.float_view import as_float_arrays
from jobs.embeddings.packed import pack


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_float_view_shows_the_vectors(dtype: str, spark: SparkSession) -> None:
    x = topics(5, 4).astype(dtype)
    rows = [(packed, 4) for packed in pack(x, dtype).to_pylist()]
    shown = as_float_arrays(spark.createDataFrame(rows, "embedding BINARY, dim INT")).collect()
    assert [row["embedding"] for row in shown] == x.tolist()
