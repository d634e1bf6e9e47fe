"""load: raw vectors -> `item_embeddings` (fused, packed) and `rejected_embeddings` (with reasons).

    source -> checked rows -> one row per item -> rows whose vector is new or changed -> merge
                           -> rejected rows

Every input row ends in exactly one of the two tables, which is counted in them after each load. `jobs/embeddings/` has
the parts: the recipe, the checks of a row, duplicates, and the two passes over the source.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial

import numpy as np
import pyarrow as pa
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from jobs.config import Config, ConfigError, LoadConfig
from jobs.embeddings.duplicates import split_duplicates
from jobs.embeddings.passes import UNCHANGED, checked_rows, embedding_rows
from jobs.embeddings.recipe import FUSION, Recipe, resolve_recipe
from jobs.errors import SchemaError, WarehouseError
from jobs.files.sources import Source, open_source, quoted
from jobs.fingerprint import fingerprint
from jobs.warehouse.delta_rs import count_and_version
from jobs.warehouse.delta_spark import Warehouse
from jobs.warehouse.tables import ITEM_EMBEDDINGS, REJECTED_EMBEDDINGS

SAMPLE_ROWS = 1000  # vectors from which dimension and packing of a column are inferred
BYTES_A_FILE = 2**27
LAST_LOAD = "sid.last_load"  # property of item_embeddings: fingerprint of the inputs, and the result


@dataclass(frozen=True)
class LoadResult:
    """What a load did; the counts of rows are of the tables after it.

    Attributes:
        rows_in: rows of the source, which are rows_stored + rows_rejected.
        rows_stored: rows of the source that stand in `item_embeddings`, new, changed or as before.
        rows_rejected: rows of the source that stand in `rejected_embeddings`.
        new, changed: items that were inserted, and whose vector was replaced.
        reasons: reason -> number of rejected rows.
        version: of `item_embeddings`.
        seconds: wall time.
        nothing_to_do: the same source was loaded before with the same settings.
        note: which files of the source were read, where not all, and how packed bytes were read.
    """

    rows_in: int
    rows_stored: int
    rows_rejected: int
    new: int
    changed: int
    reasons: Mapping[str, int]
    version: int
    seconds: float = 0.0
    nothing_to_do: bool = False
    note: str = ""

    def summary(self) -> str:
        counts = (
            f"{self.rows_in:,} rows in = {self.rows_stored:,} stored + {self.rows_rejected:,} rejected "
            f"({self.new:,} new, {self.changed:,} changed)"
        )
        return f"{counts}; {self.note}" if self.note else counts


def run(config: Config, warehouse: Warehouse, run_date: date) -> LoadResult:
    """Load the source of `config.load`; rows that did not change are not written again.

    Raises:
        ConfigError, SchemaError: source, column or recipe is not as the settings say, or every row was rejected.
        WarehouseError: the tables do not hold afterwards what was put into them.
    """
    began = time.monotonic()
    source = _open(config.load)
    if source.format == "parquet" and source.rows == 0:
        raise SchemaError(_without_rows(source))
    sample = partial(_first_vectors, source, warehouse.spark)
    recipe = resolve_recipe(config.load, source, _stored_recipe(warehouse), sample)
    inputs = fingerprint([source.fingerprint, config.digest("load")])
    last = warehouse.property(ITEM_EMBEDDINGS, LAST_LOAD)
    if last is not None and json.loads(last)["fingerprint"] == inputs:
        result = LoadResult(**json.loads(last)["result"])
        version = warehouse.version(ITEM_EMBEDDINGS)
        return replace(result, new=0, changed=0, version=version, seconds=time.monotonic() - began, nothing_to_do=True)

    warehouse.create(ITEM_EMBEDDINGS)
    with _errors_of_tasks(config.load, source):
        result = _load(source, recipe, warehouse, run_date)
    warehouse.set_property(ITEM_EMBEDDINGS, LAST_LOAD, json.dumps({"fingerprint": inputs, "result": asdict(result)}))
    return replace(result, version=warehouse.version(ITEM_EMBEDDINGS), seconds=time.monotonic() - began)


def _load(source: Source, recipe: Recipe, warehouse: Warehouse, run_date: date) -> LoadResult:
    with (
        _as_parquet(source, recipe, warehouse) as files,
        warehouse.staged(checked_rows(files, recipe, warehouse.spark), "load") as verdicts,
    ):
        rows_in = verdicts.count()
        if rows_in == 0:
            raise SchemaError(_without_rows(source))
        good, rejected = split_duplicates(verdicts)
        reasons = _write_rejected(rejected, warehouse, run_date)
        rows_rejected = sum(reasons.values())
        if rows_rejected == rows_in:
            raise SchemaError(_all_rejected(source, reasons, warehouse, run_date))
        good = good.cache()
        try:
            if _stored_recipe(warehouse) is None:
                warehouse.set_property(ITEM_EMBEDDINGS, FUSION, recipe.to_json())
            new, changed = _write_changed(good, files, recipe, warehouse, run_date)
            stored = warehouse.read(ITEM_EMBEDDINGS).select("item_id", "content_hash")
            rows_stored = good.join(stored, ["item_id", "content_hash"], how="left_semi").count()
        finally:
            good.unpersist()
    if rows_in != rows_stored + rows_rejected:
        raise WarehouseError(
            f"{rows_in} rows were read, but {rows_stored} of them stand in item_embeddings and {rows_rejected} in "
            "rejected_embeddings; expected every row in one of the two. Does another command write to this warehouse? "
            "Run load again"
        )
    note = "; ".join(filter(None, [source.note, recipe.packed_note()]))
    return LoadResult(rows_in, rows_stored, rows_rejected, new, changed, reasons, version=-1, note=note)


# ---- the source ----


def _open(load: LoadConfig) -> Source:
    if not load.source:
        raise ConfigError(
            "load.source is empty; give a Parquet file or folder, or a Delta table: --set load.source=PATH"
        )
    return open_source(load.source, load.source_format, setting="load.source_format", snapshots=load.snapshots)


def _first_vectors(source: Source, spark: SparkSession, column: str) -> pa.Array:
    """The first SAMPLE_ROWS values of a column that are not null."""
    if source.format == "delta":
        frame = source.frame(spark).select(quoted(column)).where(quoted(column).isNotNull())
        return frame.limit(SAMPLE_ROWS).toArrow().column(0).combine_chunks()
    return source.first_values(column, SAMPLE_ROWS)


@contextmanager
def _as_parquet(source: Source, recipe: Recipe, warehouse: Warehouse) -> Iterator[Source]:
    """The source itself, or for the duration the rows of a Delta table as Parquet files, which tasks can read."""
    if source.format == "parquet":
        yield source
        return
    with warehouse.staging("source") as folder:
        frame = source.frame(warehouse.spark).select(quoted(recipe.item_id), *map(quoted, recipe.fusion.dims))
        frame.write.mode("overwrite").parquet(folder)
        yield open_source(folder, "parquet")


@contextmanager
def _errors_of_tasks(load: LoadConfig, source: Source) -> Iterator[None]:
    """Errors of tasks become SchemaErrors where the source changed meanwhile, or where a task raised one."""
    try:
        yield
    except PySparkException as error:
        # Of a Delta table one version is read, which does not change.
        if source.format == "parquet" and _open(load).fingerprint != source.fingerprint:
            raise SchemaError(f"load.source {source.location} changed while it was read; {UNCHANGED}") from error
        if sentence := re.search(r"\bSchemaError: (.*)", str(error)):
            raise SchemaError(sentence[1]) from error
        raise


def _without_rows(source: Source) -> str:
    return f"load.source {source.location} has no rows; expected at least one item. Is the export finished?"


def _all_rejected(source: Source, reasons: Mapping[str, int], warehouse: Warehouse, run_date: date) -> str:
    counts = ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items(), key=lambda each: -each[1]))
    rows = warehouse.read(REJECTED_EMBEDDINGS).where(F.col("run_date") == F.lit(run_date))
    row = rows.orderBy(F.col("item_id").asc_nulls_last(), "occurrence").first()
    assert row is not None
    return (
        f"all {sum(reasons.values()):,} rows of load.source {source.location} were rejected ({counts}); expected items "
        f"that can be stored. For example item {row['item_id']!r}: {row['detail']}. rejected_embeddings has them all"
    )


# ---- the tables ----


def _stored_recipe(warehouse: Warehouse) -> Recipe | None:
    """The recipe of the rows of the table; a table without rows has none."""
    text = warehouse.property(ITEM_EMBEDDINGS, FUSION)
    if text is None or (state := count_and_version(warehouse.root, ITEM_EMBEDDINGS)) is None or state[0] == 0:
        return None
    return Recipe.from_json(text)


def _write_rejected(rejected: DataFrame, warehouse: Warehouse, run_date: date) -> dict[str, int]:
    """Replace the rejected rows of the day; returns how many the table has of each reason."""
    if rejected.isEmpty() and not warehouse.exists(REJECTED_EMBEDDINGS):
        return {}
    order = Window.partitionBy("item_id").orderBy("reason", "detail", "excerpt")
    numbered = rejected.select(
        "item_id",
        F.row_number().over(order).alias("occurrence"),
        "reason",
        "detail",
        "excerpt",
        F.lit(run_date).cast("date").alias("run_date"),
    )
    warehouse.replace(REJECTED_EMBEDDINGS, numbered, f"run_date = '{run_date}'")
    rows = warehouse.read(REJECTED_EMBEDDINGS).where(F.col("run_date") == F.lit(run_date))
    return {row["reason"]: row["count"] for row in rows.groupBy("reason").count().collect()}


def _write_changed(
    good: DataFrame, source: Source, recipe: Recipe, warehouse: Warehouse, run_date: date
) -> tuple[int, int]:
    """Insert new items and replace changed vectors; returns how many of each."""
    stored = warehouse.read(ITEM_EMBEDDINGS).select("item_id", F.col("content_hash").alias("stored_hash"), "first_seen")
    pending = (
        good.join(stored, "item_id", how="left").where("stored_hash IS NULL OR stored_hash <> content_hash").cache()
    )
    try:
        groups = pending.groupBy("row_group").agg(F.count(F.lit(1)), F.count("stored_hash")).collect()
        counts, changed = {group[0]: int(group[1]) for group in groups}, sum(int(group[2]) for group in groups)
        rows = sum(counts.values())
        if not rows:
            return 0, 0
        fusion = recipe.fusion
        files = math.ceil(rows * fusion.dim * np.dtype(fusion.dtype).itemsize / BYTES_A_FILE)
        embeddings = embedding_rows(pending, counts, source, recipe, run_date, tasks=max(files, warehouse.cores))
        if changed:
            with warehouse.staged(embeddings, "changed") as staged:  # a MERGE reads its source twice
                warehouse.merge(ITEM_EMBEDDINGS, staged)
        else:  # a MERGE would shuffle the vectors to find what is known already: none of them is stored
            warehouse.append(ITEM_EMBEDDINGS, embeddings.repartition(1) if files == 1 else embeddings)
        return rows - changed, changed
    finally:
        pending.unpersist()
