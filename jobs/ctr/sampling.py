"""Negatives of clicks, sampled from the candidates of each click: NumPy on the clicks of whole users.

Which items are candidates, and why: negatives.py. Items are numbered by `rank`, in the order in which the log first
shows them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jobs.ctr.users import Int64, starts_of

# Share of a range that is allowed, below which its numbers are listed instead of drawn until one is allowed.
SPARSE = 0.05

Bools = npt.NDArray[np.bool_]
Keys = npt.NDArray[np.uint64]


class Clicks(NamedTuple):
    """Clicks of whole users in order of `user` and `ts`, (n,) each.

    Attributes:
        user: Number of the user.
        ts: Moment.
        rank: Of the item.
        known: Items that the log has shown before the moment, which are the ranks below this number.
    """

    user: Int64
    ts: Int64
    rank: Int64
    known: Int64


def sample(
    clicks: Clicks, total: int, negatives: int, keys: Keys, drawn: Int64 | None = None
) -> tuple[Bools, Bools, Int64]:
    """Sample `negatives` ranks for each click that has a candidate.

    Args:
        total: Number of items.
        keys: (n,) what the random numbers of a click are made of.
        drawn: (n, draws) ranks drawn by popularity before the moment of the click, -1 for none; uniform without it.

    Returns:
        Which clicks are examples (n,), which are on items that the user chose before (n,), and ranks (n, negatives), of
        which those of examples count.
    """
    candidates = Candidates(clicks, total)
    example = candidates.count > 0
    sampled = np.full((len(example), negatives), -1, np.int64)
    uniform = example
    if drawn is not None:
        enough, popular = first_allowed(candidates, drawn, negatives)
        sampled = np.where(candidates.repeat[:, None], sampled, popular)
        example = np.where(candidates.repeat, example, enough)
        uniform = example & candidates.repeat
    few = uniform & (candidates.count < SPARSE * (candidates.high - candidates.low))
    listed, rejected = np.flatnonzero(few), np.flatnonzero(uniform & ~few)
    sampled[listed] = choose_listed(candidates, listed, negatives, keys)
    sampled[rejected] = draw_until_allowed(candidates, rejected, negatives, keys)
    return example, candidates.repeat, sampled


class Candidates:
    """The candidates of each click, as numbers of a range [low, high) of which some are not `allowed`.

    A click on an item that its user chose before (`repeat`): the numbers count the items that the user chose before the
    moment; those that the user chooses at the moment are not allowed. Any other click: the numbers are ranks, of the
    items that the log has shown (below `known`) if the clicked item is one of them, else of the others; what the user
    has chosen by the moment is not allowed.

    For example, the log has shown the items 0 to 9 (`known` = 10) and the user has chosen 2 and 5 before. A click on 7:
    range [0, 10), without 2, 5 and 7. A click on 5: range [0, 2), which stands for 2 and 5, without 5. A click on 12 of
    20 items: range [10, 20), without 12.

    Attributes:
        repeat, low, high: (n,)
        count: (n,) candidates of each click.
    """

    def __init__(self, clicks: Clicks, total: int) -> None:
        user, ts, rank, known = clicks
        self.clicks, self.total = clicks, total
        self.moment = starts_of(user, ts)  # (n,) the first row of the same user and ts
        self.pairs, first, pair = np.unique(user * total + rank, return_index=True, return_inverse=True)
        self.chosen_at = ts[first]  # (pairs,); rows are in order of time
        self.repeat = self.chosen_at[pair] < ts
        self.moment_items, first_at_moment = np.unique(self.moment * total + rank, return_index=True)

        new, once = is_one_of(first, len(ts)), is_one_of(first_at_moment, len(ts))  # without equal items of a moment
        self.choices = np.flatnonzero(new)  # rows; the choices of a user stand together, in order of time
        before: Int64 = np.cumsum(new) - new  # choices before each row, of all users
        self.first_choice = before[starts_of(user)]  # of the user, in `choices`
        chosen = before[self.moment] - self.first_choice  # items that the user chose before the moment

        old = ~self.repeat & (rank < known)
        self.low = np.where(self.repeat | old, 0, known)
        self.high = np.select([self.repeat, old], [chosen, known], total)
        excluded = [self.in_moment(once & self.repeat), chosen + self.in_moment(new & (rank < known))]
        self.count = (
            self.high - self.low - np.select([self.repeat, old], excluded, self.in_moment(new & (rank >= known)))
        )

    def in_moment(self, counted: Bools) -> Int64:
        """(n,): how many rows of the same user and ts are `counted`."""
        return np.bincount(self.moment, counted, len(counted)).astype(np.int64)[self.moment]

    def item(self, click: Int64, number: Int64) -> Int64:
        """Ranks of the items that numbers of [low, high) of clicks stand for."""
        repeat = self.repeat[click]
        rank = number.copy()
        rank[repeat] = self.clicks.rank[self.choices[self.first_choice[click[repeat]] + number[repeat]]]
        return rank

    def allowed(self, click: Int64, rank: Int64) -> Bools:
        """Whether the user has not chosen an item by the moment of a click; of a repeat, whether he does not at it."""
        chosen = position_in(self.pairs, self.clicks.user[click] * self.total + rank)
        by_moment = (chosen >= 0) & (self.chosen_at[chosen] <= self.clicks.ts[click])
        at_moment = position_in(self.moment_items, self.moment[click] * self.total + rank) >= 0
        return ~np.where(self.repeat[click], at_moment, by_moment)


# ---- three ways to choose among the candidates ----


def first_allowed(candidates: Candidates, drawn: Int64, negatives: int) -> tuple[Bools, Int64]:
    """For which clicks enough of the ranks `drawn` (n, draws) are allowed, and the first `negatives` of these."""
    click = np.repeat(np.arange(len(drawn)), drawn.shape[1])
    usable = (drawn >= 0) & candidates.allowed(click, drawn.ravel()).reshape(drawn.shape)
    order = np.argsort(~usable, axis=1, kind="stable")[:, :negatives]
    return usable.sum(1) >= negatives, np.take_along_axis(drawn, order, axis=1)


def choose_listed(candidates: Candidates, clicks: Int64, negatives: int, keys: Keys) -> Int64:
    """(len(clicks), negatives): each click's candidates are listed, and one is chosen at random for each negative."""
    chosen = np.empty((len(clicks), negatives), np.int64)
    for row, click in enumerate(clicks):
        numbers = np.arange(candidates.low[click], candidates.high[click])
        same = np.full(len(numbers), click)
        ranks = candidates.item(same, numbers)
        ranks = ranks[candidates.allowed(same, ranks)]
        chosen[row] = ranks[random_numbers(np.repeat(keys[click], negatives), np.arange(negatives), 0) % len(ranks)]
    return chosen


