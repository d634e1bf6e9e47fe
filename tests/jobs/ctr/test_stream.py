"""Batches from files of `ctr_examples`: every impression once, with the history that a loop gives it, in any
division.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ctr_data import ALTERNATES, COMPONENTS, LEVELS, Event, codes_of, events_batch, random_events, weights_of
from pyspark.sql import SparkSession
from pyspark.sql.pandas.types import to_arrow_schema

from jobs.ctr import examples, stream
from jobs.ctr.batch import UserBatch
from jobs.ctr.examples import user_rows
from jobs.ctr.hashing import item_row, stable_hash
from jobs.ctr.stream import ExampleStream, row_groups
from jobs.ctr.tokens import TokenScheme
from jobs.ctr.user_table import USERS, ModelInputs
from jobs.warehouse.tables import CTR_EXAMPLES

SCHEME = TokenScheme("soft", LEVELS, COMPONENTS, ALTERNATES, 100)
ITEM_ROWS, HISTORY = 10_000, 3


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "PART", 5)
    monkeypatch.setattr(stream, "WINDOW", 150)


EVENTS = random_events(0, users=40, longest=25)


@pytest.fixture
def groups(tmp_path: Path) -> tuple[stream.ExampleRowGroup, ...]:
    """Two files of several row groups."""
    rows = pa.Table.from_batches([user_rows(events_batch(EVENTS), HISTORY)])
    half = len(rows) // 2
    for name, part in (("a", rows.slice(0, half)), ("b", rows.slice(half))):
        pq.write_table(part, tmp_path / f"{name}.parquet", row_group_size=7)
    return row_groups([f"{tmp_path}/{name}.parquet" for name in "ab"])


def stream_of(
    groups: tuple[stream.ExampleRowGroup, ...], split: str = "train", size: int = 60, **more: object
) -> ExampleStream:
    return ExampleStream(groups, split, ModelInputs(SCHEME, ITEM_ROWS, HISTORY), batch_positions=size, **more)


def impressions_of(batch: UserBatch) -> list[tuple[object, ...]]:
    """For each impression user, moment, item, label, and moments and items of its history."""
    found = []
    for n in range(len(batch)):
        user, history = int(batch.user[n]), slice(int(batch.first[n]), int(batch.last[n]))
        behaviours = zip(batch.behaviour_time[user, history], batch.behaviours.item[user, history], strict=True)
        found.append(
            (
                int(batch.user_number[n]),
                int(batch.time[n]),
                int(batch.candidates.item[n]),
                int(batch.label[n]),
                tuple(sorted((int(ts), int(item)) for ts, item in behaviours)),
            )
        )
    return found


def row_of(item: int) -> int:
    return int(item_row([f"i{item}"], ITEM_ROWS)[0])


def expected(split: str) -> list[tuple[object, ...]]:
    """By a loop."""
    found = []
    for event in EVENTS:
        clicks = sorted((e.ts, e.item) for e in EVENTS if e.user == event.user and e.label == 1 and e.ts < event.ts)
        if event.split == split:
            history = sorted((ts, row_of(item)) for ts, item in clicks[-HISTORY:])
            number = int(stable_hash([f"u{event.user}"])[0])
            found.append((number, event.ts, row_of(event.item), event.label, tuple(history)))
    return sorted(found)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_every_impression_comes_once_with_its_history(groups: tuple[stream.ExampleRowGroup, ...], split: str) -> None:
    batches = list(stream_of(groups, split))
    assert sorted(one for batch in batches for one in impressions_of(batch)) == expected(split)
    for batch in batches:
        users, longest = batch.behaviour_time.shape
        assert users == 1 or users * longest + len(batch) <= 60
        used = torch.arange(longest) < batch.length[:, None]
        assert (batch.behaviours.item[~used] == 0).all()
        assert (batch.behaviours.tokens[~used] == 0).all()
        assert (batch.behaviours.weights[~used] == 0).all()
        assert (batch.last - batch.first <= HISTORY).all()
        assert (batch.shown > 0).all()


def test_users_with_more_impressions_than_a_batch_are_cut(groups: tuple[stream.ExampleRowGroup, ...]) -> None:
    batches = list(stream_of(groups, size=3))
    assert sorted(one for batch in batches for one in impressions_of(batch)) == expected("train")
    assert max(map(len, batches)) == 3
    for batch in batches:
        users, longest = len(batch.length), int(batch.length.max())
        assert users == 1 or users * longest + len(batch) <= 3
        assert (batch.length == torch.stack([batch.last[batch.user == user].max() for user in range(users)])).all()


def test_tokens_are_those_of_the_scheme(groups: tuple[stream.ExampleRowGroup, ...]) -> None:
    by_row = {row_of(event.item): event.item for event in EVENTS}
    for batch in stream_of(groups):
        for n in range(len(batch)):
            item = by_row[int(batch.candidates.item[n])]
            codes = torch.tensor(codes_of(item) or [-1] * 4).reshape(1, LEVELS, ALTERNATES)
            weights = torch.tensor(weights_of(item) or [0] * 4).reshape(1, LEVELS, ALTERNATES)
            rows, weight = SCHEME.rows(codes, weights)
            assert torch.equal(batch.candidates.tokens[n], rows[0])
            assert torch.equal(batch.candidates.weights[n], weight[0])


def test_an_epoch_is_the_same_again_and_the_next_one_is_another(groups: tuple[stream.ExampleRowGroup, ...]) -> None:
    shuffled = stream_of(groups, shuffle=True, seed=3)
    once, again, later = list(shuffled), list(shuffled), list(shuffled.at(1))
    for a, b in zip(once, again, strict=True):
        for field in fields(UserBatch):
            if field.name not in ("behaviours", "candidates"):
                assert torch.equal(getattr(a, field.name), getattr(b, field.name))
    assert [impressions_of(batch) for batch in once] != [impressions_of(batch) for batch in later]
    assert sorted(one for batch in later for one in impressions_of(batch)) == expected("train")


def test_the_shares_of_the_processes_add_to_all(groups: tuple[stream.ExampleRowGroup, ...]) -> None:
    shares = [stream_of(groups, shuffle=True, rank=rank, world=3) for rank in range(3)]
    assert sorted(one for share in shares for batch in share for one in impressions_of(batch)) == expected("train")


def test_fewer_alternates_than_the_scheme_has_are_padded(tmp_path: Path) -> None:
    """After encode.alternates has changed, older rows of a codebook have as many as it was."""
    rows = user_rows(events_batch([Event(0, 0, 1, 1), Event(0, 1, 2, 1)]), HISTORY)
    pq.write_table(pa.Table.from_batches([rows]), tmp_path / "a.parquet")
    scheme = TokenScheme("soft", LEVELS, COMPONENTS, 3, 100)
    (batch,) = ExampleStream(
        row_groups([f"{tmp_path}/a.parquet"]), "train", ModelInputs(scheme, ITEM_ROWS, HISTORY), 60
    )
    assert batch.candidates.weights.shape == (2, 7)
    np.testing.assert_allclose(batch.candidates.weights[0], np.array([200, 55, 0, 255, 0, 0, 255]) / 255)


def test_a_stream_that_is_left_early_ends_its_thread(groups: tuple[stream.ExampleRowGroup, ...]) -> None:
    import threading

    before = threading.active_count()
    iterator = iter(stream_of(groups))
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_batches_are_made_of_the_types_of_the_table() -> None:
    declared = to_arrow_schema(CTR_EXAMPLES.schema)
    assert {name: USERS.field(name).type for name in USERS.names} == {
        name: declared.field(name).type for name in USERS.names
    }


def test_spark_computes_the_same_hash(spark: SparkSession) -> None:
    ids = ["item-1", "", "0", "ünï", "x" * 300]
    frame = spark.createDataFrame([(text,) for text in ids], "id STRING")
    found = frame.selectExpr("CAST(conv(substring(md5(id), 1, 15), 16, 10) AS BIGINT) AS number").collect()
    assert [row["number"] for row in found] == stable_hash(ids).tolist()
    rows = item_row([f"item-{n}" for n in range(5000)], 101)
    assert rows.min() == 1
    assert rows.max() == 100
    assert np.bincount(rows)[1:].min() > 20
