"""Leak-free CTR examples in Spark: for each impression, what was known strictly before it.

A log without labels and ratings holds clicks only; what was not clicked is sampled. A sampled row never happened: it
counts in no feature, and gets the features of its item as of its own moment, as the click beside it does. What is
sampled must not differ from what is clicked in anything but the click, or the features tell the label:
an item the user chose before stands against items he chose before, an item new to him against others that are new to
him, an item that the log has not shown yet against others that it has not shown yet.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from jobs.config import TrainConfig
from jobs.ctr.log import Log
from jobs.warehouse.tables import CTR_EXAMPLES

# Of what build_examples writes. With a higher number every warehouse builds its examples and trains its model anew.
EXAMPLES_RECIPE = 2
FEATURES = (
    "log history length",
    "user's click rate so far",
    "log impressions of the item so far",
    "item's click rate so far",
)
TEST_SHARE = 0.1  # of time; validation is the same share before it
EVENTS = "user_id STRING, item_id STRING, label INT, ts BIGINT, logged BOOLEAN, example BOOLEAN"
SCHEMA = (
    "user_id STRING, item_id STRING, label INT, ts BIGINT, history ARRAY<STRING>, features ARRAY<FLOAT>, split STRING"
)
ALWAYS = np.iinfo(np.int64).min  # first moment of every item of a log without a clock

Int64 = npt.NDArray[np.int64]


def build_examples(rows: DataFrame, log: Log, train: TrainConfig) -> DataFrame:
    """`ctr_examples` of the rows of a log. History and features of an example use only what happened strictly before it."""
    first_validation, first_test = split_moments(rows) if log.has_clock else (None, None)
    events = rows.withColumns({"logged": F.lit(True), "example": F.lit(True)})
    if log.positives_only:
        sampled = _sampler(_catalogue(rows, log.has_clock), train.negatives, train.seed)
        events = rows.groupBy("user_id").applyInPandas(sampled, EVENTS)
    if log.has_clock:
        before = Window.partitionBy("item_id").orderBy("ts").rangeBetween(Window.unboundedPreceding, -1)
        logged = F.when(F.col("logged"), F.col("label"))
        events = events.withColumns(
            {
                "item_shown": F.count(logged).over(before),
                "item_clicked": F.coalesce(F.sum(logged).over(before), F.lit(0)),
            }
        )
    else:
        # Positions of different users cannot be compared, so what other users did before is not known.
        unknown = F.lit(0).cast("long")
        events = events.withColumns({"item_shown": unknown, "item_clicked": unknown})
    per_user = _per_user(train.history, first_validation, first_test)
    return events.groupBy("user_id").applyInPandas(per_user, SCHEMA).select(*CTR_EXAMPLES.schema.names)


def split_moments(rows: DataFrame) -> tuple[float, float]:
    """First moments of validation and test: the last two tenths of the rows, or where those fall on one moment (a log
    of a few days) the last two moments."""
    first, validation, test = rows.approxQuantile("ts", [0.0, 1 - 2 * TEST_SHARE, 1 - TEST_SHARE], 0.0)
    if first < validation < test:
        return validation, test
    last = rows.select("ts").distinct().orderBy(F.desc("ts")).limit(2).collect()
    return float(last[1]["ts"]), float(last[0]["ts"])


# ---- sampled negatives ----


@dataclass(frozen=True, eq=False)
class Catalogue:
    """The items of a log in the order in which they first occur, and those moments."""

    items: pd.Index
    first: Int64


def _catalogue(rows: DataFrame, has_clock: bool) -> Catalogue:
    first = F.min("ts") if has_clock else F.lit(int(ALWAYS))
    items = rows.groupBy("item_id").agg(first.alias("first")).toArrow().to_pandas().sort_values(["first", "item_id"])
    return Catalogue(pd.Index(items["item_id"]), items["first"].to_numpy(np.int64))


def _sampler(catalogue: Catalogue, negatives: int, seed: int) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def sampled(user: pd.DataFrame) -> pd.DataFrame:
        return with_negatives(user, catalogue, negatives, seed)

    return sampled


def with_negatives(user: pd.DataFrame, catalogue: Catalogue, negatives: int, seed: int) -> pd.DataFrame:
    """The user's clicks and, at the moment of each, `negatives` sampled items; the same on every run.

    Candidates are as of that moment: never an item that the user chooses at it, and of the kind of the clicked one,
    which is one of three: chosen by the user before, else shown in the log before, else shown by nobody yet. A click
    without a candidate is no example (`example` is false), but it is history.
    """
    name = str(user["user_id"].iloc[0])
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    user = user.sort_values(["ts", "item_id"], kind="stable")
    ts = user["ts"].to_numpy(np.int64)
    item = catalogue.items.get_indexer(user["item_id"]).astype(np.int64)
    shown = np.searchsorted(catalogue.first, ts, side="left")  # items of the catalogue that occur before each moment
    chosen = np.empty(0, np.int64)  # distinct items of the user before the moment, sorted
    example = np.ones(len(user), bool)
    sampled = np.zeros((len(user), negatives), np.int64)
    for rows in np.split(np.arange(len(user)), np.flatnonzero(np.diff(ts)) + 1):
        now, known = np.unique(item[rows]), int(shown[rows[0]])
        fresh = now[[not _contains(chosen, number) for number in now]]
        by_then = np.insert(chosen, np.searchsorted(chosen, fresh), fresh)
        for row in rows:
            if _contains(chosen, item[row]):
                rank = _outside(np.searchsorted(chosen, np.setdiff1d(now, fresh)), 0, len(chosen), negatives, generator)
                picked = None if rank is None else chosen[rank]
            elif item[row] < known:
                picked = _outside(by_then, 0, known, negatives, generator)
            else:
                picked = _outside(by_then, known, len(catalogue.first), negatives, generator)
            if picked is None:
                example[row] = False
            else:
                sampled[row] = picked
        chosen = by_then
    clicks = user.assign(logged=True, example=example)
    added = pd.DataFrame(
        {
            "user_id": name,
            "item_id": catalogue.items.to_numpy()[sampled[example].reshape(-1)],
            "label": np.int32(0),
            "ts": np.repeat(ts[example], negatives),
            "logged": False,
            "example": True,
        }
    )
    return pd.concat([clicks, added], ignore_index=True) if len(added) else clicks


def _contains(ordered: Int64, value: np.int64) -> bool:
    position = int(np.searchsorted(ordered, value))
    return position < len(ordered) and bool(ordered[position] == value)


def _outside(excluded: Int64, low: int, high: int, size: int, generator: np.random.Generator) -> Int64 | None:
    """`size` numbers of [low, high) that are not in the sorted `excluded`, uniform; None where there are none."""
    inside = excluded[np.searchsorted(excluded, low) : np.searchsorted(excluded, high)]
    left = high - low - len(inside)
    if left <= 0:
        return None
    rank = generator.integers(left, size=size)  # among the numbers that are left
    drawn: Int64 = low + rank + np.searchsorted(inside - low - np.arange(len(inside)), rank, side="right")
    return drawn


# ---- examples of a user ----


def _per_user(
    keep: int, first_validation: float | None, first_test: float | None
) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def examples(user: pd.DataFrame) -> pd.DataFrame:
        return user_examples(user, keep, first_validation, first_test)

    return examples


def user_examples(
    user: pd.DataFrame, keep: int, first_validation: float | None, first_test: float | None
) -> pd.DataFrame:
    """The examples of one user, in order of time; `history` is the latest `keep` clicks with a smaller ts, oldest first.

    Only rows of the log (`logged`) are behaviour; sampled ones have it, but are none.
    """
    user = user.sort_values(["ts", "item_id"], kind="stable")
    ts, label, logged = (user[name].to_numpy() for name in ("ts", "label", "logged"))
    clicked = logged & (label == 1)
    clicked_items = user["item_id"].to_numpy()[clicked]
    past_clicks = np.searchsorted(ts[clicked], ts, side="left")  # clicks with a smaller ts
    past_rows = np.searchsorted(ts[logged], ts, side="left")
    history = [clicked_items[max(0, n - keep) : n].tolist() for n in past_clicks]
    item_shown, item_clicked = user["item_shown"].to_numpy(), user["item_clicked"].to_numpy()
    features = np.stack(
        [
            np.log1p(past_clicks),
            (past_clicks + 1) / (past_rows + 4),
            np.log1p(item_shown),
            (item_clicked + 1) / (item_shown + 4),
        ],
        axis=1,
    ).astype(np.float32)
    if first_test is None or first_validation is None:
        moments = np.unique(ts)  # the user's own last tenth, at least one moment each
        last = max(1, round(TEST_SHARE * len(moments)))
        first_test, first_validation = moments[-last], moments[max(0, len(moments) - 2 * last)]
    split = np.where(ts >= first_test, "test", np.where(ts >= first_validation, "validation", "train"))
    examples = pd.DataFrame(
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
    return examples[user["example"].to_numpy()]
