"""Releases and IDs of a warehouse as rows of plain Delta tables, written without Spark, and a registry beside them."""

from __future__ import annotations

import sqlite3
import tempfile
from contextlib import closing
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import pyarrow as pa
from deltalake import write_deltalake

from jobs.models.registry import Registry, open_registry
from jobs.read_config import load_config


def silent(_: str) -> None: ...


@cache
def _empty_store() -> bytes:
    """MLflow's default store before anything is in it; to make one takes seconds."""
    with tempfile.TemporaryDirectory() as folder:
        open_registry(load_config(warehouse=folder), folder)
        return Path(folder, "mlflow.db").read_bytes()


def opened(root: Path, *settings: str) -> Registry:
    """The registry of a warehouse there; by default one of its own."""
    root.mkdir(exist_ok=True)
    store = root / "mlflow.db"
    if not settings and not store.exists():
        store.write_bytes(_empty_store())
        with closing(sqlite3.connect(store)) as db, db:
            db.execute("UPDATE experiments SET artifact_location = ?", (f"{root}/mlflow_artifacts",))
    return open_registry(load_config(overrides=settings, warehouse=str(root)), str(root))


def release(registry: Registry, *made: tuple[int, str, str]) -> None:
    """The releases of these versions, hashes and statuses, in order."""
    numbers = range(1, len(made) + 1)
    columns = {
        "release_id": pa.array(numbers, pa.int64()),
        "codebook_version": pa.array([version for version, _, _ in made], pa.int32()),
        "codebook_hash": pa.array([name for _, name, _ in made]),
        "table_versions": pa.array([[("semantic_ids", 1)]] * len(made), pa.map_(pa.string(), pa.int64())),
        "previous": pa.array([n - 1 or None for n in numbers], pa.int64()),
        "status": pa.array([status for _, _, status in made]),
        "at": pa.array([datetime(2026, 1, n, tzinfo=UTC) for n in numbers], pa.timestamp("us", "UTC")),
    }
    write_deltalake(f"{registry.root}/releases", pa.table(columns))


def write_ids(registry: Registry, *rows: tuple[int, str]) -> None:
    """IDs of these codebook versions and hashes."""
    table = pa.table(
        {
            "codebook_version": pa.array([version for version, _ in rows], pa.int32()),
            "codebook_hash": [name for _, name in rows],
        }
    )
    write_deltalake(f"{registry.root}/semantic_ids", table, partition_by=["codebook_version"], mode="append")
