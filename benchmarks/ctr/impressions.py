"""A log in memory as impressions with what was known strictly before each of them, and batches of these.

For measurements on logs of up to some millions of rows. The stage `train` reads logs of any size; see jobs/ctr.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from benchmarks.vectors import WrongVectors
from jobs.ctr.batch import Items, UserBatch
from jobs.ctr.sampling import Clicks, sample
from jobs.ctr.tokens import TokenScheme

Ints = npt.NDArray[np.int64]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
TEST_SHARE = 0.1  # of the impressions, the latest; validation is the same share before them
CLICK_RATING = 4.0
NEGATIVES = 4  # sampled for each click of a log without labels and ratings
DRAWS = 4  # clicks of the split drawn for each negative; of an item that the user has clicked none is used


@dataclass(frozen=True, eq=False)
class ItemTokens:
    """The tokens of every item: rows of one table of `table_rows` vectors, and their weights. Row 0 is padding.

    Attributes:
        rows: (items + 1, T) int64.
        weights: (items + 1, T) float32.
        fields: number of tokens of each field, which sum to T: the alternates of a level are a field, a prefix is one.
        pieces: the scheme of learned pieces, where the rows are as it numbers them.
    """

    rows: Tensor
    weights: Tensor
    table_rows: int
    fields: tuple[int, ...]
    pieces: TokenScheme | None = None

    @property
    def sums(self) -> tuple[Tensor, Tensor] | None:
        """See `TokenScheme.sums`."""
        return self.pieces.sums if self.pieces else None

    def level_rows(self) -> Sequence[slice | Tensor]:
        """The rows of the tokens of each level; the last field, which is the whole tuple of codes, is none."""
        if self.pieces:
            return self.pieces.level_rows
        fields = torch.split(self.rows, list(self.fields), dim=1)[:-1]
        return [rows[rows > 0] for rows in (torch.unique(field) for field in fields)]

    def of(self, item: Tensor) -> Items:
        """The items of these rows, of any shape."""
        return Items(item, self.rows[item], self.weights[item])


@dataclass(frozen=True, eq=False)
class Impressions:
    """Impressions in order of user and time. Items are rows 1 .. items of their table; users are 0 .. users - 1.

    The behaviours of user u are clicks in order of time, at `start[u] : start[u + 1]` of the flat arrays. An impression
    knows the first `known` of them, those that happened strictly before it.

    Attributes:
        item_ids: of the items, in order of their rows.
        behaviour_item, behaviour_time: (behaviours,).
        start: (users + 1,).
        user, item, label, time, known: (impressions,).
        split: (impressions,), 0 train, 1 validation, 2 test.
        shown: (impressions,), how often the item is shown in the training split.
    """

    item_ids: pd.Index
    behaviour_item: Ints
    behaviour_time: Ints
    start: Ints
    user: Ints
    item: Ints
    label: Ints
    time: Ints
    known: Ints
    split: Ints
    shown: Ints

    @property
    def items(self) -> int:
        return len(self.item_ids)

    @property
    def users(self) -> int:
        return len(self.start) - 1

    def of(self, split: Split) -> Ints:
        """Numbers of the impressions of a split."""
        return np.flatnonzero(self.split == SPLITS.index(split))


def read_log(folder: Path, seed: int = 0) -> Impressions:
    """The impressions of `interactions.parquet`, as the README describes it.

    Ratings of CLICK_RATING and more are clicks. A log without labels and ratings holds clicks only, and negatives are
    sampled, see `with_negatives`. With a timestamp the splits are the last tenths of all time, with an order those of
    each user.

    Raises:
        WrongVectors: no such file, or a column is missing.
    """
    file = folder / "interactions.parquet"
    if not file.exists():
        raise WrongVectors(f"{file} does not exist; expected a folder with embeddings.parquet and interactions.parquet")
    log = pd.read_parquet(file)
    missing = {"user_id", "item_id"} - set(log.columns)
    if missing or not {"timestamp", "order"} & set(log.columns):
        raise WrongVectors(
            f"{file} has columns {list(log.columns)}; expected user_id, item_id, timestamp or order, and label or "
            "rating if any"
        )
    clock = "timestamp" in log.columns
    log = pd.DataFrame(
        {
            "user": log["user_id"],
            "item": log["item_id"],
            "time": log["timestamp" if clock else "order"].astype(np.int64),
            "label": log["label"] if "label" in log else log["rating"] >= CLICK_RATING if "rating" in log else 1,
        }
    )
    user, _ = pd.factorize(log["user"], sort=True)
    item, item_ids = pd.factorize(log["item"], sort=True)
    log = log.assign(user=user, item=item + 1, label=log["label"].astype(np.int64))
    log = log.sort_values(["user", "time", "item"], kind="stable", ignore_index=True)
    log["split"] = _by_clock(log) if clock else _by_user(log)
    clicks = log[log["label"] == 1]
    if log["label"].all():
        log = with_negatives(log, seed)
    return impressions(log, clicks, pd.Index(item_ids))


def impressions(log: pd.DataFrame, clicks: pd.DataFrame, item_ids: pd.Index) -> Impressions:
    """Of rows (user, item, time, label, split) and of the clicks that happened, both in order of user and time."""
    users = int(log["user"].max()) + 1
    start = np.searchsorted(clicks["user"], np.arange(users + 1))
    step = max(int(log["time"].max()), int(clicks["time"].max())) + 1
    moments = clicks["user"].to_numpy() * step + clicks["time"].to_numpy()
    user, item, time = (log[name].to_numpy(np.int64) for name in ("user", "item", "time"))
    split = log["split"].to_numpy(np.int64)
    shown = np.bincount(item[split == 0], minlength=len(item_ids) + 1)[item]
    return Impressions(
        item_ids=item_ids,
        behaviour_item=clicks["item"].to_numpy(np.int64),
        behaviour_time=clicks["time"].to_numpy(np.int64),
        start=start,
        user=user,
        item=item,
        label=log["label"].to_numpy(np.int64),
        time=time,
        known=np.searchsorted(moments, user * step + time, side="left") - start[user],
        split=split,
        shown=shown,
    )


def _by_clock(log: pd.DataFrame) -> Ints:
    bounds = np.quantile(log["time"], [1 - 2 * TEST_SHARE, 1 - TEST_SHARE])
    return np.asarray(np.searchsorted(bounds, log["time"], side="right"), np.int64)


def _by_user(log: pd.DataFrame) -> Ints:
    """The last tenth of each user's rows, at least one, is test, and the same number before it validation."""
    group = log.groupby("user")["time"]
    from_end = group.transform("size") - log.groupby("user").cumcount()  # 1 for the last
    last = (group.transform("size") * TEST_SHARE).round().clip(lower=1)
    split = np.where(from_end <= last, 2, np.where(from_end <= 2 * last, 1, 0)).astype(np.int64)
    return np.asarray(split)


