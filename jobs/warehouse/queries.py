"""What commands ask about the tables, each question one function: plain values in, plain values out.

`pipelines/` has no Spark code of its own; it calls these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from jobs.files.filesystem import missing
from jobs.warehouse.delta_spark import Warehouse
from jobs.warehouse.releases import Release
from jobs.warehouse.tables import ITEM_EMBEDDINGS, REJECTED_EMBEDDINGS, SEMANTIC_IDS, Table

ROWS_FOR_A_MEAN = 30  # the mean of fewer items says nothing about drift
LISTED_ITEMS = 5  # items that an answer names as examples


# ---- backfill ----


@dataclass(frozen=True)
class Selection:
    """Some of the items: those with one of these ids, or those that are new or changed on a day or later."""

    ids: pa.StringArray | None = None
    since: date | None = None

    def __post_init__(self) -> None:
        if (self.ids is None) == (self.since is None):
            raise ValueError(f"a selection of ids {self.ids} since {self.since}; expected one of the two")

    def items(self, warehouse: Warehouse) -> DataFrame:
        """The selected ids, each once, in the column `item_id`. Listed ids may be unknown to the warehouse."""
        if self.ids is not None:
            return warehouse.spark.createDataFrame(pa.table({"item_id": self.ids})).distinct()
        return warehouse.read(ITEM_EMBEDDINGS).where(F.col("run_date") >= F.lit(self.since)).select("item_id")


@dataclass(frozen=True)
class Plan:
    """What encoding a selection with a codebook would do: `chosen` = `with_id` + `to_encode` + `unknown`."""

    chosen: int
    with_id: int  # have a semantic ID of this version for their present vector
    to_encode: int
    unknown: int  # not in item_embeddings: never loaded, or rejected
    unknown_items: tuple[str, ...]  # the first LISTED_ITEMS of them


def plan(warehouse: Warehouse, codebook_version: int, selection: Selection | None) -> Plan:
    """What encoding the selected items (None: every item) with a codebook would do."""
    embeddings = warehouse.read(ITEM_EMBEDDINGS).select("item_id", "content_hash")
    rows = embeddings if selection is None else selection.items(warehouse).join(embeddings, "item_id", how="left")
    if warehouse.exists(SEMANTIC_IDS):
        ids = warehouse.read(SEMANTIC_IDS).where(F.col("codebook_version") == codebook_version)
        has_id = ids.select("item_id", "content_hash", F.lit(True).alias("has_id"))
        rows = rows.join(has_id, ["item_id", "content_hash"], how="left")
    else:
        rows = rows.withColumn("has_id", F.lit(None).cast("boolean"))
    counts = rows.agg(
        F.count(F.lit(1)).alias("chosen"), F.count("content_hash").alias("known"), F.count("has_id").alias("with_id")
    ).first()
    assert counts is not None
    unknown = counts["chosen"] - counts["known"]
    examples = rows.where("content_hash IS NULL").orderBy("item_id").limit(LISTED_ITEMS).collect() if unknown else []
    return Plan(
        chosen=counts["chosen"],
        with_id=counts["with_id"],
        to_encode=counts["known"] - counts["with_id"],
        unknown=unknown,
        unknown_items=tuple(row["item_id"] for row in examples),
    )


# ---- drift ----


def likelihood_drop(warehouse: Warehouse, codebook_version: int, run_date: date) -> float | None:
    """By how many standard deviations the items first stored on `run_date` are less likely than the earlier ones.

    Earlier items of mean log-likelihood 50 and standard deviation 4 and new ones of mean 46 give 1.0. Left out are
    items whose vector changed that day, since they are not new, and held items, whose likelihood is not that of their
    best codes. None if one of the two groups has under ROWS_FOR_A_MEAN rows.
    """
    first = warehouse.read(ITEM_EMBEDDINGS).select("item_id", "content_hash", F.col("first_seen") == F.col("run_date"))
    ids = warehouse.read(SEMANTIC_IDS).where(F.col("codebook_version") == codebook_version).where("NOT held")
    rows = ids.join(first.toDF("item_id", "content_hash", "as_first_stored"), ["item_id", "content_hash"], how="inner")
    tonight = F.col("run_date") == F.lit(run_date)
    new = tonight & F.col("as_first_stored")
    stats = rows.agg(
        F.count(F.when(new, 1)).alias("new"),
        F.count(F.when(~tonight, 1)).alias("old"),
        F.mean(F.when(new, F.col("log_likelihood"))).alias("new_mean"),
        F.mean(F.when(~tonight, F.col("log_likelihood"))).alias("old_mean"),
        F.stddev_pop(F.when(~tonight, F.col("log_likelihood"))).alias("old_std"),
    ).first()
    assert stats is not None
    if stats["new"] < ROWS_FOR_A_MEAN or stats["old"] < ROWS_FOR_A_MEAN or not stats["old_std"]:
        return None
    return float((stats["old_mean"] - stats["new_mean"]) / stats["old_std"])


# ---- explain ----


@dataclass(frozen=True)
class ItemHistory:
    """What the tables have about one item, as rows by column name."""

    embedding: Mapping[str, Any] | None  # without the vector
    rejections: tuple[Mapping[str, Any], ...]  # oldest first
    semantic_ids: tuple[Mapping[str, Any], ...]  # newest codebook version first
    # Codebook version -> other items with the same codes, LISTED_ITEMS + 1 at most.
    same_codes: Mapping[int, tuple[str, ...]]

    @property
    def known(self) -> bool:
        return self.embedding is not None or bool(self.rejections or self.semantic_ids)


def item_history(warehouse: Warehouse, item_id: str) -> ItemHistory:
    """The rows of an item in every table."""
    embedding: Mapping[str, Any] | None = None
    if warehouse.exists(ITEM_EMBEDDINGS):
        row = warehouse.read(ITEM_EMBEDDINGS).drop("embedding").where(F.col("item_id") == item_id).first()
        embedding = None if row is None else row.asDict(recursive=True)
    rejections: list[Mapping[str, Any]] = []
    if warehouse.exists(REJECTED_EMBEDDINGS):
        rows = warehouse.read(REJECTED_EMBEDDINGS).where(F.col("item_id") == item_id).orderBy("run_date", "occurrence")
        rejections = [row.asDict() for row in rows.collect()]
    semantic_ids: list[Mapping[str, Any]] = []
    same_codes: dict[int, tuple[str, ...]] = {}
    if warehouse.exists(SEMANTIC_IDS):
        ids = warehouse.read(SEMANTIC_IDS)
        for row in ids.where(F.col("item_id") == item_id).orderBy(F.desc("codebook_version")).collect():
            semantic_ids.append(row.asDict(recursive=True))
            same = (
                (F.col("codebook_version") == row["codebook_version"])
                & (F.col("codes") == F.array(*map(F.lit, row["codes"])))
                & (F.col("item_id") != item_id)
            )
            others = ids.where(same).orderBy("suffix").limit(LISTED_ITEMS + 1).collect()
            same_codes[row["codebook_version"]] = tuple(other["item_id"] for other in others)
    return ItemHistory(embedding, tuple(rejections), tuple(semantic_ids), same_codes)


# ---- rollback ----


def missing_data(warehouse: Warehouse, release: Release) -> str | None:
    """Why readers of a release would not find its rows, as a sentence; None if all of them are there."""
    for table in (ITEM_EMBEDDINGS, SEMANTIC_IDS):
        pinned = release.table_versions[table.name]
        try:
            files = _released_files(warehouse, release, table)
        except AnalysisException as error:
            return (
                f"{table.name} has no version {pinned} any more ({error.getCondition()}), which release "
                f"{release.release_id} pins; expected it in the table's history."
            )
        if gone := missing(files):
            return (
                f"{len(gone)} of {len(files)} files of {table.name} version {pinned}, which release "
                f"{release.release_id} pins, are gone; was the table vacuumed?"
            )
    hashes = {
        row["codebook_hash"] for row in _released_ids(warehouse, release).select("codebook_hash").distinct().collect()
    }
    if hashes != {release.codebook_hash}:
        return (
            f"release {release.release_id} has IDs of hashes {sorted(hashes)}, its codebook has "
            f"{release.codebook_hash}; expected that one alone."
        )
    return None


def count_items_without_id(warehouse: Warehouse, release: Release) -> int:
    """Items of the newest `item_embeddings` that have no semantic ID in a release."""
    return warehouse.read(ITEM_EMBEDDINGS).count() - _released_ids(warehouse, release).count()


def _released_files(warehouse: Warehouse, release: Release, table: Table) -> list[str]:
    """The files that readers of a release need: of `semantic_ids` only those of its codebook version."""
    files = warehouse.files(table, release.table_versions[table.name])
    partition = f"/codebook_version={release.codebook_version}/"
    return [file for file in files if table is not SEMANTIC_IDS or partition in unquote(file)]


def _released_ids(warehouse: Warehouse, release: Release) -> DataFrame:
    ids = warehouse.read(SEMANTIC_IDS, release.table_versions[SEMANTIC_IDS.name])
    return ids.where(F.col("codebook_version") == release.codebook_version)
