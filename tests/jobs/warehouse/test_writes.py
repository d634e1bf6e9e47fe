"""Laws of what writes a table: merge, replace, update and append."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from pyspark.errors import AnalysisException
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from jobs.errors import SchemaError
from jobs.files.parquet import footers
from jobs.warehouse.delta_rs import read_rows
from jobs.warehouse.delta_spark import Warehouse, check_columns
from jobs.warehouse.tables import CTR_EXAMPLES, ITEM_EMBEDDINGS, REJECTED_EMBEDDINGS, TABLES, Table

DAY, NEXT = date(2026, 1, 1), date(2026, 1, 2)


def items(*names: str, content: str = "first") -> list[dict[str, Any]]:
    same = {"embedding": bytes(8), "dim": 2, "modalities": ["text"], "first_seen": DAY, "run_date": DAY}
    return [{**same, "item_id": name, "content_hash": content} for name in names]


def rejected(day: date, *names: str | None) -> list[dict[str, Any]]:
    same = {"occurrence": 1, "reason": "nan", "detail": "", "excerpt": "", "run_date": day}
    return [{**same, "item_id": name} for name in names]


def merge(warehouse: Warehouse, rows: list[dict[str, Any]]) -> None:
    warehouse.merge(ITEM_EMBEDDINGS, warehouse.rows(ITEM_EMBEDDINGS, rows))


def contents(warehouse: Warehouse) -> list[tuple[str, str]]:
    return sorted((row["item_id"], row["content_hash"]) for row in read_rows(warehouse.root, ITEM_EMBEDDINGS))


def test_batches_merged_in_any_order_and_again_give_the_same_rows(spark: SparkSession, tmp_path: Path) -> None:
    batches = {"one": items("a", "b", "c"), "two": items("b", "c", "d")}
    expected = [(name, "first") for name in "abcd"]
    for order in (("one", "two", "one"), ("two", "one")):
        warehouse = Warehouse(spark, str(tmp_path / "-".join(order)))
        for name in order:
            merge(warehouse, batches[name])
        assert contents(warehouse) == expected


def test_a_merge_replaces_rows_of_equal_key_and_inserts_the_others(warehouse: Warehouse) -> None:
    merge(warehouse, items("a", "b"))
    merge(warehouse, items("b", "c", content="later"))
    assert contents(warehouse) == [("a", "first"), ("b", "later"), ("c", "later")]


def test_an_absent_id_is_a_key_like_any_other(warehouse: Warehouse) -> None:
    """A row without an item id is merged once, though NULL = NULL is not true in SQL."""
    for _ in range(2):
        rows = warehouse.rows(REJECTED_EMBEDDINGS, rejected(DAY, None, "a"))
        warehouse.merge(REJECTED_EMBEDDINGS, rows)
    assert len(read_rows(warehouse.root, REJECTED_EMBEDDINGS)) == 2


def test_a_replacement_concerns_the_rows_of_its_condition(warehouse: Warehouse) -> None:
    def replace(day: date, where: str, *names: str) -> None:
        warehouse.replace(REJECTED_EMBEDDINGS, warehouse.rows(REJECTED_EMBEDDINGS, rejected(day, *names)), where)

    def stored() -> list[tuple[date, str]]:
        return sorted((row["run_date"], row["item_id"]) for row in read_rows(warehouse.root, REJECTED_EMBEDDINGS))

    replace(DAY, f"run_date = '{DAY}'", "a", "b")
    for _ in range(2):
        replace(NEXT, f"run_date = '{NEXT}'", "c")
        assert stored() == [(DAY, "a"), (DAY, "b"), (NEXT, "c")]
    with pytest.raises(AnalysisException, match="DELTA_REPLACE_WHERE_MISMATCH"):
        replace(DAY, f"run_date = '{NEXT}'", "d")
    assert stored() == [(DAY, "a"), (DAY, "b"), (NEXT, "c")]
    replace(NEXT, f"run_date = '{DAY}' OR run_date = '{NEXT}'")
    assert stored() == []


def test_an_update_sets_the_named_columns_of_stored_rows(warehouse: Warehouse) -> None:
    merge(warehouse, items("a", "b"))
    rows = warehouse.rows(ITEM_EMBEDDINGS, items("b", "absent", content="later")).select("item_id", "content_hash")
    warehouse.update(ITEM_EMBEDDINGS, rows, ["content_hash"])
    assert contents(warehouse) == [("a", "first"), ("b", "later")]


@pytest.mark.parametrize("how", ["merge", "replace", "append"])
def test_rows_that_lack_a_column_are_not_written(warehouse: Warehouse, how: str) -> None:
    rows = warehouse.rows(ITEM_EMBEDDINGS, items("a")).drop("dim")
    write = {
        "merge": lambda: warehouse.merge(ITEM_EMBEDDINGS, rows),
        "replace": lambda: warehouse.replace(ITEM_EMBEDDINGS, rows, ""),
        "append": lambda: warehouse.append(ITEM_EMBEDDINGS, rows),
    }
    with pytest.raises(
        SchemaError, match=r"columns of item_embeddings differ .*; missing: dim int; not expected: none"
    ):
        write[how]()
    assert read_rows(warehouse.root, ITEM_EMBEDDINGS) == []


def test_names_types_and_order_of_columns_are_checked(warehouse: Warehouse) -> None:
    rows = warehouse.rows(ITEM_EMBEDDINGS, items("a"))
    check_columns(rows, ITEM_EMBEDDINGS)
    names = rows.columns
    for wrong, message in (
        (rows.withColumn("dim", rows["dim"].cast("bigint")), "missing: dim int; not expected: dim bigint"),
        (rows.withColumnRenamed("dim", "width"), "missing: dim int; not expected: width int"),
        (rows.select(*reversed(names)), r"missing: none; not expected: none \(order matters\)"),
    ):
        with pytest.raises(SchemaError, match=message):
            check_columns(wrong, ITEM_EMBEDDINGS)


def test_row_groups_are_as_large_as_the_table_declares_also_where_rows_are_long(warehouse: Warehouse) -> None:
    """Also in a table of an earlier release. 40 users of 2,000 behaviours are a few MB, one row group by default."""
    warehouse.create(replace(CTR_EXAMPLES, properties={}))
    bound = 2**17
    table = replace(CTR_EXAMPLES, properties={**CTR_EXAMPLES.properties, "parquet.block.size": str(bound)})
    codes = F.transform(F.sequence(F.lit(1), F.lit(16)), lambda k: F.abs(F.hash("id", "behaviour", k)) % 128)
    behaviours = (
        warehouse.spark.range(0, 40, numPartitions=1)
        .select("id", F.explode(F.sequence(F.lit(1), F.lit(2000))).alias("behaviour"))
        .select(
            "id",
            F.struct(
                F.concat(F.lit("item-"), "behaviour").alias("item_id"),
                F.col("behaviour").cast("long").alias("ts"),
                codes.alias("codes"),
                codes.cast("array<smallint>").alias("weights"),
            ).alias("one"),
        )
    )
    rows = behaviours.groupBy("id").agg(F.collect_list("one").alias("behaviours"))
    none = F.array().cast(table.schema["impressions"].dataType)
    named = {"user_id": F.col("id").cast("string"), "part": F.lit(0), "last": F.lit(True), "length_bucket": F.lit(10)}
    rows = rows.withColumns({**named, "impressions": none}).select(table.schema.names).coalesce(1)
    version = warehouse.replace(table, rows, "")
    sizes = [
        footer.row_group(index).total_byte_size
        for footer in footers(warehouse.files(table, version))
        for index in range(footer.num_row_groups)
    ]
    assert sum(sizes) > 10 * bound
    assert max(sizes) < 2 * bound


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_a_table_declares_its_key_partitions_and_the_meaning_of_its_columns(table: Table) -> None:
    names = table.schema.names
    assert set(table.key) <= set(names)
    assert set(table.partition_by) <= set(names)
    assert set(table.meaning) == set(names)
    assert table.description
