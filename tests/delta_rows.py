"""Rows of `releases` and `semantic_ids` as plain Delta tables, written without Spark, and a registry beside them."""

from __future__ import annotations

import sqlite3
import tempfile
from contextlib import closing
from datetime import UTC, date, datetime
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import write_deltalake

from jobs.models.registry import CODEBOOK_MODEL, Registry, open_registry, register_lost
from jobs.models.versions import LOST_TAG, CodebookVersion, RegisteredVersion, codebook_tags
from jobs.read_config import load_config


def tags_of(codebook_hash: str, **others: Any) -> dict[str, str]:
    """The tags of a codebook version with this hash."""
    values: dict[str, Any] = {
        "levels": 2,
        "components": 4,
        "dim": 6,
        "method": "annealed",
        "fit_key": "",
        "started_from": None,
        "started_from_version": None,
        "table_versions": {},
        "run_date": date(2026, 1, 1),
    }
    return codebook_tags(codebook_hash=codebook_hash, **{**values, **others})


def version_of(codebook_hash: str, number: int = 1, **others: Any) -> CodebookVersion:
    """A codebook version with this hash, in no registry."""
    return CodebookVersion.of(RegisteredVersion("m", number, "", tags_of(codebook_hash, **others)))


def add_codebook(registry: Registry, codebook_hash: str) -> RegisteredVersion:
    """Register a codebook version without files."""
    with registry.run("fit", load_config(), {}):
        version = register_lost(registry, CODEBOOK_MODEL, tags_of(codebook_hash))
    registry.client.delete_model_version_tag(version.name, str(version.number), LOST_TAG)
    return version


@cache
def _empty_store() -> bytes:
    """MLflow's default store before anything is in it; to make one takes seconds."""
    with tempfile.TemporaryDirectory() as folder:
        open_registry(load_config(warehouse=folder), folder)
        return Path(folder, "mlflow.db").read_bytes()


def registry_at(root: Path, *settings: str) -> Registry:
    """The registry of the warehouse at `root`; by default one of its own."""
    root.mkdir(exist_ok=True)
    store = root / "mlflow.db"
    if not settings and not store.exists():
        store.write_bytes(_empty_store())
        with closing(sqlite3.connect(store)) as db, db:
            db.execute("UPDATE experiments SET artifact_location = ?", (f"{root}/mlflow_artifacts",))
    return open_registry(load_config(overrides=settings, warehouse=str(root)), str(root))


def write_releases(root: str, *rows: tuple[int, str, str]) -> None:
    """The releases of these codebook versions, hashes and statuses, in order."""
    numbers = range(1, len(rows) + 1)
    columns = {
        "release_id": pa.array(numbers, pa.int64()),
        "codebook_version": pa.array([version for version, _, _ in rows], pa.int32()),
        "codebook_hash": pa.array([codebook_hash for _, codebook_hash, _ in rows]),
        "table_versions": pa.array([[("semantic_ids", 1)]] * len(rows), pa.map_(pa.string(), pa.int64())),
        "previous": pa.array([n - 1 or None for n in numbers], pa.int64()),
        "status": pa.array([status for _, _, status in rows]),
        "at": pa.array([datetime(2026, 1, n, tzinfo=UTC) for n in numbers], pa.timestamp("us", "UTC")),
    }
    write_deltalake(f"{root}/releases", pa.table(columns))


def write_ids(root: str, *rows: tuple[int, str]) -> None:
    """IDs of these codebook versions and hashes."""
    table = pa.table(
        {
            "codebook_version": pa.array([version for version, _ in rows], pa.int32()),
            "codebook_hash": [codebook_hash for _, codebook_hash in rows],
        }
    )
    write_deltalake(f"{root}/semantic_ids", table, partition_by=["codebook_version"], mode="append")
