"""The warehouse as a folder: names that people give folders, who may write, what only reads."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession
from pyspark.sql import types as T

from jobs.config import ConfigError
from jobs.errors import WarehouseError
from jobs.files.parquet import row_groups
from jobs.warehouse.delta_rs import count_and_version, read_rows
from jobs.warehouse.delta_spark import Warehouse
from jobs.warehouse.lock import writer_lock
from jobs.warehouse.root import warehouse_root
from jobs.warehouse.tables import ITEM_EMBEDDINGS, REJECTED_EMBEDDINGS, SEMANTIC_IDS

DAY = date(2026, 1, 1)


def item(name: str) -> dict[str, Any]:
    return {
        "item_id": name,
        "embedding": bytes(8),
        "dim": 2,
        "modalities": ["text"],
        "content_hash": "x",
        "first_seen": DAY,
        "run_date": DAY,
    }


@pytest.mark.parametrize("name", ["per%20cent 100% né\\s", "q?m#h:[x]{y,z}* back`tick 'q' \"r\""])
def test_a_warehouse_in_a_folder_of_any_name(spark: SparkSession, tmp_path: Path, name: str) -> None:
    warehouse = Warehouse(spark, warehouse_root(str(tmp_path / name)))
    warehouse.append(ITEM_EMBEDDINGS, warehouse.rows(ITEM_EMBEDDINGS, [item("a")]))
    version = warehouse.merge(ITEM_EMBEDDINGS, warehouse.rows(ITEM_EMBEDDINGS, [item("b")]))
    warehouse.set_property(ITEM_EMBEDDINGS, "sid.note", "it's")
    assert warehouse.property(ITEM_EMBEDDINGS, "sid.note") == "it's"
    with warehouse.staged(warehouse.read(ITEM_EMBEDDINGS, version), "copy") as staged:
        assert sorted(row["item_id"] for row in staged.collect()) == ["a", "b"]
    assert sum(group.rows for group in row_groups(warehouse.files(ITEM_EMBEDDINGS, version))) == 2
    rejected = {"item_id": "a/b:%c", "occurrence": 1, "reason": "nan", "detail": "", "excerpt": "", "run_date": DAY}
    warehouse.replace(REJECTED_EMBEDDINGS, warehouse.rows(REJECTED_EMBEDDINGS, [rejected]), "run_date = '2026-01-01'")
    assert count_and_version(warehouse.root, ITEM_EMBEDDINGS) == (2, version + 1)
    assert read_rows(warehouse.root, REJECTED_EMBEDDINGS) == [rejected]
    assert os.listdir(tmp_path) == [name]


def test_a_table_is_made_where_a_kill_left_half_of_one(warehouse: Warehouse) -> None:
    log = Path(warehouse.path(ITEM_EMBEDDINGS), "_delta_log")
    (log / "_staged_commits").mkdir(parents=True)
    (log / ".00000000000000000000.json.1234.tmp").write_text("{")
    warehouse.append(ITEM_EMBEDDINGS, warehouse.rows(ITEM_EMBEDDINGS, [item("a")]))
    assert count_and_version(warehouse.root, ITEM_EMBEDDINGS) == (1, 1)


def test_a_file_uri_is_the_folder_that_it_names(tmp_path: Path) -> None:
    folder = tmp_path / "per cent%20é"
    assert warehouse_root(folder.as_uri()) == str(folder)
    assert warehouse_root(f"file:{folder.as_uri().removeprefix('file://')}") == str(folder)
    assert folder.is_dir()
    with pytest.raises(ConfigError, match="names the host server"):
        warehouse_root("file://server/warehouse")
    assert warehouse_root("s3a://bucket/warehouse/") == "s3a://bucket/warehouse"


def test_who_only_reads_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"warehose does not exist; expected the folder .* Check --warehouse"):
        warehouse_root(str(tmp_path / "warehose"), write=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        warehouse_root(str(tmp_path / "file"), write=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    (tmp_path / "w").mkdir()
    assert warehouse_root(str(tmp_path / "w"), write=False) == str(tmp_path / "w")
    assert list((tmp_path / "w").iterdir()) == []


def test_the_lock_names_its_holder(tmp_path: Path) -> None:
    with (
        writer_lock(str(tmp_path), "sid nightly", date(2026, 1, 31)),
        pytest.raises(WarehouseError) as caught,
        writer_lock(str(tmp_path), "sid fit", DAY),
    ):
        pass
    since = json.loads((tmp_path / ".writer.lock").read_text())["since"]
    assert f"is being written by sid nightly for 2026-01-31 (process {os.getpid()}, since {since})" in str(caught.value)
    assert since.endswith(" UTC")


@pytest.mark.parametrize("text", ["", "{", "3", '{"pid": 7}'])
def test_a_lock_without_a_name_is_a_lock(tmp_path: Path, text: str) -> None:
    with writer_lock(str(tmp_path)):
        (tmp_path / ".writer.lock").write_text(text)
        with (
            pytest.raises(WarehouseError, match="is being written by another command; one writer"),
            writer_lock(str(tmp_path)),
        ):
            pass


def test_a_table_made_before_an_optional_column_was_declared_gets_it_with_the_next_write(warehouse: Warehouse) -> None:
    def row(name: str) -> dict[str, Any]:
        return {
            "codebook_version": 1,
            "item_id": name,
            "codes": [1, 2],
            "suffix": 0,
            "semantic_id": "1-2",
            "confidence": 0.5,
            "log_likelihood": -1.0,
            "codebook_hash": "h",
            "content_hash": "h",
            "held": False,
            "run_date": DAY,
            "alternates": [{"codes": [1], "weights": [255]}] * 2,
            "squared_error": 0.5,
        }

    before = T.StructType([field for field in SEMANTIC_IDS.schema if not field.nullable])
    old = replace(SEMANTIC_IDS, schema=before)
    warehouse.append(old, warehouse.rows(old, [row("a")]))
    assert [stored["alternates"] for stored in warehouse.read(SEMANTIC_IDS).collect()] == [None]
    warehouse.merge(SEMANTIC_IDS, warehouse.rows(SEMANTIC_IDS, [row("b")]))
    stored = {row["item_id"]: row["alternates"] for row in warehouse.read(SEMANTIC_IDS).collect()}
    assert stored["a"] is None
    assert [(level["codes"], level["weights"]) for level in stored["b"]] == [([1], [255])] * 2
