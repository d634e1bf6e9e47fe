"""Examples without leaks: against slow loops, and on clicks that are independent of everything, where nothing that an
example shows may tell its label."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score

from jobs.config import TrainConfig
from jobs.ctr.examples import ALWAYS, FEATURES, Catalogue, build_examples, user_examples, with_negatives
from jobs.ctr.log import examine, read_rows
from jobs.files.sources import open_source

EVENTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4), st.integers(0, 1)), min_size=1, max_size=14)


def user_of(events: list[tuple[int, int, int]]) -> pd.DataFrame:
    return pd.DataFrame(
        {"user_id": "u", "item_id": [f"i{i}" for _, i, _ in events], "label": [y for *_, y in events], "ts": [t for t, *_ in events], "logged": True, "example": True, "item_shown": 0, "item_clicked": 0}
    )  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(events=EVENTS, keep=st.integers(1, 5))
def test_history_is_what_was_clicked_strictly_before(events: list[tuple[int, int, int]], keep: int) -> None:
    found = user_examples(user_of(events), keep, 3.0, 5.0)
    assert len(found) == len(events)
    for row in found.itertuples():
        before = sorted((t, f"i{i}") for t, i, y in events if y == 1 and t < row.ts)
        assert sorted(row.history) == sorted(item for _, item in before[-keep:])
        shown = sum(t < row.ts for t, *_ in events)
        np.testing.assert_allclose(
            row.features[:2], [np.log1p(len(before)), (len(before) + 1) / (shown + 4)], rtol=1e-5
        )
        assert row.split == ("test" if row.ts >= 5 else "validation" if row.ts >= 3 else "train")


@settings(max_examples=40, deadline=None)
@given(events=EVENTS)
def test_the_future_changes_nothing_before_it(events: list[tuple[int, int, int]]) -> None:
    whole = user_examples(user_of(events), 5, 3.0, 5.0)
    past = [event for event in events if event[0] < 4]
    if past:
        early = user_examples(user_of(past), 5, 3.0, 5.0)
        assert early["history"].tolist() == whole[whole["ts"] < 4]["history"].tolist()


def test_each_user_without_a_clock_gives_his_last_moments_to_the_test() -> None:
    found = user_examples(user_of([(t, t % 5, 1) for t in range(20)]), 5, None, None)
    assert found["split"].tolist() == ["train"] * 16 + ["validation"] * 2 + ["test"] * 2


def test_sampled_rows_are_no_behaviour() -> None:
    user = user_of([(0, 0, 1), (0, 1, 0), (1, 2, 1), (1, 3, 0), (2, 4, 1)])
    user["logged"] = user["label"] == 1
    found = user_examples(user, 5, 3.0, 5.0)
    rate = np.array([row[1] for row in found["features"]])
    np.testing.assert_allclose(rate, [1 / 4, 1 / 4, 2 / 5, 2 / 5, 3 / 6])


# ---- sampled negatives ----

CATALOGUE = Catalogue(pd.Index([f"i{n}" for n in range(5)]), np.array([0, 1, 2, 3, 4]))
CLICKS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(clicks=CLICKS, clock=st.booleans())
def test_negatives_are_as_new_to_user_and_log_as_their_click(clicks: list[tuple[int, int]], clock: bool) -> None:
    clicks = [(max(t, i), i) for t, i in clicks] if clock else clicks  # no item is chosen before it first occurs
    first = {f"i{n}": n if clock else ALWAYS for n in range(5)}
    catalogue = CATALOGUE if clock else Catalogue(CATALOGUE.items, np.full(5, ALWAYS))
    sampled = with_negatives(user_of([(t, i, 1) for t, i in clicks]), catalogue, 3, seed=0)
    logged, negatives = sampled[sampled["logged"]], sampled[~sampled["logged"]]
    assert sorted(zip(logged["ts"], logged["item_id"], strict=True)) == sorted((t, f"i{i}") for t, i in clicks)

    def kind(item: str, ts: int) -> str:
        if any(t < ts and f"i{i}" == item for t, i in clicks):
            return "chosen before"
        return "seen" if first[item] < ts else "new"

    for ts, rows in logged.groupby("ts"):
        now = set(rows["item_id"])
        candidates = {item: kind(item, ts) for item in first if item not in now}
        kinds = [kind(item, ts) for item in rows["item_id"]]
        assert rows["example"].tolist() == [kind_ in candidates.values() for kind_ in kinds]
        drawn = negatives[negatives["ts"] == ts]["item_id"]
        assert set(drawn) <= set(candidates)
        expected = sorted(3 * [kind_ for kind_ in kinds if kind_ in candidates.values()])
        assert sorted(candidates[item] for item in drawn) == expected


def test_every_candidate_is_drawn_about_as_often() -> None:
    catalogue = Catalogue(pd.Index([f"i{n:02d}" for n in range(20)]), np.zeros(20, np.int64))
    user = pd.DataFrame({"user_id": "u", "item_id": ["i00", "i07", "i19", "i03"], "label": 1, "ts": [1, 1, 2, 3]})
    sampled = with_negatives(user, catalogue, 6000, seed=0)
    counts = sampled[~sampled["logged"] & (sampled["ts"] == 3)]["item_id"].value_counts()
    assert set(counts.index) == {f"i{n:02d}" for n in range(20)} - {"i00", "i07", "i19", "i03"}
    assert counts.min() > 375 - 5 * np.sqrt(375)
    assert counts.max() < 375 + 5 * np.sqrt(375)


def test_the_same_negatives_whatever_the_order_of_the_rows() -> None:
    user = user_of([(t, t % 5, 1) for t in range(5, 12)])
    once, again = (with_negatives(u, CATALOGUE, 3, seed=0) for u in (user, user.sample(frac=1, random_state=1)))
    pd.testing.assert_frame_equal(once, again)


# ---- clicks that are independent of everything ----


def noise(seed: int, *, growing: bool, repeats: bool) -> pd.DataFrame:
    """18,000 interactions of 200 users with 400 items, uniform over the items there are at the moment."""
    g = np.random.default_rng(seed)
    n, users, items = 18_000, 200, 400
    ts = np.sort(g.integers(0, 40_000, size=n))
    user = g.integers(users, size=n)
    available = np.maximum(40, items * (ts / 40_000) ** 3) if growing else np.full(n, items)
    item = (g.random(n) * available).astype(int)
    frame = pd.DataFrame({"user_id": user, "item_id": item, "timestamp": ts})
    return frame if repeats else frame.drop_duplicates(["user_id", "item_id"])


def examples_of(frame: pd.DataFrame, path: Path, spark: SparkSession, **train: int) -> pd.DataFrame:
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), path / "log.parquet")
    config = TrainConfig(interactions=str(path / "log.parquet"), **train)
    log = examine(open_source(config.interactions), config, spark)
    return build_examples(read_rows(log, spark), log, config).toPandas()


def shown_by(examples: pd.DataFrame) -> pd.DataFrame:
    """What a model can see of an example: its features, and how its item occurs in the history."""
    frame = pd.DataFrame(np.stack(examples["features"].to_list()), columns=list(FEATURES))
    pairs = list(zip(examples["item_id"], examples["history"], strict=True))
    frame["item in the history"] = [list(history).count(item) for item, history in pairs]
    frame["position in the history"] = [[*list(history)[::-1], item].index(item) for item, history in pairs]
    return frame


def with_order(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(order=frame.groupby("user_id").cumcount()).drop(columns="timestamp")


def with_labels(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(label=np.random.default_rng(7).random(len(frame)) < 0.3)


def with_ratings(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(rating=np.random.default_rng(8).integers(1, 6, size=len(frame)).astype(float))


def by_days(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(timestamp=pd.to_datetime(frame["timestamp"] // 500, unit="D"))


KINDS: dict[str, tuple[bool, bool, list[Callable[[pd.DataFrame], pd.DataFrame]]]] = {
    "clicks, clock": (False, True, []),
    "clicks, clock, items appear": (True, False, []),
    "clicks, days": (False, True, [by_days]),
    "clicks, order": (False, False, [with_order]),
    "labels, clock": (False, True, [with_labels]),
    "labels, order": (False, True, [with_labels, with_order]),
    "ratings, clock": (True, True, [with_ratings]),
    "ratings, order": (False, False, [with_ratings, with_order]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_an_example_shows_tells_a_random_click(kind: str, spark: SparkSession, tmp_path: Path) -> None:
    growing, repeats, changes = KINDS[kind]
    frame = noise(0, growing=growing, repeats=repeats)
    for change in changes:
        frame = change(frame)
    examples = examples_of(frame, tmp_path, spark, negatives=2, history=50)
    seen, label = shown_by(examples), examples["label"].to_numpy()
    test = (examples["split"] == "test").to_numpy()
    clicks, others = label[test].sum(), (1 - label[test]).sum()
    assert min(clicks, others) > 500
    error = np.sqrt((clicks + others + 1) / (12 * clicks * others))  # of the AUC of independent labels
    model = HistGradientBoostingClassifier(max_iter=40, max_depth=4, random_state=0).fit(seen[~test], label[~test])
    scores = {name: seen[name][test] for name in seen} | {"the model": model.predict_proba(seen[test])[:, 1]}
    away = {name: (roc_auc_score(label[test], score) - 0.5) / error for name, score in scores.items()}
    assert max(map(abs, away.values())) < 4, away
