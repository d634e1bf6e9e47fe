"""Batches of rows cut at users."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.ctr.users import ranges, starts_of, whole_users


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 6), max_size=8), size=st.integers(1, 7))
def test_no_user_is_in_two_batches_and_no_row_is_lost(lengths: list[int], size: int) -> None:
    users = [f"u{number}" for number, length in enumerate(lengths) for _ in range(length)]
    table = pa.table({"user_id": pa.array(users, pa.string()), "row": np.arange(len(users))})
    batches = [batch for start in range(0, len(users), size) for batch in table.slice(start, size).to_batches()]
    found = list(whole_users(iter([*batches, pa.RecordBatch.from_pylist([], table.schema)])))
    assert [row for batch in found for row in batch.column("row").to_pylist()] == list(range(len(users)))
    seen = [set(batch.column("user_id").to_pylist()) for batch in found]
    assert sum(map(len, seen)) == len(lengths)


@given(values=st.lists(st.integers(0, 2), min_size=1))
def test_starts_are_the_first_of_equal_neighbours(values: list[int]) -> None:
    starts = starts_of(np.array(values, np.int64))
    for row, start in enumerate(starts):
        assert len(set(values[start : row + 1])) == 1
        assert start == 0 or values[start - 1] != values[start]


@given(pairs=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4))))
def test_ranges_one_after_the_other(pairs: list[tuple[int, int]]) -> None:
    first = np.array([low for low, _ in pairs], np.int64)
    length = np.array([many for _, many in pairs], np.int64)
    expected = [number for low, many in pairs for number in range(low, low + many)]
    assert ranges(first, first + length).tolist() == expected
