"""Items that occur several times in a source."""

from __future__ import annotations

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F


def split_duplicates(verdicts: DataFrame) -> tuple[DataFrame, DataFrame]:
    """From the verdicts of all rows (`passes.VERDICTS`) one row per item to store, and the rejected rows.

    Of identical copies of an item the first is kept. Different vectors under one id are all rejected, since the
    right one is not known.

    Returns:
        Good rows (item_id, content_hash, row_group, row), and rejected ones (item_id, reason, detail, excerpt).
    """
    valid, position = verdicts.where(F.col("reason").isNull()), F.struct("row_group", "row")
    items = valid.groupBy("item_id").agg(
        F.count(F.lit(1)).alias("copies"),
        F.min("content_hash").alias("content_hash"),
        F.max("content_hash").alias("largest_hash"),
        F.min(position).alias("first"),
    )
    good = items.where("content_hash = largest_hash").select(
        "item_id", "content_hash", F.col("first.row_group").alias("row_group"), F.col("first.row").alias("row")
    )
    repeated = items.where("copies > 1").select("item_id", "copies", "first")
    copies = valid.join(repeated, "item_id").withColumn(
        "vectors", F.size(F.collect_set("content_hash").over(Window.partitionBy("item_id")))
    )
    conflicting = F.col("vectors") > 1
    duplicates = copies.where(conflicting | (position != F.col("first"))).select(
        "item_id",
        F.when(conflicting, "duplicate_conflicting").otherwise("duplicate_identical").alias("reason"),
        F.when(
            conflicting,
            F.format_string(
                "item id occurs %d times with %d different vectors; expected one row per item", "copies", "vectors"
            ),
        )
        .otherwise(F.format_string("item id occurs %d times with the same vector; the first is kept", "copies"))
        .alias("detail"),
        F.col("content_hash").alias("excerpt"),
    )
    bad = verdicts.where(F.col("reason").isNotNull()).select("item_id", "reason", "detail", "excerpt")
    return good, bad.unionByName(duplicates)
