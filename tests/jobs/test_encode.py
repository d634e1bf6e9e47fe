"""encode in one task: of a row group all items or the pending ones; who keeps which codes, and which suffix."""

from __future__ import annotations

from datetime import date
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data import topics
from delta_rows import version_of
from hypothesis import given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession
from pyspark.sql.pandas.types import from_arrow_schema

from jobs.config import EncodeConfig
from jobs.embeddings.packed import pack
from jobs.encode import ROWS_A_TASK, _published, _tasks
from jobs.encode_task import ENCODED, encode_group
from jobs.files.parquet import RowGroup, row_groups
from tokenizer import RQGMM, fit_rqgmm, text_of

ITEMS, HOLD = 90, 1.1
X = topics(ITEMS, 6, groups=9, spread=0.4)
PENDING = pa.struct(
    [("item_id", pa.string()), ("codes", pa.list_(pa.int32())), ("suffix", pa.int32()), ("final", pa.bool_())]
)


@pytest.fixture(scope="module")
def rqgmm() -> RQGMM:
    return fit_rqgmm(torch.from_numpy(X), levels=2, components=6, seed=0).rqgmm


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> list[RowGroup]:
    """Two files, of row groups of forty."""
    folder = tmp_path_factory.mktemp("groups")
    for number, part in enumerate(np.array_split(np.arange(ITEMS), [50])):
        table = pa.table(
            {
                "embedding": pack(X[part], "float32"),
                "item_id": [f"i{row}" for row in part],
                "content_hash": [f"h{row}" for row in part],
                "first_seen": pa.array([date(2026, 1, 1)] * len(part)),
            }
        )
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=40)
    return row_groups([f"{folder.as_uri()}/{number}.parquet" for number in range(2)])


def encoded(
    groups: list[RowGroup], rqgmm: RQGMM, pending: list[dict[str, Any]] | None, rows: int = 16, alternates: int = 3
) -> dict[str, Any]:
    named = None if pending is None else pa.array(pending, PENDING)
    batches = [
        batch
        for group in groups
        for batch in encode_group(
            group, named, rqgmm, 1, EncodeConfig(hold=HOLD, rows_per_batch=rows, alternates=alternates)
        )
    ]
    return {row["item_id"]: row for batch in batches for row in batch.to_pylist()}


def incumbent(item: int, codes: list[int] | None, *, suffix: int | None = None, final: bool = False) -> dict[str, Any]:
    return {"item_id": f"i{item}", "codes": codes, "suffix": suffix, "final": final}


def test_row_groups_are_those_of_the_files_in_order(groups: list[RowGroup]) -> None:
    assert [(group.file, group.index, group.rows) for group in groups] == [
        ("0.parquet", 0, 40),
        ("0.parquet", 1, 10),
        ("1.parquet", 0, 40),
    ]
    batches = [batch for group in groups for batch in group.batches(["item_id"], 7)]
    assert [i for batch in batches for i in batch["item_id"].to_pylist()] == [f"i{row}" for row in range(ITEMS)]


@settings(max_examples=20, deadline=None)
@given(chosen=st.sets(st.integers(0, ITEMS - 1)), rows=st.sampled_from([1, 16, 1000]))
def test_an_item_gets_the_same_codes_alone_or_with_all(
    groups: list[RowGroup], rqgmm: RQGMM, chosen: set[int], rows: int
) -> None:
    everything = encoded(groups, rqgmm, None)
    some = encoded(groups, rqgmm, [incumbent(item, None) for item in sorted(chosen)], rows)
    assert some == {f"i{item}": everything[f"i{item}"] for item in chosen}
    codes = rqgmm.encode(torch.from_numpy(X)).tolist()
    assert [everything[f"i{item}"]["codes"] for item in range(ITEMS)] == codes
    assert all(row["joined"] == text_of(row["codes"], 0) for row in everything.values())


