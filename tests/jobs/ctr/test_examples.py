"""Examples without leaks: against a slow loop, and on clicks that are independent of everything, where nothing that an
example shows may tell its label."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ctr_data import Event, codes_of, events_batch, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score

from jobs.config import TrainConfig
from jobs.ctr import examples as module
from jobs.ctr.examples import FEATURES, build_examples, item_codes, user_rows
from jobs.ctr.log import examine, read_rows
from jobs.ctr.splits import EXACT_TO, split_moments, with_split
from jobs.files.sources import open_source

EVENTS = st.lists(
    st.builds(
        Event,
        user=st.integers(0, 2),
        ts=st.integers(0, 9),
        item=st.integers(0, 12),
        label=st.integers(0, 1),
        logged=st.booleans(),
        example=st.booleans(),
    ).map(lambda event: event if event.logged else event._replace(label=0, example=True)),
    min_size=1,
    max_size=25,
)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART", 4)


@settings(max_examples=200, deadline=None)
@given(events=EVENTS, history=st.integers(1, 6))
def test_impressions_are_what_a_loop_over_the_events_gives(events: list[Event], history: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PART", 4)
        rows = user_rows(events_batch(events), history).to_pylist()
    seen = []
    for row in rows:
        assert row["length_bucket"] == int(np.log2(1 + len(row["behaviours"]) + len(row["impressions"])))
        for one in row["impressions"]:
            user, item = int(row["user_id"][1:]), int(one["item_id"][1:])
            before = sorted(event for event in events if event.user == user and event.ts < one["ts"] and event.logged)
            clicks = [event for event in before if event.label]
            found = row["behaviours"][max(0, one["known"] - history) : one["known"]]
            assert sorted((b["ts"], b["item_id"]) for b in found) == sorted(
                (event.ts, f"i{event.item}") for event in clicks[len(clicks) - len(found) :]
            )
            assert len(found) == min(history, len(clicks))
            expected = [
                np.log1p(len(clicks)),
                (len(clicks) + 1) / (len(before) + 4),
                np.log1p(item),
                (item // 2 + 1) / (item + 4),
            ]
            np.testing.assert_allclose(one["features"], expected, rtol=1e-6)
            assert (one["codes"], one["weights"], one["shown"]) == (codes_of(item), weights_of(item), item + 1)
            assert one["split"] == Event(user, one["ts"], item, 0).split
            seen.append((user, one["ts"], item, one["label"]))
    assert sorted(seen) == sorted(event[:4] for event in events if event.example)
    for user in {event.user for event in events}:
        parts = [row for row in rows if row["user_id"] == f"u{user}"]
        assert [row["part"] for row in parts] == list(range(len(parts)))
        assert all(1 <= len(row["impressions"]) <= max(4, history) for row in parts[1:])
        last = max((event.ts for event in events if event.user == user and event.logged and event.label), default=None)
        assert last == (parts[-1]["behaviours"][-1]["ts"] if parts[-1]["behaviours"] else None)


@settings(max_examples=60, deadline=None)
@given(events=EVENTS, moment=st.integers(1, 9))
def test_the_future_changes_nothing_before_it(events: list[Event], moment: int) -> None:
    past = [event for event in events if event.ts < moment]
    if past:
        whole, early = (
            {
                (row["user_id"], one["ts"], one["item_id"], one["label"], one["known"], tuple(one["features"]))
                for row in user_rows(events_batch(chosen), 5).to_pylist()
                for one in row["impressions"]
                if one["ts"] < moment
            }
            for chosen in (events, past)
        )
        assert whole == early


# ---- splits ----


def moments_frame(ts: np.ndarray, spark: SparkSession) -> DataFrame:
    return spark.createDataFrame(pa.table({"ts": pa.array(ts, pa.int64()), "user_id": ["u"] * len(ts)}))


def test_split_moments_leave_the_last_two_tenths(spark: SparkSession) -> None:
    ts = 1_750_000_000_000_000 + (np.random.default_rng(0).exponential(size=5000) * 1e12).astype(np.int64)
    validation, test = split_moments(moments_frame(ts, spark))
    assert abs(np.mean(ts < validation) - 0.8) <= EXACT_TO
    assert abs(np.mean(ts < test) - 0.9) <= EXACT_TO


def test_where_the_last_tenths_fall_on_one_moment_the_last_two_are_taken(spark: SparkSession) -> None:
    assert split_moments(moments_frame(np.repeat([5, 7, 9], [10, 10, 80]), spark)) == (7, 9)


def test_each_user_without_a_clock_gives_their_last_moments_to_the_test(spark: SparkSession) -> None:
    rows = moments_frame(np.repeat(np.arange(20), 2), spark).union(
        spark.createDataFrame([(3, "short")], "ts BIGINT, user_id STRING")
    )
    found = with_split(rows, None).orderBy("user_id", "ts").toPandas()
    assert found["split"].tolist() == ["test"] + ["train"] * 32 + ["validation"] * 4 + ["test"] * 4


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


def popular(frame: pd.DataFrame) -> pd.DataFrame:
    """Of 4,000 items some are clicked far more often than others, by everybody alike."""
    rank = (4000 * np.random.default_rng(5).random(len(frame)) ** 1.5).astype(int)
    return frame.assign(item_id=rank).drop_duplicates(["user_id", "item_id"])


def examples_of(frame: pd.DataFrame, path: Path, spark: SparkSession, **train: object) -> pd.DataFrame:
    """Every impression with the items of its history."""
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), path / "log.parquet")
    config = TrainConfig(interactions=str(path / "log.parquet"), **train)
    log = examine(open_source(config.interactions), config, spark)
    items = frame["item_id"].drop_duplicates().astype(str).tolist()
    ids = spark.createDataFrame(
        [(item, [int(item) % 8, int(item) // 8]) for item in items if int(item) % 3], "item_id STRING, codes ARRAY<INT>"
    )
    built = build_examples(read_rows(log, spark), item_codes(ids), log, config)
    found = built.select("user_id", "behaviours.item_id", F.explode("impressions").alias("one"))
    table = found.select("user_id", F.col("item_id").alias("behaviours"), "one.*").toPandas()
    table["history"] = [
        list(items[max(0, known - config.history) : known])
        for items, known in zip(table["behaviours"], table["known"], strict=True)
    ]
    return table


def shown_by(examples: pd.DataFrame) -> pd.DataFrame:
    """What a model can see of an example: its features, and how its item occurs in the history."""
    frame = pd.DataFrame(np.stack(examples["features"].to_list()), columns=list(FEATURES))
    pairs = list(zip(examples["item_id"], examples["history"], strict=True))
    frame["item in the history"] = [history.count(item) for item, history in pairs]
    frame["position in the history"] = [[*history[::-1], item].index(item) for item, history in pairs]
    frame["length of the history"] = examples["history"].map(len).to_numpy()
    return frame


def away_from_chance(examples: pd.DataFrame) -> dict[str, float]:
    """How far the AUC of what an example shows is from 0.5 on the test split, in standard errors of independent labels;
    the AUC of each column by itself and of a model trained on all of them.
    """
    seen, label = shown_by(examples), examples["label"].to_numpy()
    test = (examples["split"] == "test").to_numpy()
    clicks, others = label[test].sum(), (1 - label[test]).sum()
    assert min(clicks, others) > 500
    error = np.sqrt((clicks + others + 1) / (12 * clicks * others))
    model = HistGradientBoostingClassifier(max_iter=40, max_depth=4, random_state=0).fit(seen[~test], label[~test])
    scores = {name: seen[name][test] for name in seen} | {"the model": model.predict_proba(seen[test])[:, 1]}
    return {name: (roc_auc_score(label[test], score) - 0.5) / error for name, score in scores.items()}


def with_order(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(order=frame.groupby("user_id").cumcount()).drop(columns="timestamp")


def with_labels(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(label=np.random.default_rng(7).random(len(frame)) < 0.3)


def with_ratings(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(rating=np.random.default_rng(8).integers(1, 6, size=len(frame)).astype(float))


def by_days(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(timestamp=pd.to_datetime(frame["timestamp"] // 500, unit="D"))


Changes = list[Callable[[pd.DataFrame], pd.DataFrame]]
KINDS: dict[str, tuple[bool, bool, str, Changes]] = {
    "clicks, clock": (False, True, "uniform", []),
    "clicks, clock, items appear": (True, False, "uniform", []),
    "clicks, clock, popularity": (False, True, "popularity", [popular]),
    "clicks, days": (False, True, "uniform", [by_days]),
    "clicks, order": (False, False, "uniform", [with_order]),
    "labels, clock": (False, True, "uniform", [with_labels]),
    "ratings, order": (False, False, "uniform", [with_ratings, with_order]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_an_example_shows_tells_a_random_click(kind: str, spark: SparkSession, tmp_path: Path) -> None:
    growing, repeats, sampling, changes = KINDS[kind]
    frame = noise(0, growing=growing, repeats=repeats)
    for change in changes:
        frame = change(frame)
    examples = examples_of(frame, tmp_path, spark, negatives=2, history=50, negative_sampling=sampling)
    away = away_from_chance(examples)
    assert max(map(abs, away.values())) < 4, away
    known = examples["codes"].map(len) > 0
    assert set(known[examples["item_id"].astype(int) % 3 == 0]) == {False}
    assert set(known[examples["item_id"].astype(int) % 3 != 0]) == {True}
    if "label" in frame or "rating" in frame:
        assert len(examples) == len(frame)
        times = examples.loc[examples["split"] == "train", "item_id"].value_counts()
        assert (examples["shown"] == examples["item_id"].map(times).fillna(0)).all()
    else:
        assert (examples.groupby(["user_id", "ts"])["label"].mean() == 1 / 3).all()


@pytest.mark.parametrize("leak", ["counts that include the impression", "sampled rows have no features"])
def test_a_planted_leak_is_caught(leak: str, spark: SparkSession, tmp_path: Path) -> None:
    examples = examples_of(noise(0, growing=False, repeats=False), tmp_path, spark, negatives=2, history=50)
    features = np.stack(examples["features"].to_list())
    click = examples["label"].to_numpy() == 1
    if leak.startswith("counts"):
        features[click, 2] = np.log1p(np.expm1(features[click, 2]) + 1)
    else:
        features[~click, 2:] = 0
    away = away_from_chance(examples.assign(features=list(features)))
    assert away["the model"] > 4, away