def draw_until_allowed(candidates: Candidates, clicks: Int64, negatives: int, keys: Keys) -> Int64:
    """(len(clicks), negatives): numbers of [low, high) are drawn until each is a candidate."""
    click, column = np.repeat(clicks, negatives), np.tile(np.arange(negatives), len(clicks))
    chosen = np.empty(len(click), np.int64)
    missing = np.arange(len(click))
    attempt = 0
    while len(missing):
        own = click[missing]
        low, high = candidates.low[own], candidates.high[own]
        rank = candidates.item(own, low + random_numbers(keys[own], column[missing], attempt) % (high - low))
        allowed = candidates.allowed(own, rank)
        chosen[missing[allowed]] = rank[allowed]
        missing, attempt = missing[~allowed], attempt + 1
    return chosen.reshape(len(clicks), negatives)


# ---- arrays and random numbers ----


def is_one_of(rows: Int64, count: int) -> Bools:
    """(count,): whether each row is one of `rows`."""
    mask = np.zeros(count, bool)
    mask[rows] = True
    return mask


def position_in(values: Int64, wanted: Int64) -> Int64:
    """Positions of `wanted` in `values`, which are sorted; -1 for those that are not among them."""
    position = np.minimum(np.searchsorted(values, wanted), len(values) - 1)
    return np.where(values[position] == wanted, position, -1)


def random_numbers(key: Keys, column: Int64, attempt: int) -> Int64:
    """A number in [0, 2**62) of each key, column and attempt, the same on every run."""
    counter = (column.astype(np.uint64) << np.uint64(32)) + np.uint64(attempt)
    numbers: Int64 = (mixed(key + mixed(counter)) >> np.uint64(2)).astype(np.int64)
    return numbers


def mixed(x: Keys) -> Keys:
    """The finalizer of SplitMix64: of numbers that differ in one bit about half the bits differ."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
