"""What the log of a table says without a look at its rows."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import write_deltalake

from jobs.warehouse.delta_rs import may_have_nulls


def append(root: Path, version: int, errors: list[float | None] | None) -> None:
    """A file of `semantic_ids`; None is one without the column."""
    columns = {"item_id": pa.array([str(n) for n in range(len(errors or [0]))])}
    if errors is not None:
        columns["squared_error"] = pa.array(errors, pa.float32())
    table = pa.table({"codebook_version": pa.array([version] * len(columns["item_id"]), pa.int32()), **columns})
    write_deltalake(
        f"{root}/semantic_ids", table, partition_by=["codebook_version"], mode="append", schema_mode="merge"
    )


@pytest.mark.parametrize("incomplete", [[0.5, None], [None], None])
def test_nulls_are_those_of_the_version(tmp_path: Path, incomplete: list[float | None] | None) -> None:
    assert not may_have_nulls(str(tmp_path), 1, "squared_error")  # no table
    append(tmp_path, 1, incomplete)
    append(tmp_path, 1, [0.5, 0.25])
    append(tmp_path, 2, [0.5, 0.25])
    assert [may_have_nulls(str(tmp_path), version, "squared_error") for version in (1, 2, 3)] == [True, False, False]


def test_a_file_without_statistics_may_have_nulls(tmp_path: Path) -> None:
    append(tmp_path, 1, [0.5])
    log = tmp_path / "semantic_ids" / "_delta_log" / "00000000000000000000.json"
    actions = [json.loads(line) for line in log.read_text().splitlines()]
    for action in actions:
        action.get("add", {}).pop("stats", None)
    log.write_text("\n".join(json.dumps(action) for action in actions))
    assert may_have_nulls(str(tmp_path), 1, "squared_error")
