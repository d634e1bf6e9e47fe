"""Sampled negatives against a slow loop over the candidates of each click."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.ctr.sampling import Clicks, sample

ITEMS = 6
# (user, moment, item) of clicks. Item n first occurs at moment n where there is a clock, so no click on it is earlier.
CLICKS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 8), st.integers(0, ITEMS - 1)), min_size=1, max_size=30)


def arrays(clicks: list[tuple[int, int, int]], clock: bool) -> Clicks:
    clicks = sorted((user, max(moment, item) if clock else moment, item) for user, moment, item in clicks)
    user, ts, item = (np.array(column, np.int64) for column in zip(*clicks, strict=True))
    return Clicks(user, ts, item, np.minimum(ts, ITEMS) if clock else np.full(len(ts), ITEMS))


def keys(clicks: Clicks, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(2**63, size=len(clicks.user)).astype(np.uint64)


def candidates(clicks: Clicks, row: int) -> set[int]:
    """Items not chosen at the moment of a click and of the kind of its item, one after the other."""
    user, ts = clicks.user[row], clicks.ts[row]
    own = [(t, item) for u, t, item in zip(clicks.user, clicks.ts, clicks.rank, strict=True) if u == user]

    def kind(item: int) -> str:
        if any(t < ts and i == item for t, i in own):
            return "chosen before"
        return "seen" if item < clicks.known[row] else "new"

    now = {item for t, item in own if t == ts}
    return {item for item in range(ITEMS) if item not in now and kind(item) == kind(clicks.rank[row])}


@settings(max_examples=300, deadline=None)
@given(clicks=CLICKS, clock=st.booleans())
def test_negatives_are_candidates_and_a_click_without_any_is_no_example(
    clicks: list[tuple[int, int, int]], clock: bool
) -> None:
    rows = arrays(clicks, clock)
    example, _, sampled = sample(rows, ITEMS, 3, keys(rows))
    for row in range(len(example)):
        allowed = candidates(rows, row)
        assert example[row] == bool(allowed)
        assert not example[row] or set(sampled[row]) <= allowed


@settings(max_examples=200, deadline=None)
@given(clicks=CLICKS, seed=st.integers(0, 100))
def test_negatives_by_popularity_are_those_drawn_that_are_candidates(
    clicks: list[tuple[int, int, int]], seed: int
) -> None:
    rows = arrays(clicks, clock=True)
    drawn = np.random.default_rng(seed).integers(0, np.maximum(1, rows.known)[:, None], size=(len(rows.user), 8))
    drawn[rows.known == 0] = -1
    example, repeat, sampled = sample(rows, ITEMS, 3, keys(rows), drawn)
    for row in range(len(example)):
        allowed = candidates(rows, row)
        chosen_before = any(
            (u, i) == (rows.user[row], rows.rank[row]) and t < rows.ts[row]
            for u, t, i in zip(rows.user, rows.ts, rows.rank, strict=True)
        )
        assert repeat[row] == chosen_before
        if not chosen_before:
            own = {
                i
                for u, t, i in zip(rows.user, rows.ts, rows.rank, strict=True)
                if u == rows.user[row] and t <= rows.ts[row]
            }
            usable = [item for item in drawn[row] if item >= 0 and item not in own]
            assert example[row] == (len(usable) >= 3)
            assert not example[row] or sampled[row].tolist() == usable[:3]
        else:
            assert example[row] == bool(allowed)
            assert not example[row] or set(sampled[row]) <= allowed


def test_every_candidate_is_drawn_about_as_often() -> None:
    rank = np.array([0, 7, 19, 3])
    clicks = Clicks(np.zeros(4, np.int64), np.array([1, 1, 2, 3]), rank, np.full(4, 20))
    *_, sampled = sample(clicks, 20, 6000, keys(clicks))
    counts = np.bincount(sampled[3], minlength=20)
    assert set(np.flatnonzero(counts)) == set(range(20)) - {0, 3, 7, 19}
    counts = counts[counts > 0]
    assert counts.min() > 375 - 5 * np.sqrt(375)
    assert counts.max() < 375 + 5 * np.sqrt(375)


def test_a_user_who_chose_almost_everything_still_gets_exact_negatives() -> None:
    """Under a twentieth of the range is left: candidates are listed, not drawn until one is allowed."""
    items = np.random.default_rng(0).permutation(1000)[:998]
    clicks = Clicks(np.zeros(998, np.int64), np.arange(998), items, np.full(998, 1000))
    example, _, sampled = sample(clicks, 1000, 50, keys(clicks))
    assert example.all()
    assert set(sampled[-1]) == set(range(1000)) - set(items)
    for row in range(900, 998):
        assert not set(sampled[row]) & set(items[: row + 1])


def test_users_are_sampled_alike_whoever_is_in_the_same_batch() -> None:
    rows = arrays([(user, t, (t + user) % ITEMS) for user in range(3) for t in range(8)], clock=True)
    key = keys(rows)
    *_, together = sample(rows, ITEMS, 4, key)
    for user in range(3):
        own = rows.user == user
        alone = Clicks(*(column[own] for column in rows))
        np.testing.assert_array_equal(sample(alone, ITEMS, 4, key[own])[2], together[own])
