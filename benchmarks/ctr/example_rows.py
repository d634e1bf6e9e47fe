"""Rows of `ctr_examples` of generated logs, made by the job's own `user_rows`, without Spark."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from jobs.config import Config
from jobs.ctr.dmqn import DMQNShape
from jobs.ctr.examples import FEATURES, user_rows
from jobs.ctr.tokens import TokenScheme
from jobs.ctr.user_table import ModelInputs
from jobs.ctr.users import Int64
from tokenizer.alternates import FULL_WEIGHT

ITEMS = 100_000
LEVELS, COMPONENTS, ALTERNATES = 2, 128, 8


def rows_of(
    user: Int64, ts: Int64, label: Int64, example: npt.NDArray[np.bool_], split: pa.Array, history: int, seed: int
) -> pa.RecordBatch:
    """Rows of `ctr_examples` of interactions in order of user and ts, each with a random item with a soft ID.

    Args:
        user: Numbers of users.
        label: 1 is a click, and a behaviour.
        example: Which interactions are impressions to learn from.
        split: "train", "validation" or "test".
        history: Latest behaviours that an impression needs.
    """
    random = np.random.default_rng(seed)
    item = (ITEMS * random.random(len(user)) ** 2).astype(np.int64)  # some are far more popular than others
    names, codes, weights = catalogue()
    events = pa.RecordBatch.from_pydict(
        {
            "user_id": pa.array(np.char.add("user-", user.astype(str))),
            "item_id": names.take(pa.array(item)),
            "label": label.astype(np.int32),
            "ts": ts,
            "logged": np.ones(len(user), bool),
            "example": example,
            "split": split,
            "item_shown": ITEMS - item,
            "item_clicked": (ITEMS - item) // 3,
            "shown": (ITEMS - item).astype(np.int32),
            "codes": lists(codes[item]),
            "weights": lists(weights[item]),
        }
    )
    return user_rows(events, history)


@cache
def catalogue() -> tuple[pa.Array, npt.NDArray[np.int32], npt.NDArray[np.int16]]:
    """Of each item the id, the codes (LEVELS x ALTERNATES) and their weights."""
    random = np.random.default_rng(0)
    codes = random.integers(COMPONENTS, size=(ITEMS, LEVELS * ALTERNATES), dtype=np.int32)
    likely = 0.5 ** np.arange(1, 1 + ALTERNATES)
    weights = random.multinomial(FULL_WEIGHT, likely / likely.sum(), size=(ITEMS, LEVELS)).reshape(ITEMS, -1)
    return pa.array([f"item-{number}" for number in range(ITEMS)]), codes, weights.astype(np.int16)


def lists(values: npt.NDArray[np.int32] | npt.NDArray[np.int16]) -> pa.ListArray:
    """(rows, length) -> a list a row"""
    rows, length = values.shape
    return pa.ListArray.from_arrays(pa.array(np.arange(rows + 1, dtype=np.int32) * length), values.ravel())


def default_model(history: int) -> tuple[ModelInputs, DMQNShape]:
    """Of a model with the default settings that reads these rows, but for `train.history`."""
    train = Config().train
    scheme = TokenScheme(train.tokens, LEVELS, COMPONENTS, ALTERNATES, train.token_rows)
    shape = DMQNShape(len(FEATURES), train.width, train.interest_codebooks, train.codewords)
    return ModelInputs(scheme, train.item_rows, history), shape
