"""Sampled negatives of a log that holds clicks only.

A sampled row never happened: it counts in no feature, and gets the features of its item as of its own moment, as the click
beside it does. What is sampled must not differ from what is clicked in anything but the click, or the features tell the
label. So the candidates for a click are as of its moment: never an item that the user chooses at it, and of the kind of the
clicked item, which is one of three: the user chose it before, else the log has shown it before, else it has not.

`uniform`: every candidate is equally likely, exactly, however many of them the user has chosen.
`popularity`: for a click on an item that is new to the user, items are drawn in proportion to how often the log has shown them
before, exactly, by drawing earlier rows of the log. An item drawn so has been shown once more than the next click's would be,
so this row is left out of the counts of its item (`drawn`): then counts of clicks and of negatives are distributed alike (it
is the estimate of Good and Turing), whether or not the log has shown the click's item before. DRAWS rows a negative are
drawn; a click for which too many of those are of items that the user chose is no example. Items that the user chose before
are drawn uniformly.

No task holds the catalogue. Items are numbered in the order in which they first occur (`rank`), so that the items that the log
has shown before a moment are the numbers below a bound (`known`), and a number that was drawn becomes an item by a join.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from jobs.ctr.users import Int64, numbers_of, starts_of, whole_users

BUCKETS = 1024  # intervals of time within which rows are numbered, each by one task
DRAWS = 4  # rows of the log drawn for each negative by popularity
SPARSE = (
    0.05  # share of a range that is allowed, below which its numbers are listed instead of drawn until one is allowed
)
EVENTS = "user_id STRING, rank BIGINT, label INT, ts BIGINT, logged BOOLEAN, example BOOLEAN, drawn BOOLEAN"

Bools = npt.NDArray[np.bool_]


def with_negatives(rows: DataFrame, has_clock: bool, negatives: int, sampling: str, seed: int) -> DataFrame:
    """The clicks `rows` and, at the moment of each, `negatives` sampled items; the same on every run.

    Returns:
        user_id, item_id, label, ts; `logged` is false for what was sampled; `example` is false for a click without candidates,
        which is history of its user only; `drawn`: the counts of the item are without one earlier row.
    """
    bucket = "CAST(pmod(xxhash64(item_id), 1024) AS INT)"  # without a clock every item is known at every moment
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
    found = both.where("counts = 0").join(F.broadcast(starts), "bucket", how="inner")
    return found.select(*columns, (F.col("start") + F.col("within")).alias(name))


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


# ---- in tasks: rows of whole users, in order of user and ts ----


def _events(users: pa.RecordBatch, total: int, negatives: int, seed: int) -> pa.RecordBatch:
    """The clicks of some users and their sampled negatives, as EVENTS."""
    user = numbers_of(users.column("user_id"))
    ts, rank, known = (users.column(name).to_numpy(zero_copy_only=False) for name in ("ts", "rank", "known"))
    names = users.column("user_id").dictionary_encode().dictionary.to_pylist()
    keys = np.array([zlib.crc32(name.encode(), seed) for name in names], np.uint64)[user]
    keys = _mixed(keys << np.uint64(32) | (np.arange(len(user)) - starts_of(user)).astype(np.uint64))
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


class Clicks(NamedTuple):
    """Clicks of whole users in order of `user` and `ts`, (n,) each: number of the user, moment, rank of the item, and how
    many items the log has shown before that moment, which are the ranks below it."""

    user: Int64
    ts: Int64
    rank: Int64
    known: Int64


def sample(
    clicks: Clicks, total: int, negatives: int, keys: npt.NDArray[np.uint64], drawn: Int64 | None = None
) -> tuple[Bools, Bools, Int64]:
    """Which clicks are examples (n,), which are on items that the user chose before (n,), and `negatives` ranks for each
    example, (n, negatives), from `total` items.

    Args:
        keys: (n,) what the random numbers of a click are made of.
        drawn: (n, draws) ranks drawn by popularity before the moment of the click, -1 for none; uniform without it.
    """
    user, ts, rank, known = clicks
    moment, first_of_user = starts_of(user, ts), starts_of(user)
    pairs, first, pair = np.unique(user * total + rank, return_index=True, return_inverse=True)
    chosen_at = ts[first]  # of the distinct pairs of user and item, sorted; rows are in order of time
    is_first = np.zeros(len(user), bool)
    is_first[first] = True
    repeat = chosen_at[pair] < ts
    of_moment, first = np.unique(moment * total + rank, return_index=True)
    once = np.zeros(len(user), bool)  # the first of equal items of a moment
    once[first] = True

    def of_its_moment(counted: Bools) -> Int64:
        return np.bincount(moment, counted, len(user)).astype(np.int64)[moment]

    distinct = np.cumsum(is_first) - is_first  # pairs before each row
    own = np.flatnonzero(is_first)  # their rows; those of a user stand together, in order of time
    first_own = distinct[first_of_user]
    chosen = distinct[moment] - first_own  # distinct items that the user chose before the moment
    seen = ~repeat & (rank < known)
    low = np.where(repeat | seen, 0, known)
    high = np.where(repeat, chosen, np.where(seen, known, total))
    excluded = np.where(
        repeat, of_its_moment(once & repeat),
        np.where(seen, chosen + of_its_moment(is_first & (rank < known)), of_its_moment(is_first & (rank >= known))),
    )  # fmt: skip
    left = high - low - excluded

    def ranks_of(click: Int64, number: Int64) -> Int64:
        """The rank that a number of [low, high) stands for: itself, or of the user's own items the one so many after the first."""
        found = number.copy()
        again = repeat[click]
        found[again] = rank[own[first_own[click[again]] + number[again]]]
        return found

    def allowed(click: Int64, item: Int64) -> Bools:
        again = repeat[click]
        wanted = np.where(again, moment[click], user[click]) * total + item
        position = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
        chosen_by_then = (pairs[position] == wanted) & (chosen_at[position] <= ts[click])
        position = np.minimum(np.searchsorted(of_moment, wanted), len(of_moment) - 1)
        taken: Bools = np.where(again, of_moment[position] == wanted, chosen_by_then)
        return ~taken

    example = left > 0
    sampled = np.full((len(user), negatives), -1, np.int64)
    if drawn is not None:
        usable = (drawn >= 0) & allowed(np.repeat(np.arange(len(user)), drawn.shape[1]), drawn.ravel()).reshape(
            drawn.shape
        )
        best = np.argsort(~usable, axis=1, kind="stable")[:, :negatives]
        example = np.where(repeat, example, usable.sum(1) >= negatives)
        sampled[~repeat] = np.take_along_axis(drawn, best, axis=1)[~repeat]
    uniform = example if drawn is None else example & repeat
    few = uniform & (left < SPARSE * (high - low))
    for row in np.flatnonzero(few):
        numbers = np.arange(low[row], high[row])
        same = np.full(len(numbers), row)
        candidates = ranks_of(same, numbers)
        candidates = candidates[allowed(same, candidates)]
        drawn_numbers = _random(np.repeat(keys[row], negatives), np.arange(negatives), 0)
        sampled[row] = candidates[drawn_numbers % len(candidates)]
    click, column = (part.ravel() for part in np.nonzero(np.repeat((uniform & ~few)[:, None], negatives, axis=1)))
    attempt = 0
    while len(click):
        number = low[click] + _random(keys[click], column, attempt) % (high - low)[click]
        item = ranks_of(click, number)
        taken = allowed(click, item)
        sampled[click[taken], column[taken]] = item[taken]
        click, column, attempt = click[~taken], column[~taken], attempt + 1
    return example, repeat, sampled


def _random(key: npt.NDArray[np.uint64], column: Int64, attempt: int) -> Int64:
    """A number in [0, 2**62) of each key, column and attempt, the same on every run."""
    counter = (column.astype(np.uint64) << np.uint64(32)) + np.uint64(attempt)
    numbers: Int64 = (_mixed(key + _mixed(counter)) >> np.uint64(2)).astype(np.int64)
    return numbers


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of SplitMix64: of numbers that differ in one bit about half the bits differ."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
