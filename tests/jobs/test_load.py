"""load: every row is stored or rejected with a reason, a second run changes nothing, only changes are written."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data import topics, write_vectors
from delta import DeltaTable

from jobs import load
from jobs.config import Config
from jobs.embeddings.recipe import FUSION, Recipe
from jobs.errors import SchemaError, WarehouseError
from jobs.warehouse.delta_spark import Warehouse
from jobs.warehouse.tables import ITEM_EMBEDDINGS, REJECTED_EMBEDDINGS
from tokenizer import Fusion

DAY, NEXT_DAY = date(2026, 1, 1), date(2026, 1, 2)
Settings = Callable[..., Config]


def stored(warehouse: Warehouse) -> dict[str, Any]:
    """The rows of item_embeddings by item."""
    return {row["item_id"]: row for row in warehouse.read(ITEM_EMBEDDINGS).orderBy("item_id").collect()}


def rejected(warehouse: Warehouse) -> dict[str, list[str]]:
    """Reason -> items of rejected_embeddings."""
    items: dict[str, list[str]] = {}
    for row in warehouse.read(REJECTED_EMBEDDINGS).orderBy("item_id", "occurrence").collect():
        items.setdefault(row["reason"], []).append(row["item_id"])
    return items


def unit(x: np.ndarray) -> np.ndarray:
    lengths: np.ndarray = np.linalg.norm(x, axis=1, keepdims=True)
    return x / lengths


def test_duplicates_bad_rows_and_good_rows_add_up(tmp_path: Path, warehouse: Warehouse, settings: Settings) -> None:
    """Of the newest of daily folders."""
    good = topics(20, 4)
    rows: list[Any] = [*good, good[3], good[4], good[5] + 1, [np.nan] * 4, None]
    ids = [*range(20), 3, 3, 5, 100, 101]
    rows[21] = good[3]  # item 3 three times with one vector; item 5 twice with two
    write_vectors(tmp_path / "in" / "dt=2026-01-01" / "p.parquet", [200], text_embedding=good[:1])
    write_vectors(tmp_path / "in" / "dt=2026-01-02" / "p.parquet", ids, text_embedding=rows)
    result = load.run(settings(f"load.source={tmp_path / 'in'}"), warehouse, DAY)
    assert (result.rows_in, result.rows_stored, result.rows_rejected) == (25, 19, 6)
    assert rejected(warehouse) == {
        "duplicate_identical": ["3", "3"],
        "duplicate_conflicting": ["5", "5"],
        "nan": ["100"],
        "null_embedding": ["101"],
    }
    assert result.reasons == {"duplicate_identical": 2, "duplicate_conflicting": 2, "nan": 1, "null_embedding": 1}
    assert result.note == "snapshot dt=2026-01-02, the newest of 2 daily folders"
    assert len(stored(warehouse)) == result.rows_stored == result.new
    recipe = Recipe.from_json(warehouse.property(ITEM_EMBEDDINGS, FUSION) or "")
    assert recipe == Recipe("item_id", Fusion({"text_embedding": 4}))


def test_a_second_run_changes_nothing_and_changed_vectors_are_replaced(
    tmp_path: Path, warehouse: Warehouse, settings: Settings
) -> None:
    """Rows of many row groups, where they changed."""
    x, ids = topics(51, 4), [f"i{row:02}" for row in range(51)]

    def write(items: int) -> Path:
        vectors = pa.array(list(x[:items]), pa.list_(pa.float32()))
        table = pa.table({"item_id": ids[:items], "text_embedding": vectors})
        pq.write_table(table, tmp_path / "v.parquet", row_group_size=7)
        return tmp_path / "v.parquet"

    config = settings(f"load.source={write(50)}")
    first = load.run(config, warehouse, DAY)
    assert (first.new, first.changed, first.nothing_to_do) == (50, 0, False)
    before = stored(warehouse)
    again = load.run(config, warehouse, NEXT_DAY)
    assert again.nothing_to_do
    assert (again.version, stored(warehouse)) == (first.version, before)

    changed = [0, 6, 7, 33, 49]  # first and last of a group, one of the last
    x[changed] *= -1
    write(51)
    result = load.run(config, warehouse, NEXT_DAY)
    assert (result.new, result.changed, result.rows_stored) == (1, 5, 51)
    rows = stored(warehouse)
    written = {item for item, row in rows.items() if row["run_date"] == NEXT_DAY}
    assert written == {*(ids[row] for row in changed), "i50"}
    assert {item for item, row in rows.items() if row["first_seen"] == NEXT_DAY} == {"i50"}
    embeddings = np.stack([np.frombuffer(rows[item]["embedding"], "<f4") for item in ids])
    np.testing.assert_allclose(embeddings, unit(x), rtol=1e-6)


@pytest.mark.parametrize("rows", [5, 3])
def test_a_source_that_changes_while_it_is_read_is_named(
    rows: int, tmp_path: Path, warehouse: Warehouse, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_vectors(tmp_path / "v.parquet", list(range(5)), text_embedding=topics(5, 4))

    def change(verdicts: Any, split: Any = load.split_duplicates) -> Any:
        # Between the two passes: other vectors, or fewer.
        write_vectors(path, list(range(rows)), text_embedding=topics(5, 4)[:rows] * (-1 if rows == 5 else 1))
        return split(verdicts)

    monkeypatch.setattr(load, "split_duplicates", change)
    with pytest.raises(SchemaError, match=r"v\.parquet changed while it was read"):
        load.run(settings(f"load.source={path}"), warehouse, DAY)
    assert stored(warehouse) == {}


def test_a_delta_source_gives_the_rows_of_its_current_version(
    tmp_path: Path, warehouse: Warehouse, settings: Settings
) -> None:
    x = topics(10, 4)
    spark, folder = warehouse.spark, str(tmp_path / "a [delta] {1,2} 100%")
    rows = [(number, vector.tolist()) for number, vector in [*enumerate(x), *enumerate(x, start=100)]]
    frame = spark.createDataFrame(rows, "`item.id` LONG, text_embedding ARRAY<FLOAT>").coalesce(1)
    frame.write.format("delta").option("delta.enableDeletionVectors", "true").save(folder)
    DeltaTable.forPath(spark, folder).delete("`item.id` >= 100")  # by a deletion vector: the file stays
    result = load.run(settings(f"load.source={folder}", "load.item_id='item.id'"), warehouse, DAY)
    assert (result.rows_in, result.rows_stored) == (10, 10)
    embeddings = {item: np.frombuffer(row["embedding"], "<f4") for item, row in stored(warehouse).items()}
    np.testing.assert_allclose(np.stack([embeddings[str(n)] for n in range(10)]), unit(x), rtol=1e-6)


@pytest.mark.slow
def test_rows_that_do_not_reach_the_table_stop_the_load(
    tmp_path: Path, warehouse: Warehouse, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_vectors(tmp_path / "v.parquet", list(range(5)), text_embedding=topics(5, 4))
    config = settings(f"load.source={path}")

    def append(self: Warehouse, table: Any, rows: Any, write: Any = Warehouse.append) -> int:
        version: int = write(self, table, rows.where("item_id <> '3'"))
        return version

    monkeypatch.setattr(Warehouse, "append", append)
    with pytest.raises(
        WarehouseError, match="5 rows were read, but 4 of them stand in item_embeddings and 0 in rejected"
    ):
        load.run(config, warehouse, DAY)
    monkeypatch.undo()
    result = load.run(config, warehouse, DAY)
    assert (result.rows_stored, result.new, result.nothing_to_do) == (5, 1, False)


def test_a_load_that_rejects_everything_says_why_and_leaves_no_recipe(
    tmp_path: Path, warehouse: Warehouse, settings: Settings
) -> None:
    path = write_vectors(tmp_path / "v.parquet", [5, 6, None], text_embedding=[[1.0, 2.0]] * 3)
    with pytest.raises(
        SchemaError,
        match=r"all 3 rows of .* were rejected \(wrong_dimension 2, null_item_id 1\); .* item '5': "
        "text_embedding has 2 components; expected 3",
    ):
        load.run(settings(f"load.source={path}", "load.dims={text_embedding = 3}"), warehouse, DAY)
    assert rejected(warehouse) == {"null_item_id": [None], "wrong_dimension": ["5", "6"]}
    assert warehouse.property(ITEM_EMBEDDINGS, FUSION) is None


def test_an_empty_table_is_refused(tmp_path: Path, warehouse: Warehouse, settings: Settings) -> None:
    path = tmp_path / "v.parquet"
    columns = {"item_id": pa.array([], pa.int64()), "text_embedding": pa.array([], pa.list_(pa.float32()))}
    pq.write_table(pa.table(columns), path)
    with pytest.raises(SchemaError, match="has no rows"):
        load.run(settings(f"load.source={path}"), warehouse, DAY)
