"""The ids of a log against the ids of a catalogue: how much of the log is about items that have a semantic ID."""

from __future__ import annotations

from dataclasses import dataclass

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from jobs.config import TrainConfig
from jobs.ctr.log import Log, read_rows
from jobs.ctr.log_columns import ITEM
from jobs.errors import SchemaError

SHOWN = 3  # ids in a message
LOOKALIKES_FROM = 0.01  # share of interactions without an ID from which the ids are compared for how they are written


@dataclass(frozen=True)
class Coverage:
    """Which items of a log are in a catalogue."""

    interactions: int
    interactions_without: int
    items: int
    items_without: int

    @property
    def share_without(self) -> float:
        """Of the interactions: what the model sees of items that have no semantic ID."""
        return self.interactions_without / self.interactions


def coverage_of(log: Log, catalogue: DataFrame, train: TrainConfig) -> Coverage:
    """How much of a log is about items of `catalogue` (its `item_id`s).

    Raises:
        SchemaError: too little (train.max_share_without_id), or the ids are the same but for how they are written.
    """
    spark = catalogue.sparkSession
    counted = read_rows(log, spark).groupBy(ITEM).count()
    known = catalogue.select(ITEM, F.lit(True).alias("known"))
    items = counted.join(known, ITEM, how="left").cache()
    try:
        missing = F.col("known").isNull()
        totals = items.agg(
            F.sum("count"), F.sum(F.when(missing, F.col("count"))), F.count(F.lit(1)), F.count(F.when(missing, 1))
        ).first()
        assert totals is not None
        coverage = Coverage(*(int(total or 0) for total in totals))
        if coverage.interactions != log.rows_used:
            raise SchemaError(
                f"{train.interactions} has {coverage.interactions:,} usable rows, {log.rows_used:,} when it was "
                "examined; expected the log to stay as it is until it is read. Run it again"
            )
        limit, share = train.max_share_without_id, coverage.share_without
        if share <= min(limit, LOOKALIKES_FROM) or limit == 1:
            return coverage
        # Of the interactions without an item, those whose id is one of the catalogue's but for how it is written.
        spellings = catalogue.groupBy(_bare(F.col(ITEM)).alias("bare")).agg(F.min(ITEM).alias("spelling"))
        without = items.where(missing).withColumn("bare", _bare(F.col(ITEM))).join(spellings, "bare", how="left")
        alike = without.agg(F.sum(F.when(F.col("spelling").isNotNull(), F.col("count")))).first()
        assert alike is not None
        same = 2 * int(alike[0] or 0) > coverage.interactions_without
        if share <= limit and not same:
            return coverage
        shown = without.orderBy(F.col("spelling").isNull(), F.desc("count"), ITEM).limit(SHOWN).collect()
        known_ids = [row[ITEM] for row in catalogue.orderBy(ITEM).limit(SHOWN).collect()]
        spelling = shown[0]["spelling"]
    finally:
        items.unpersist()
    raise SchemaError(
        f"{share:.0%} of the interactions ({coverage.interactions_without:,} of {coverage.interactions:,}) and "
        f"{coverage.items_without:,} of {coverage.items:,} items of {train.interactions} have no semantic ID. The log "
        f"has ids such as {', '.join(repr(row[ITEM]) for row in shown)}, "
        f"the catalogue such as {', '.join(map(repr, known_ids))}"
        + (f"; most differ only in how they are written ({shown[0][ITEM]!r} is {spelling!r})" if same else "")
        + ". Expected the ids of load.source; write them alike, or allow more with train.max_share_without_id"
        + (f" (now {limit:g})" if share > limit else " = 1")
    )


def _bare(item: Column) -> Column:
    """An id without what tools add or lose: case, spaces around, zeros in front, `.0` behind."""
    return F.regexp_replace(F.regexp_replace(F.lower(F.trim(item)), r"\.0+$", ""), r"^0+(?=.)", "")
