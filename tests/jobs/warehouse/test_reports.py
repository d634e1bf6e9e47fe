"""Which report of a codebook version is the newest one, in tables with and without the time of an evaluation."""

from __future__ import annotations

from datetime import UTC, date, datetime
from itertools import permutations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import write_deltalake

from jobs.errors import SchemaError
from jobs.warehouse.reports import report

UNCERTAIN = pa.struct(
    [
        ("item_id", pa.string()),
        ("semantic_id", pa.string()),
        ("confidence", pa.float32()),
        ("log_likelihood", pa.float32()),
    ]
)


def write(root: Path, *rows: tuple[str, int, int | None], timed: bool = True) -> None:
    """Reports of codebook version 1: run, version of `semantic_ids`, hour of the evaluation."""
    columns: dict[str, Any] = {
        "codebook_version": pa.array([1] * len(rows), pa.int32()),
        "run_id": [run for run, _, _ in rows],
        "codebook_hash": ["x"] * len(rows),
        "metrics": pa.array([[("rmse", 0.5)]] * len(rows), pa.map_(pa.string(), pa.float64())),
        "passed": [True] * len(rows),
        "reasons": pa.array([[]] * len(rows), pa.list_(pa.string())),
        "least_certain": pa.array([[]] * len(rows), pa.list_(UNCERTAIN)),
        "judged_against": pa.array([None] * len(rows), pa.int32()),
        "table_versions": pa.array(
            [[("semantic_ids", version), ("item_embeddings", 1)] for _, version, _ in rows],
            pa.map_(pa.string(), pa.int64()),
        ),
        "run_date": pa.array([date(2026, 1, 1)] * len(rows)),
    }
    if timed:
        hours = [None if hour is None else datetime(2026, 1, 1, hour, tzinfo=UTC) for _, _, hour in rows]
        columns["evaluated_at"] = pa.array(hours, pa.timestamp("us", "UTC"))
    write_deltalake(f"{root}/quality_reports", pa.table(columns))


def newest(root: Path) -> str:
    found = report(str(root), 1)
    assert found is not None
    return found.run_id


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_of_equal_tables_the_last_evaluation_counts(tmp_path: Path, order: tuple[int, ...]) -> None:
    """Another limit of the gate gives another verdict on the same tables: `sid promote` reads the last one."""
    rows = [("before", 7, None), ("strict", 7, 9), ("mild", 7, 10)]
    write(tmp_path, *(rows[place] for place in order))
    assert newest(tmp_path) == "mild"
    by_name = report(str(tmp_path), 1, "strict")
    assert by_name is not None
    assert by_name.run_id == "strict"
    assert report(str(tmp_path), 2) is None


@pytest.mark.parametrize("order", list(permutations(range(2))))
def test_without_a_time_the_newest_tables_count(tmp_path: Path, order: tuple[int, ...]) -> None:
    rows = [("new", 8, None), ("old", 7, None)]
    write(tmp_path, *(rows[place] for place in order), timed=False)
    assert newest(tmp_path) == "new"


def test_a_table_that_lacks_another_column_is_refused(tmp_path: Path) -> None:
    write_deltalake(f"{tmp_path}/quality_reports", pa.table({"run_id": ["a"]}))
    with pytest.raises(SchemaError, match=r"columns of quality_reports are \['run_id'\]; expected"):
        report(str(tmp_path), 1)
