"""Training, validation and test follow each other in time: where one ends and the next begins."""

from __future__ import annotations

import numpy as np
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

TEST_SHARE = 0.1  # of the rows; validation is the same share before it
BUCKETS = 4096  # counts that one pass over the log brings to the driver
EXACT_TO = 0.001  # of the rows: by how much the share before a split moment may be off


def split_moments(rows: DataFrame) -> tuple[int, int]:
    """First moments of validation and test of a log with a clock: the last two tenths of its rows, or where those fall
    on one moment (a log of a few days) its last two moments.

    Each pass over `rows` counts them in BUCKETS equal intervals and then looks only into the interval that holds the
    moment, until that interval has at most EXACT_TO of the rows or is one moment. So the driver never has more than
    BUCKETS numbers, and the result does not depend on how Spark divides the rows.
    """
    found = rows.agg(F.min("ts"), F.max("ts"), F.count(F.lit(1))).first()
    assert found is not None
    first, last, total = (int(value) for value in found)
    validation, test = (_moment_at(rows, first, last, total, share) for share in (1 - 2 * TEST_SHARE, 1 - TEST_SHARE))
    if first < validation < test:
        return validation, test
    previous = rows.where(F.col("ts") < last).agg(F.max("ts")).first()
    assert previous is not None
    return int(previous[0]), last


def _moment_at(rows: DataFrame, low: int, high: int, total: int, share: float) -> int:
    """A moment in [low, high] that about `share` of the `total` rows precede."""
    target, before = share * total, 0
    while True:
        width = -(-(high - low + 1) // BUCKETS)
        inside = rows.where(F.col("ts").between(low, high))
        counted = inside.groupBy(F.expr(f"(ts - {low}L) div {width}L").alias("bucket")).count().collect()
        counts = dict(sorted((int(row["bucket"]), int(row["count"])) for row in counted))
        after = before + np.cumsum(list(counts.values()))
        bucket = list(counts)[int(np.searchsorted(after, target, side="right"))]
        count = counts[bucket]
        before = int(after[list(counts).index(bucket)]) - count
        low, high = low + bucket * width, min(high, low + (bucket + 1) * width - 1)
        if width == 1 or count <= EXACT_TO * total:
            return low


def with_split(events: DataFrame, moments: tuple[int, int] | None) -> DataFrame:
    """`events` with the column `split`. Without `moments` (positions, which only order the events of one user) each
    user gives the last tenth of their own moments, at least one, to the test, and as many before them to validation.
    """
    if moments is not None:
        validation, test = moments
        is_test, is_validation = F.col("ts") >= test, F.col("ts") >= validation
    else:
        user = Window.partitionBy("user_id")
        events = events.withColumn("moment", F.dense_rank().over(user.orderBy("ts")))
        events = events.withColumn("moments", F.max("moment").over(user))
        last = F.greatest(F.lit(1), F.bround(TEST_SHARE * F.col("moments")))
        is_test = F.col("moment") > F.col("moments") - last
        is_validation = F.col("moment") > F.col("moments") - 2 * last
    split = F.when(is_test, "test").when(is_validation, "validation").otherwise("train")
    return events.withColumn("split", split).drop("moment", "moments")
