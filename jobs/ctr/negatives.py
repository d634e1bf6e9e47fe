"""Sampled negatives of a log that holds clicks only.

A sampled row never happened: it counts in no feature, and gets the features of its item as of its own moment, as the
click beside it does. What is sampled must not differ from what is clicked in anything but the click, or the features
tell the label. So the candidates for a click are as of its moment: never an item that the user chooses at it, and of
the kind of the clicked item, which is one of three: the user chose it before, else the log has shown it before, else
it has not.

For example, the log has shown the items a, b and c, of which the user chose a. The candidates for a click on b, which
is new to the user, are c; for one on d, which is new to the log, the other items that the log has not shown.

`uniform`: every candidate is equally likely, exactly, however many of them the user has chosen.
`popularity`: for a click on an item that is new to the user, items are drawn in proportion to how often the log has
shown them before, exactly, by drawing earlier rows of the log. An item drawn so has been shown once more than the
next click's would be, so this row is left out of the counts of its item (`drawn`): then counts of clicks and of
negatives are distributed alike (it is the estimate of Good and Turing), whether or not the log has shown the click's
item before. DRAWS rows a negative are drawn; a click for which too many of those are of items that the user chose is
no example. Items that the user chose before are drawn uniformly.

No task holds the catalogue. Items are numbered in the order in which they first occur (`rank`), so that the items
that the log has shown before a moment are the numbers below a bound (`known`), and a number that was drawn becomes an
item by a join.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from jobs.ctr.sampling import Clicks, mixed, sample
from jobs.ctr.users import numbers_of, starts_of, whole_users

BUCKETS = 1024  # intervals of time within which rows are numbered, each by one task
DRAWS = 4  # rows of the log drawn for each negative by popularity
EVENTS = "user_id STRING, rank BIGINT, label INT, ts BIGINT, logged BOOLEAN, example BOOLEAN, drawn BOOLEAN"


def with_negatives(rows: DataFrame, has_clock: bool, negatives: int, sampling: str, seed: int) -> DataFrame:
    """The clicks `rows` and, at the moment of each, `negatives` sampled items; the same on every run.

    Returns:
        user_id, item_id, label, ts; `logged` is false for what was sampled; `example` is false for a click without
        candidates, which is history of its user only; `drawn`: the counts of the item are without one earlier row.
    """
    bucket = f"CAST(pmod(xxhash64(item_id), {BUCKETS}) AS INT)"  # without a clock every item is known at every moment
    if has_clock:
        bounds = rows.agg(F.min("ts"), F.max("ts")).first()
        assert bounds is not None
        low, width = int(bounds[0]), -(-(int(bounds[1]) - int(bounds[0]) + 1) // BUCKETS)
        bucket = f"CAST((ts - {low}L) div {width}L AS INT)"
    items = rows.groupBy("item_id").agg(F.min("ts").alias("ts")).withColumn("bucket", F.expr(bucket))
    starts, total = _starts(items)
    items = _numbered(items, starts, "rank", "ts", "item_id")
    ranks = items.select("item_id", "rank")
    clicks = rows.withColumn("bucket", F.expr(bucket)).join(ranks, "item_id", how="inner")
    clicks = _count_before(clicks, items, starts, "known") if has_clock else clicks.withColumn("known", F.lit(total))
    if sampling == "popularity":
        clicks = _with_drawn(clicks, has_clock, negatives * DRAWS, seed)
    else:
        clicks = clicks.withColumn("drawn", F.lit(None).cast("array<bigint>"))

    def sampled(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for users in whole_users(batches):
            yield _events(users, total, negatives, seed)

    columns = ("user_id", "rank", "ts", "known", "drawn")
    ordered = clicks.select(*columns).repartition("user_id").sortWithinPartitions("user_id", "ts", "rank")
    events = ordered.mapInArrow(sampled, EVENTS)
    return events.join(ranks, "rank", how="inner").select(
        "user_id", "item_id", "label", "ts", "logged", "example", "drawn"
    )


# ---- numbers of items and of rows, without a task that has them all ----


def _starts(frame: DataFrame) -> tuple[DataFrame, int]:
    """For each bucket the rows of `frame` in the buckets before it, and the rows of all."""
    counts = np.zeros(BUCKETS, np.int64)
    for bucket, count in frame.groupBy("bucket").count().collect():
        counts[bucket] = count
    before = np.cumsum(counts) - counts
    values = [(bucket, int(start)) for bucket, start in enumerate(before)]
    return frame.sparkSession.createDataFrame(values, "bucket INT, start BIGINT"), int(counts.sum())


def _numbered(frame: DataFrame, starts: DataFrame, name: str, *order: str) -> DataFrame:
    """`frame` with the numbers of its rows, from 0, in order of bucket and `order`."""
    number = F.row_number().over(Window.partitionBy("bucket").orderBy(*order)) - 1
    return (
        frame.join(F.broadcast(starts), "bucket", how="inner").withColumn(name, number + F.col("start")).drop("start")
    )


def _count_before(clicks: DataFrame, counted: DataFrame, starts: DataFrame, name: str) -> DataFrame:
    """`clicks` with the number of rows of `counted` that have a smaller ts; `starts` are those of `counted`."""
    columns = clicks.columns
    marks = [
        (F.col(c) if c in ("ts", "bucket") else F.lit(None).cast(clicks.schema[c].dataType)).alias(c) for c in columns
    ]
    both = clicks.withColumn("counts", F.lit(0)).unionByName(counted.select(*marks, F.lit(1).alias("counts")))
    earlier = Window.partitionBy("bucket").orderBy("ts").rangeBetween(Window.unboundedPreceding, -1)
    both = both.withColumn("within", F.coalesce(F.sum("counts").over(earlier), F.lit(0)))
    counted_before = both.where("counts = 0").join(F.broadcast(starts), "bucket", how="inner")
    return counted_before.select(*columns, (F.col("start") + F.col("within")).alias(name))


def _with_drawn(clicks: DataFrame, has_clock: bool, draws: int, seed: int) -> DataFrame:
    """`clicks` with the ranks of the items of `draws` rows of the log each, drawn among those before its moment."""
    starts, total = _starts(clicks)
    clicks = _numbered(clicks, starts, "number", "ts", "item_id", "user_id")
    clicks = _count_before(clicks, clicks, starts, "before") if has_clock else clicks.withColumn("before", F.lit(total))
    draw = F.explode(F.sequence(F.lit(0), F.lit(draws - 1))).alias("draw")
    hashed = F.xxhash64("user_id", "item_id", "ts", "draw", F.lit(seed))
    drawn = (
        clicks.where("before > 0")
        .select("user_id", "item_id", "ts", "before", F.col("number").alias("click"), draw)
        .select("click", "draw", F.pmod(hashed, F.col("before")).alias("number"))
        .join(clicks.select("number", "rank"), "number", how="inner")
        .groupBy("click")
        .agg(F.array_sort(F.collect_list(F.struct("draw", "rank"))).alias("drawn"))
        .select(F.col("click").alias("number"), F.col("drawn.rank").alias("drawn"))
    )
    return clicks.join(drawn, "number", how="left")


# ---- in tasks: rows of whole users, in order of user and ts (sampling.py) ----


def _events(users: pa.RecordBatch, total: int, negatives: int, seed: int) -> pa.RecordBatch:
    """The clicks of some users and their sampled negatives, as EVENTS."""
    user = numbers_of(users.column("user_id"))
    ts, rank, known = (users.column(name).to_numpy(zero_copy_only=False) for name in ("ts", "rank", "known"))
    names = users.column("user_id").dictionary_encode().dictionary.to_pylist()
    keys = np.array([zlib.crc32(name.encode(), seed) for name in names], np.uint64)[user]
    keys = mixed(keys << np.uint64(32) | (np.arange(len(user)) - starts_of(user)).astype(np.uint64))
    drawn = None
    if users.column("drawn").null_count < len(users):
        drawn = np.full((len(users), negatives * DRAWS), -1, np.int64)
        lists = users.column("drawn").fill_null([])
        length = lists.value_lengths().to_numpy(zero_copy_only=False)
        drawn[np.arange(drawn.shape[1]) < length[:, None]] = lists.flatten().to_numpy(zero_copy_only=False)
    example, repeat, sampled = sample(Clicks(user, ts, rank, known), total, negatives, keys, drawn)
    click = np.concatenate([np.arange(len(user)), np.repeat(np.flatnonzero(example), negatives)])
    logged = np.arange(len(click)) < len(user)
    return pa.RecordBatch.from_pydict(
        {
            "user_id": users.column("user_id").take(pa.array(click)),
            "rank": np.concatenate([rank, sampled[example].ravel()]),
            "label": logged.astype(np.int32),
            "ts": ts[click],
            "logged": logged,
            "example": np.where(logged, example[click], True),
            "drawn": ~logged & ~repeat[click] & (drawn is not None),
        }
    )
