"""Makers of test data: small, seeded, with a structure the tests can reason about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def topics(items: int, dim: int, *, groups: int = 8, spread: float = 0.1, seed: int = 0) -> np.ndarray:
    """(items, dim) float32: `groups` well separated clouds, item n in cloud n % groups."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(groups, dim))
    x = centres[np.arange(items) % groups] + spread * generator.normal(size=(items, dim))
    return x.astype(np.float32)


def write_vectors(path: Path, ids: list[Any], **columns: list[Any] | np.ndarray) -> Path:
    """A Parquet file of item_id and vector columns; a row of a column may be None or of any length."""
    arrays = {name: list(values) for name, values in columns.items()}
    table = pa.table({"item_id": pa.array(ids), **{name: pa.array(rows) for name, rows in arrays.items()}})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path
