"""encode: `item_embeddings` + one codebook -> `semantic_ids` of that codebook version.

Only items without an ID of this version, or whose vector changed, are encoded. A published ID of a version never
changes. Under a new version an item with an unchanged vector keeps its previous codes while their squared error is
within `encode.hold` of the best.

Tasks (`encode_task.py`) read the vectors from the table's files with pyarrow; Spark moves only small columns: pending
items and IDs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from datetime import date

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from jobs.config import Config
from jobs.encode_task import ENCODED, SUFFIX_ORDER, group_encoder
from jobs.files.parquet import RowGroup, row_groups
from jobs.models.champion import check_hashes
from jobs.models.codebooks import usable_files
from jobs.models.registry import Registry
from jobs.models.versions import CodebookVersion
from jobs.warehouse.delta_rs import may_have_nulls
from jobs.warehouse.delta_spark import Warehouse
from jobs.warehouse.queries import Selection
from jobs.warehouse.tables import ITEM_EMBEDDINGS, SEMANTIC_IDS

ROWS_A_TASK = 250_000  # of a first encode: rows that a task encodes, and later numbers and writes as one file
GROUPS = "uri STRING, index INT, rows BIGINT"
PENDING = "ARRAY<STRUCT<item_id STRING, codes ARRAY<INT>, suffix INT, final BOOLEAN>>"
ADDED = ("alternates", "squared_error")  # columns that are null in rows of development versions before 0.1.0


@dataclass(frozen=True)
class EncodeResult:
    codebook_version: int
    encoded: int  # items that got an ID or a new row
    completed: int  # rows of a development version before 0.1.0 whose ADDED columns were computed
    version: int  # of semantic_ids after the run
    embeddings_version: int  # of item_embeddings
    seconds: float = 0.0
    nothing_to_do: bool = False

    def summary(self) -> str:
        completed = f", the new columns of {self.completed:,} earlier rows computed" if self.completed else ""
        return f"{self.encoded:,} items encoded with codebook version {self.codebook_version}{completed}"


def run(
    config: Config,
    warehouse: Warehouse,
    registry: Registry,
    codebook: CodebookVersion,
    run_date: date,
    selection: Selection | None = None,
) -> EncodeResult:
    """Give every item of the newest `item_embeddings` a semantic ID of `codebook`, in one commit.

    Rows of development versions before 0.1.0 first get the ADDED columns, in a commit of its own; their IDs stay.
    `selection` limits the run to some items.

    Raises:
        RegistryMismatch: the version has IDs of another codebook, or its files are gone.
        CodebookError: its files are damaged.
        SchemaError: it was fitted on vectors of another recipe.
    """
    began = time.monotonic()
    check_hashes(warehouse.root, codebook)
    files = usable_files(warehouse, registry, codebook)
    embeddings_version = warehouse.version(ITEM_EMBEDDINGS)
    embeddings = warehouse.read(ITEM_EMBEDDINGS, embeddings_version)
    warehouse.create(SEMANTIC_IDS)
    published = warehouse.read(SEMANTIC_IDS)
    own = published.where(F.col("codebook_version") == codebook.number)
    parent = codebook.started_from_version or -1
    new_version = own.isEmpty()
    # All rows of a new version are replaced, not appended, so two runs at the same time cannot add them twice.
    whole_version = f"codebook_version = {codebook.number}"

    def encoded(groups: Sequence[RowGroup], pending: DataFrame | None) -> DataFrame:
        shared = warehouse.spark.sparkContext.broadcast(dict(files))
        encoder = group_encoder(shared, codebook, config.encode)
        return _spread(warehouse, groups, pending).mapInArrow(encoder, from_arrow_schema(ENCODED))

    def result(count: int, version: int) -> EncodeResult:
        seconds = time.monotonic() - began
        nothing = not count and not completed
        return EncodeResult(codebook.number, count, completed, version, embeddings_version, seconds, nothing)

    completed = 0
    if not new_version and selection is None and may_have_nulls(warehouse.root, codebook.number, "squared_error"):
        incomplete = _incomplete(embeddings, own).cache()
        if not incomplete.isEmpty():
            groups = row_groups(warehouse.files(ITEM_EMBEDDINGS, embeddings_version))
            columns = encoded(groups, incomplete).select(*SEMANTIC_IDS.key, *ADDED)
            with warehouse.staged(columns, f"complete-{codebook.number}") as staged:
                completed = staged.count()
                warehouse.update(SEMANTIC_IDS, staged, ADDED)
            published = warehouse.read(SEMANTIC_IDS)
            own = published.where(F.col("codebook_version") == codebook.number)
        incomplete.unpersist()

    if new_version and parent < 0 and selection is None:  # every item, no previous codes: one pass without a join
        groups = row_groups(warehouse.files(ITEM_EMBEDDINGS, embeddings_version))
        count = sum(group.rows for group in groups)
        if not count:
            return result(0, warehouse.version(SEMANTIC_IDS))
        by_codes = encoded(groups, None).repartition(_tasks(count, warehouse.cores), "joined")
        rows = _published(by_codes, None, codebook, run_date)
        return result(count, warehouse.replace(SEMANTIC_IDS, rows, whole_version))
    selected = None if selection is None else selection.items(warehouse)
    pending = _pending(embeddings, published, codebook.number, parent, selected).cache()
    try:
        if pending.isEmpty():
            return result(0, warehouse.version(SEMANTIC_IDS))
        groups = row_groups(warehouse.files(ITEM_EMBEDDINGS, embeddings_version))
        with warehouse.staged(encoded(groups, pending), f"encode-{codebook.number}") as staged:
            rows = _published(staged, own, codebook, run_date)
            if new_version:
                return result(staged.count(), warehouse.replace(SEMANTIC_IDS, rows, whole_version))
            return result(staged.count(), warehouse.merge(SEMANTIC_IDS, rows))
    finally:
        pending.unpersist()


def _tasks(rows: int, cores: int) -> int:
    """Number of tasks for `rows`: ROWS_A_TASK each at most, and above `cores` a multiple of them, for no idle core.

    Left to itself, Spark merges partitions by size alone, for example to three on two cores.
    """
    tasks = max(1, math.ceil(rows / ROWS_A_TASK))
    return tasks if tasks <= cores else math.ceil(tasks / cores) * cores


# ---- what is to be encoded, by row group ----


def _pending(
    embeddings: DataFrame, published: DataFrame, version: int, parent: int, selected: DataFrame | None
) -> DataFrame:
    """The items to encode, grouped by file, each with its present codes.

    These are of this version, and then `final`, or of the parent version, which a better code may replace.
    """
    own = published.where(F.col("codebook_version") == version).select("item_id", "content_hash")
    items = embeddings.select("item_id", "content_hash", F.col("_metadata.file_name").alias("file"))
    if selected is not None:
        items = items.join(selected, "item_id", how="left_semi")
    versions = published.where(F.col("codebook_version").isin(version, parent)).select(
        "item_id",
        F.col("content_hash").alias("published_hash"),
        F.col("codes").alias("published_codes"),
        F.col("suffix").alias("published_suffix"),
        (F.col("codebook_version") == version).alias("own"),
    )
    latest = versions.withColumn(
        "rank", F.row_number().over(Window.partitionBy("item_id").orderBy(F.desc("own")))
    ).where("rank = 1")
    unchanged = F.col("own") | (F.col("published_hash") == F.col("content_hash"))
    return (
        items.join(own, ["item_id", "content_hash"], how="left_anti")
        .join(latest, "item_id", how="left")
        .select(
            "file",
            "item_id",
            F.when(unchanged, F.col("published_codes")).alias("codes"),
            F.when(unchanged, F.col("published_suffix")).alias("suffix"),
            F.coalesce("own", F.lit(False)).alias("final"),
        )
        .groupBy("file")
        .agg(F.collect_list(F.struct("item_id", "codes", "suffix", "final")).alias("pending"))
    )


def _incomplete(embeddings: DataFrame, own: DataFrame) -> DataFrame:
    """Items by file, as in `_pending`, whose row of this version has no squared error; their codes are final."""
    incomplete = own.where("squared_error IS NULL").select("item_id", "content_hash", "codes", "suffix")
    return (
        embeddings.select("item_id", "content_hash", F.col("_metadata.file_name").alias("file"))
        .join(incomplete, ["item_id", "content_hash"], how="inner")
        .withColumn("final", F.lit(True))
        .groupBy("file")
        .agg(F.collect_list(F.struct("item_id", "codes", "suffix", "final")).alias("pending"))
    )


def _spread(warehouse: Warehouse, groups: Sequence[RowGroup], pending: DataFrame | None) -> DataFrame:
    """One row per row group of the files with `pending` items, with these items; None stands for all items.

    With all items each task gets about the same number of rows. Otherwise the number of items in a group is unknown and
    each group is a task.
    """
    tasks = len(groups)
    if pending is None:
        tasks = min(tasks, _tasks(sum(group.rows for group in groups), warehouse.cores))
    values = [(*astuple(group), group.file, index * tasks // len(groups)) for index, group in enumerate(groups)]
    rows = warehouse.spark.createDataFrame(values, f"{GROUPS}, file STRING, task INT")
    if pending is None:
        work = rows.withColumn("pending", F.lit(None).cast(PENDING))
    else:
        work = rows.join(pending, "file", how="inner")
    return work.repartitionById(tasks, F.col("task")).drop("file", "task")


# ---- IDs ----


def _published(encoded: DataFrame, own: DataFrame | None, codebook: CodebookVersion, run_date: date) -> DataFrame:
    """Rows of `semantic_ids`. New items get the next free suffix of their codes in SUFFIX_ORDER, others keep theirs.

    `own` is the IDs that the version has; None if it has none and no item keeps a suffix.
    """
    # By version too, though there is only one: rows in the order of the table's partitions are not sorted again on
    # writing.
    by_codes, *order = SUFFIX_ORDER
    position = F.row_number().over(Window.partitionBy("codebook_version", by_codes).orderBy(*order)) - 1
    if own is None:
        rows = encoded.withColumn("suffix", position)
    else:
        published = own.select(
            F.concat_ws("-", F.col("codes").cast("array<string>")).alias("joined"),
            "suffix",
            F.col("item_id").alias("owner"),
        )
        candidates = encoded.where("kept_suffix IS NOT NULL").withColumn("suffix", F.col("kept_suffix"))
        # An ID that was kept from an earlier version may be another item's in this one: then it is numbered anew.
        same_id = (
            (F.col("one.joined") == F.col("other.joined"))
            & (F.col("one.suffix") == F.col("other.suffix"))
            & (F.col("one.item_id") != F.col("other.owner"))
        )
        incumbents = candidates.alias("one").join(published.alias("other"), same_id, how="left_anti")
        renumbered = candidates.alias("one").join(published.alias("other"), same_id, how="left_semi").drop("suffix")
        suffixes = published.select("joined", "suffix").unionByName(incumbents.select("joined", "suffix"))
        free = suffixes.groupBy("joined").agg((F.max("suffix") + 1).alias("free"))
        newcomers = encoded.where("kept_suffix IS NULL").unionByName(renumbered).join(free, "joined", how="left")
        rows = (
            newcomers.withColumn("suffix", F.coalesce("free", F.lit(0)) + position).drop("free").unionByName(incumbents)
        )
    # `12-87`, or `12-87-1` with a suffix above 0: tokenizer.text_of in SQL (a test compares the two).
    text = F.when(F.col("suffix") == 0, F.col("joined")).otherwise(F.concat_ws("-", "joined", "suffix"))
    columns = {
        "suffix": F.col("suffix").cast("int"),
        "semantic_id": text,
        "codebook_hash": F.lit(codebook.hash),
        "run_date": F.lit(run_date).cast("date"),
    }
    return rows.withColumns(columns).select(*SEMANTIC_IDS.schema.names)