def with_negatives(log: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The first click of each user on an item, and for each NEGATIVES items not clicked by the end of its split.

    They are drawn as often as the log shows them in that split, so that how popular an item is says nothing about the
    click: what is left to learn is whom an item is for.
    """
    generator = np.random.default_rng(seed)
    log = log.drop_duplicates(["user", "item"]).sort_values(["user", "split", "time"], kind="stable", ignore_index=True)
    user, split, item = (log[name].to_numpy(np.int64) for name in ("user", "split", "item"))
    drawn = np.empty((len(log), NEGATIVES * DRAWS), np.int64)
    for own in (split == number for number in range(len(SPLITS))):
        drawn[own] = generator.choice(item[own], (int(own.sum()), drawn.shape[1]))
    total = int(item.max()) + 1
    clicks = Clicks(user, split, item, np.full(len(log), total))  # the moment is the split: by its end is not clicked
    keys = generator.integers(2**63, size=len(log)).astype(np.uint64)
    example, _, sampled = sample(clicks, total, NEGATIVES, keys, drawn)
    negatives = log.loc[np.repeat(np.flatnonzero(example), NEGATIVES)].assign(item=sampled[example].ravel(), label=0)
    return pd.concat([log[example], negatives]).sort_values(["user", "time", "item"], kind="stable", ignore_index=True)


# ---- batches ----


class Batches:
    """Re-iterable batches of some impressions; shuffled anew on each pass where there is a seed.

    Impressions of one user that follow each other stay together, `together` at a time, and batches hold users of like
    length: what a batch pads and reads is what its impressions need. Without behaviours impressions are mixed freely.
    """

    def __init__(
        self,
        log: Impressions,
        rows: Ints,
        tokens: ItemTokens,
        *,
        size: int,
        behaviours: bool = True,
        history: int = 10_000,
        together: int = 64,
        seed: int | None = None,
    ) -> None:
        self.log, self.rows, self.tokens, self.size, self.behaviours = log, rows, tokens, size, behaviours
        self.history = history
        self.generator = None if seed is None else np.random.default_rng(seed)
        user = log.user[rows]
        new = np.concatenate([[True], user[1:] != user[:-1]]) if len(rows) else np.empty(0, bool)
        position = np.arange(len(rows)) - np.maximum.accumulate(np.where(new, np.arange(len(rows)), 0))
        self.parts = np.split(rows, np.flatnonzero(new | (position % together == 0))[1:])
        self.length = np.array([log.known[part].max() for part in self.parts])

    def __iter__(self) -> Iterator[UserBatch]:
        for rows in self.groups():
            yield self.batch(rows)

    def groups(self) -> list[Ints]:
        """The numbers of the impressions of each batch of a pass."""
        if not self.behaviours:
            rows = self.rows if self.generator is None else self.generator.permutation(self.rows)
            return np.array_split(rows, max(1, round(len(rows) / self.size)))
        noise = 1.0 if self.generator is None else self.generator.uniform(0.8, 1.2, len(self.parts))
        order = np.argsort(self.length * noise + noise, kind="stable")
        sizes = np.cumsum([len(self.parts[number]) for number in order])
        groups = np.split(order, np.searchsorted(sizes, np.arange(self.size, sizes[-1], self.size)))
        batches = [np.concatenate([self.parts[number] for number in group]) for group in groups if len(group)]
        if self.generator is None:
            return batches
        return [batches[number] for number in self.generator.permutation(len(batches))]

    def batch(self, rows: Ints) -> UserBatch:
        log = self.log
        users, user = np.unique(log.user[rows], return_inverse=True)
        last = log.known[rows] if self.behaviours else np.zeros(len(rows), np.int64)
        first = np.maximum(last - self.history, 0)
        earliest, latest = np.full(len(users), np.iinfo(np.int64).max), np.zeros(len(users), np.int64)
        np.minimum.at(earliest, user, first)
        np.maximum.at(latest, user, last)
        length = latest - earliest
        position = np.arange(max(1, int(length.max(initial=0))))
        flat = np.where(position < length[:, None], (log.start[users] + earliest)[:, None] + position, -1)
        behaviours = np.where(flat >= 0, log.behaviour_item[flat], 0) if len(log.behaviour_item) else flat * 0
        time = np.where(flat >= 0, log.behaviour_time[flat], 0) if len(log.behaviour_item) else flat * 0
        return UserBatch(
            behaviours=self.tokens.of(torch.from_numpy(behaviours)),
            behaviour_time=torch.from_numpy(time),
            length=torch.from_numpy(length),
            candidates=self.tokens.of(torch.from_numpy(log.item[rows])),
            user=torch.from_numpy(user),
            first=torch.from_numpy(first - earliest[user]),
            last=torch.from_numpy(last - earliest[user]),
            time=torch.from_numpy(log.time[rows]),
            features=torch.zeros(len(rows), 0),
            label=torch.from_numpy(log.label[rows]).float(),
            shown=torch.from_numpy(log.shown[rows]),
            user_number=torch.from_numpy(log.user[rows]),
        )
