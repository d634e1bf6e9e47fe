"""`ctr_examples`: one row a user and part, with the user's behaviours and the impressions to learn from.

What is known of an impression, a click or a sampled negative, is what happened strictly before it: its history ends
there, and its features count up to there. Spark joins, counts and sorts; tasks then see the rows of some whole users at
a time, with the codes of their items joined in, so that no process holds the log or the catalogue. The rows of one user
are in memory at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from jobs.config import TrainConfig
from jobs.ctr.log import Log
from jobs.ctr.negatives import with_negatives
from jobs.ctr.splits import split_moments, with_split
from jobs.ctr.users import Int64, numbers_of, ranges, starts_of, whole_users
from jobs.warehouse.tables import BEHAVIOUR, CTR_EXAMPLES, IMPRESSION
from tokenizer.alternates import FULL_WEIGHT

# Of what build_examples writes. With a higher number every warehouse builds its examples and trains its model anew.
EXAMPLES_RECIPE = 4
# The settings of `train` that build_examples depends on.
EXAMPLE_SETTINGS = frozenset({"history", "click_rating", "negatives", "negative_sampling", "seed"})
FEATURES = (
    "log history length",
    "user's click rate so far",
    "log impressions of the item so far",
    "item's click rate so far",
)
PART = 4096  # impressions of a part, or train.history if that is more, so that parts repeat little of the behaviours


def build_examples(rows: DataFrame, ids: DataFrame, log: Log, train: TrainConfig) -> DataFrame:
    """`ctr_examples` of the rows of a log (user_id, item_id, label, ts) and of `item_codes`."""
    moments = split_moments(rows) if log.has_clock else None
    if log.positives_only:
        events = with_negatives(rows, log.has_clock, train.negatives, train.negative_sampling, train.seed)
    else:
        events = rows.withColumns({"logged": F.lit(True), "example": F.lit(True), "drawn": F.lit(False)})
    events = with_split(events, moments)
    of_item = Window.partitionBy("item_id")
    in_training = F.when(F.col("logged") & (F.col("split") == "train"), 1)
    counts = {"shown": F.count(in_training).over(of_item).cast("int")}
    if log.has_clock:
        before = of_item.orderBy("ts").rangeBetween(Window.unboundedPreceding, -1)
        logged = F.when(F.col("logged"), F.col("label"))
        left_out = F.col("drawn").cast("long")
        counts["item_shown"] = F.count(logged).over(before) - left_out
        counts["item_clicked"] = F.coalesce(F.sum(logged).over(before), F.lit(0)) - left_out
    else:  # positions of different users cannot be compared, so what other users did before is not known
        counts["item_shown"] = counts["item_clicked"] = F.lit(0).cast("long")
    events = events.withColumns(counts).join(ids, "item_id", how="left")
    history = train.history

    def examples(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for users in whole_users(batches):
            yield user_rows(users, history)

    ordered = events.repartition("user_id").sortWithinPartitions("user_id", "ts", "item_id", "label", "logged")
    return ordered.mapInArrow(examples, CTR_EXAMPLES.schema)


def item_codes(ids: DataFrame) -> DataFrame:
    """item_id, codes and weights of the items of a codebook, the alternates of all levels in one list each.

    Of each level the item's own code comes first, then the most probable others. The alternates 12 (weight 200), 7 (55)
    and 87 (255), 3 (0) of two levels give codes [12, 7, 87, 3] and weights [200, 55, 255, 0]. An item without
    alternates has its own codes alone, each with all the weight: [12, 87] and [255, 255].
    """
    one = F.transform("codes", lambda code: F.lit(FULL_WEIGHT).cast("smallint"))
    if "alternates" not in ids.columns:
        return ids.select("item_id", "codes", one.alias("weights"))
    soft = F.size("alternates") > 0  # false for null
    codes, weights = F.flatten("alternates.codes"), F.flatten("alternates.weights")
    return ids.select(
        "item_id",
        F.when(soft, codes).otherwise(F.col("codes")).alias("codes"),
        F.when(soft, weights).otherwise(one).alias("weights"),
    )


def user_rows(events: pa.RecordBatch, history: int) -> pa.RecordBatch:
    """Rows of `ctr_examples` from the events of some whole users, in order of user and ts.

    Behaviours are the clicks of the log; what was sampled is none. The last part of a user has also the behaviours
    after the last impression.
    """
    column = {
        name: events.column(name).to_numpy(zero_copy_only=False)
        for name in ("ts", "label", "logged", "example", "item_shown", "item_clicked")
    }
    user = numbers_of(events.column("user_id"))
    moment, first_of_user = starts_of(user, column["ts"]), starts_of(user)
    clicked = column["logged"] & (column["label"] == 1)

    def earlier(counted: npt.NDArray[np.bool_]) -> Int64:
        """Of each row the number of counted rows of its user before its moment."""
        before: Int64 = np.cumsum(counted) - counted
        number: Int64 = before[moment] - before[first_of_user]
        return number

    clicks, rows = earlier(clicked), earlier(column["logged"])
    item_shown, item_clicked = column["item_shown"], column["item_clicked"]
    features = np.stack(
        [np.log1p(clicks), (clicks + 1) / (rows + 4), np.log1p(item_shown), (item_clicked + 1) / (item_shown + 4)],
        axis=1,
    ).astype(np.float32)

    impression, behaviour = np.flatnonzero(column["example"]), np.flatnonzero(clicked)
    of_user = np.flatnonzero(np.diff(first_of_user, prepend=-1))  # the first row of each user
    next_user = np.append(of_user[1:], len(user))
    # The impressions [first, last) of each part; a user has one part at least.
    begin, end = np.searchsorted(impression, of_user), np.searchsorted(impression, next_user)
    limit = max(PART, history)
    parts = np.maximum(1, -(-(end - begin) // limit))
    owner, part = np.repeat(np.arange(len(parts)), parts), ranges(np.zeros_like(parts), parts)
    first = begin[owner] + part * limit
    last = np.minimum(first + limit, end[owner])
    # The behaviours [low, high) that they need: of the user's [begin, end) from the oldest history on.
    begin, end = np.searchsorted(behaviour, of_user)[owner], np.searchsorted(behaviour, next_user)[owner]
    known = np.append(clicks[impression], 0)  # one more, for a user without impressions
    low = begin + np.maximum(0, np.where(last > first, known[first], 0) - history)
    high = np.where(part < parts[owner] - 1, begin + known[last - 1], end)

    behaviours = _items(events, behaviour[ranges(low, high)])
    impressions = _items(events, impression) | {
        "label": pa.array(column["label"][impression].astype(np.int32)),
        "known": pa.array((known[:-1] - np.repeat(low - begin, last - first)).astype(np.int32)),
        "split": events.column("split").take(pa.array(impression)),
        "features": pa.ListArray.from_arrays(
            pa.array(np.arange(len(impression) + 1, dtype=np.int32) * len(FEATURES)), features[impression].ravel()
        ),
        "shown": events.column("shown").take(pa.array(impression)),
    }
    positions = (high - low) + (last - first)
    return pa.RecordBatch.from_pydict(
        {
            "user_id": events.column("user_id").take(pa.array(of_user[owner])),
            "part": part.astype(np.int32),
            "last": part == parts[owner] - 1,
            "length_bucket": np.log2(1 + positions).astype(np.int32),
            "behaviours": _lists(behaviours, BEHAVIOUR.names, high - low),
            "impressions": _lists(impressions, IMPRESSION.names, last - first),
        }
    )


def _items(events: pa.RecordBatch, rows: Int64) -> dict[str, pa.Array]:
    taken = events.select(["item_id", "ts", "codes", "weights"]).take(pa.array(rows))
    return {
        name: array.fill_null([]) if name in ("codes", "weights") else array
        for name, array in zip(taken.schema.names, taken, strict=True)
    }


def _lists(fields: dict[str, pa.Array], names: list[str], lengths: Int64) -> pa.ListArray:
    """Structs of the fields in lists of these lengths."""
    structs = pa.StructArray.from_arrays([fields[name] for name in names], names)
    return pa.ListArray.from_arrays(pa.array(np.append(0, np.cumsum(lengths)).astype(np.int32)), structs)
