"""The two passes of a load over its source, each a Spark job whose tasks read row groups themselves with pyarrow.

The first checks every row; only verdicts and hashes reach Spark. The second packs the rows whose vector the table
lacks: on a night on which little changed few vectors move.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import date

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema, to_arrow_schema

from jobs.embeddings.checks import CHECKED, check_rows
from jobs.embeddings.recipe import Recipe
from jobs.errors import SchemaError
from jobs.files.sources import ROWS_PER_BATCH, Source, SourceReader, row_group_frame
from jobs.warehouse.tables import ITEM_EMBEDDINGS

COMPONENTS_PER_BATCH = 2**26  # of longer rows a batch has fewer
UNCHANGED = "expected the source to stay as it is until load ends. Run it again"
# The position of a row in the source is the number of its row group, and its number in that.
VERDICTS = pa.schema(
    [
        *(field for field in CHECKED if field.name not in ("embedding", "modalities")),
        ("row_group", pa.int32()),
        ("row", pa.int32()),
    ]
)
STORED = to_arrow_schema(ITEM_EMBEDDINGS.schema)


def checked_rows(source: Source, recipe: Recipe, spark: SparkSession) -> DataFrame:
    """First pass: the verdict on every row of the source, a hash of its embedding or why it is rejected (VERDICTS)."""
    reader = _reader(source, recipe)

    def check(groups: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for group in (row for batch in groups for row in batch.to_pylist()):
            start = 0
            for batch in reader.batches(group["uri"], group["index"]):
                end = start + len(batch)
                position = {
                    "row_group": pa.array(np.full(len(batch), group["row_group"], np.int32)),
                    "row": pa.array(np.arange(start, end, dtype=np.int32)),
                }
                yield _with_schema(VERDICTS, check_rows(batch, recipe), position)
                start = end

    tasks = len(source.row_groups)
    work = row_group_frame(spark, source, range(tasks)).repartitionById(max(1, tasks), F.col("task"))
    return work.mapInArrow(check, from_arrow_schema(VERDICTS))


def embedding_rows(
    pending: DataFrame, counts: Mapping[int, int], source: Source, recipe: Recipe, run_date: date, tasks: int
) -> DataFrame:
    """Second pass: the rows of `item_embeddings` for `pending` rows of the source.

    Args:
        pending: item_id, content_hash, row_group and row of the first pass, and first_seen, null for a new item.
        counts: row group -> number of its pending rows.
        source: as the first pass read it.
        recipe: how rows become embeddings.
        run_date: the day of the load.
        tasks: among how many tasks the row groups are shared out.
    """
    reader = _reader(source, recipe)

    def pack(groups: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for group in (batch.slice(row, 1) for batch in groups for row in range(len(batch))):
            uri, index, rows = (group.column(name)[0] for name in ("uri", "index", "pending"))
            yield from pack_group(uri.as_py(), index.as_py(), rows.values)

    def pack_group(uri: str, index: int, pending: pa.StructArray) -> Iterator[pa.RecordBatch]:
        rows, start = pending.field("row").to_numpy(), 0
        for batch in reader.batches(uri, index):
            first, end = np.searchsorted(rows, (start, start + len(batch))).tolist()
            if first < end:
                chosen = batch.take(pa.array(rows[first:end] - start))
                yield _stored(check_rows(chosen, recipe), pending.slice(first, end - first), recipe, run_date)
            start += len(batch)
        if rows[-1] >= start:
            raise SchemaError(f"a row group has {start} rows, fewer than when it was checked; {UNCHANGED}")

    groups = row_group_frame(pending.sparkSession, source, _shares(counts, len(source.row_groups), tasks))
    by_group = pending.groupBy("row_group").agg(
        F.sort_array(F.collect_list(F.struct("row", "item_id", "content_hash", "first_seen"))).alias("pending")
    )
    work = by_group.join(F.broadcast(groups), "row_group").repartitionById(tasks, F.col("task"))
    return work.mapInArrow(pack, ITEM_EMBEDDINGS.schema)


def _reader(source: Source, recipe: Recipe) -> SourceReader:
    rows = max(1, min(ROWS_PER_BATCH, COMPONENTS_PER_BATCH // recipe.fusion.dim))
    return source.reader([recipe.item_id, *recipe.fusion.dims], rows, as_written=[recipe.item_id])


def _shares(counts: Mapping[int, int], groups: int, tasks: int) -> list[int | None]:
    """The task of each of `groups` row groups, in order, so that tasks get about as many rows; None without rows."""
    total, before = sum(counts.values()), 0
    shares: list[int | None] = []
    for group in range(groups):
        shares.append(before * tasks // total if group in counts else None)
        before += counts.get(group, 0)
    return shares


def _stored(checked: pa.RecordBatch, pending: pa.StructArray, recipe: Recipe, run_date: date) -> pa.RecordBatch:
    """Rows of the table from rows that were checked again.

    Raises:
        SchemaError: they are not what the first pass saw.
    """
    for name in ("item_id", "content_hash"):
        if not checked.column(name).equals(pending.field(name)):
            raise SchemaError(f"a row has another {name} than when it was checked; {UNCHANGED}")
    n, day = len(checked), pa.scalar(run_date, pa.date32())
    added = {
        "dim": pa.array(np.full(n, recipe.fusion.dim, np.int32)),
        "first_seen": pending.field("first_seen").fill_null(day),
        "run_date": pa.repeat(day, n),
    }
    return _with_schema(STORED, checked, added)


def _with_schema(schema: pa.Schema, batch: pa.RecordBatch, added: Mapping[str, pa.Array]) -> pa.RecordBatch:
    columns = [added[name] if name in added else batch.column(name) for name in schema.names]
    return pa.RecordBatch.from_arrays(columns, schema=schema)
