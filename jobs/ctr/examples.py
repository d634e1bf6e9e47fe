"""Leak-free CTR examples in Spark: for each impression, what the user clicked strictly before it."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from jobs.config import TrainConfig
from jobs.tables import CTR_EXAMPLES, SchemaError

FEATURES = (
    "log history length",
    "user's click rate so far",
    "log impressions of the item so far",
    "item's click rate so far",
)
TEST_SHARE = 0.1  # of time; validation is the same share before it
SCHEMA = (
    "user_id STRING, item_id STRING, label INT, ts BIGINT, history ARRAY<STRING>, features ARRAY<FLOAT>, split STRING"
)


@dataclass(frozen=True)
class Log:
    """Interactions with columns user_id, item_id, label, ts; `note` says how labels and time were come by."""

    rows: DataFrame
    has_clock: bool  # ts is one clock for all users, not a position per user
    positives_only: bool
    note: str


def read_log(spark: SparkSession, train: TrainConfig) -> Log:
    """The interactions in one form. `label`, else `rating`, else positives only; `timestamp`, else `order`.

    Raises:
        SchemaError: a column is missing.
    """
    frame = spark.read.parquet(train.interactions)
    names = frame.columns
    time = next((name for name in ("timestamp", "order") if name in names), None)
    if not {"user_id", "item_id"} <= set(names) or time is None:
        raise SchemaError(
            f"interactions have columns {names}; expected user_id, item_id, one of timestamp or order, and perhaps label or rating"
        )
    if "label" in names:
        label, note = (F.col("label") > 0).cast("int"), "labels as given"
    elif "rating" in names:
        label, note = (
            (F.col("rating") >= train.click_rating).cast("int"),
            f"a rating of {train.click_rating:g} or more is a click",
        )
    else:
        label = F.lit(1)
        note = f"positives only: {train.negatives} sampled negatives per positive, uniform over the items the user never chose"
    rows = frame.select(
        F.col("user_id").cast("string").alias("user_id"),
        F.col("item_id").cast("string").alias("item_id"),
        label.alias("label"),
        F.col(time).cast("long").alias("ts"),
    ).dropna()
    return Log(rows, time == "timestamp", "label" not in names and "rating" not in names, note)


def build_examples(log: Log, train: TrainConfig) -> DataFrame:
    """`ctr_examples` of a log. History and features of an example use only what happened strictly before it."""
    rows = log.rows
    if log.has_clock:
        before = Window.partitionBy("item_id").orderBy("ts").rangeBetween(Window.unboundedPreceding, -1)
        rows = rows.withColumn("item_shown", F.count(F.lit(1)).over(before)).withColumn(
            "item_clicked", F.coalesce(F.sum("label").over(before), F.lit(0))
        )
        first_validation, first_test = rows.approxQuantile("ts", [1 - 2 * TEST_SHARE, 1 - TEST_SHARE], 0.0)
    else:
        # Positions of different users cannot be compared, so what other users did before is not known.
        rows = rows.withColumn("item_shown", F.lit(0).cast("long")).withColumn("item_clicked", F.lit(0).cast("long"))
        first_validation = first_test = None
    catalogue = (
        np.array(sorted(row["item_id"] for row in rows.select("item_id").distinct().collect()))
        if log.positives_only
        else None
    )
    per_user = _user_examples(train.history, train.negatives, train.seed, catalogue, first_validation, first_test)
    return rows.groupBy("user_id").applyInPandas(per_user, SCHEMA).select(*CTR_EXAMPLES.schema.names)


def _user_examples(
    keep: int,
    negatives: int,
    seed: int,
    catalogue: np.ndarray | None,
    first_validation: float | None,
    first_test: float | None,
) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def examples(user: pd.DataFrame) -> pd.DataFrame:
        if catalogue is not None:
            user = with_negatives(user, catalogue, negatives, seed)
        return user_examples(user, keep, first_validation, first_test)

    return examples


def with_negatives(user: pd.DataFrame, catalogue: np.ndarray, negatives: int, seed: int) -> pd.DataFrame:
    """The user's positives and, at each one's time, `negatives` items the user never chose; the same on every run."""
    name = str(user["user_id"].iloc[0])
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    user = user.sort_values(["ts", "item_id"], kind="stable")
    others = np.setdiff1d(catalogue, user["item_id"].to_numpy())
    if not len(others):
        return user
    sampled = generator.choice(others, size=len(user) * negatives)
    added = pd.DataFrame(
        {
            "user_id": name,
            "item_id": sampled,
            "label": 0,
            "ts": np.repeat(user["ts"].to_numpy(), negatives),
            "item_shown": 0,
            "item_clicked": 0,
        }
    )
    return pd.concat([user, added], ignore_index=True)


def user_examples(
    user: pd.DataFrame, keep: int, first_validation: float | None, first_test: float | None
) -> pd.DataFrame:
    """The examples of one user, in order of time; `history` is the latest `keep` clicks with a smaller ts, oldest first."""
    user = user.sort_values(["ts", "item_id"], kind="stable")
    ts = user["ts"].to_numpy()
    label = user["label"].to_numpy()
    clicked_ts = ts[label == 1]
    clicked_items = user["item_id"].to_numpy()[label == 1]
    past_clicks = np.searchsorted(clicked_ts, ts, side="left")  # clicks with a smaller ts
    past_rows = np.searchsorted(ts, ts, side="left")
    history = [clicked_items[max(0, n - keep) : n].tolist() for n in past_clicks]
    shown, clicked = user["item_shown"].to_numpy(), user["item_clicked"].to_numpy()
    features = np.stack(
        [np.log1p(past_clicks), (past_clicks + 1) / (past_rows + 4), np.log1p(shown), (clicked + 1) / (shown + 4)],
        axis=1,
    ).astype(np.float32)
    if first_test is None or first_validation is None:
        moments = np.unique(ts)  # the user's own last tenth, at least one moment each
        last = max(1, round(TEST_SHARE * len(moments)))
        first_test, first_validation = moments[-last], moments[max(0, len(moments) - 2 * last)]
    split = np.where(ts >= first_test, "test", np.where(ts >= first_validation, "validation", "train"))
    return pd.DataFrame(
        {
            "user_id": user["user_id"].to_numpy(),
            "item_id": user["item_id"].to_numpy(),
            "label": label.astype(np.int32),
            "ts": ts,
            "history": history,
            "features": list(features),
            "split": split,
        }
    )