def test_who_keeps_codes_and_suffix(groups: list[RowGroup], rqgmm: RQGMM) -> None:
    best = rqgmm.encode(torch.from_numpy(X)).tolist()
    far = [[(code + 1) % 6 for code in codes] for codes in best]
    result = encoded(
        groups,
        rqgmm,
        [
            incumbent(0, best[0], suffix=3),
            incumbent(1, far[1], suffix=4),
            incumbent(60, far[60], suffix=5, final=True),
            incumbent(61, None),
        ],
    )
    assert set(result) == {"i0", "i1", "i60", "i61"}
    kept = {item: (row["codes"], row["kept_suffix"], row["held"]) for item, row in result.items()}
    assert kept == {
        "i0": (best[0], 3, False),  # its codes are still the best
        "i1": (best[1], None, False),  # they served it far worse: it moves, and is a newcomer among its new codes
        "i60": (far[60], 5, True),  # published under this version: kept whatever happens
        "i61": (best[61], None, False),
    }
    for item in result:
        row = X[int(item[1:])].astype(np.float64)
        means = [rqgmm.levels[level].means[code].double().numpy() for level, code in enumerate(result[item]["codes"])]
        assert result[item]["squared_error"] == pytest.approx(((row - sum(means)) ** 2).sum(), rel=1e-5)
    given_codes = rqgmm.assign(torch.from_numpy(X[60:61]), torch.tensor([far[60]]))
    assert result["i60"]["confidence"] == pytest.approx(float(given_codes.confidence[0]))
    expected = rqgmm.alternates(torch.from_numpy(X[60:62]), torch.tensor([far[60], best[61]]), 3)
    for item, codes, weights in zip(("i60", "i61"), expected.codes.tolist(), expected.weights.tolist(), strict=True):
        assert result[item]["alternates"] == [
            {"codes": c, "weights": w} for c, w in zip(codes, weights, strict=True)
        ]  # a kept ID has the alternates of its own path
    assert all(row["alternates"] is None for row in encoded(groups, rqgmm, None, alternates=0).values())
    assert result["i60"]["log_likelihood"] == pytest.approx(float(given_codes.log_likelihood[0]))


@pytest.mark.parametrize("taken", [False, True], ids=["new version", "version with IDs"])
def test_suffixes_follow_day_and_id_and_begin_after_the_taken_ones(spark: SparkSession, taken: bool) -> None:
    def row(item: str, day: int, kept: int | None = None) -> tuple[Any, ...]:
        return (
            1,
            item,
            "h",
            date(2026, 1, day),
            [1, 2],
            "1-2",
            kept,
            0.5,
            -1.0,
            False,
            [([1, 3], [200, 55]), ([2, 4], [255, 0])],
            0.25,
        )

    rows = [row("b", 1), row("c", 1), row("a", 2)]
    own = None
    if taken:
        published = [("x", [1, 2], 0), ("k", [1, 2], 3), ("y", [1, 2], 4), ("z", [1, 20], 7)]
        own = spark.createDataFrame(published, "item_id STRING, codes ARRAY<INT>, suffix INT")
        rows.append(row("k", 9, kept=3))  # its own ID of this version
        rows.append(row("l", 9, kept=2))  # an ID of the version before, which is nobody's in this one
        rows.append(row("m", 9, kept=4))  # an ID of the version before, which is y's in this one
    model = version_of("x")
    result = _published(spark.createDataFrame(rows, from_arrow_schema(ENCODED)), own, model, date(2026, 1, 3)).collect()
    ids = {row["item_id"]: row["semantic_id"] for row in result}
    assert ids == (
        {"b": "1-2-5", "c": "1-2-6", "a": "1-2-7", "k": "1-2-3", "l": "1-2-2", "m": "1-2-8"}
        if taken
        else {"b": "1-2", "c": "1-2-1", "a": "1-2-2"}
    )
    assert all(row["alternates"][0]["weights"] == [200, 55] for row in result)
    assert all(row["semantic_id"] == text_of(row["codes"], row["suffix"]) for row in result)


@given(rows=st.integers(0, 10**9), cores=st.integers(1, 500))
def test_a_first_encode_is_written_in_whole_rounds_of_tasks(rows: int, cores: int) -> None:
    tasks = _tasks(rows, cores)
    assert tasks >= 1
    assert rows <= tasks * ROWS_A_TASK
    assert tasks <= cores or tasks % cores == 0
    assert (tasks - cores) * ROWS_A_TASK < max(rows, 1)  # no more than a round too many
