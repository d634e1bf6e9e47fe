"""Rows that Spark sorted by user, as tables that hold whole users: what tasks compute per user, they compute on
these.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Int64 = npt.NDArray[np.int64]


def whole_users(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The rows of `batches`, sorted by user_id, cut so that no user is in two. Memory: a batch and the longest user."""
    pending: list[pa.RecordBatch] = []
    for batch in batches:
        if not len(batch):
            continue
        users = batch.column("user_id")
        begins = pc.index(users, users[-1]).as_py()  # where the last user of the batch begins
        if begins:
            yield pa.concat_batches([*pending, batch.slice(0, begins)])
            pending = [batch.slice(begins)]
        elif pending and not pending[-1].column("user_id")[-1].equals(users[-1]):
            yield pa.concat_batches(pending)
            pending = [batch]
        else:
            pending.append(batch)
    if pending:
        yield pa.concat_batches(pending)


def starts_of(*columns: npt.NDArray[np.int64]) -> Int64:
    """For each row the first row of its group: neighbours that are equal in all `columns`."""
    rows = len(columns[0])
    changes = np.zeros(rows, bool)
    changes[:1] = True
    for column in columns:
        changes[1:] |= column[1:] != column[:-1]
    return np.maximum.accumulate(np.where(changes, np.arange(rows), 0))


def numbers_of(users: pa.Array) -> Int64:
    """Users numbered in the order in which they occur."""
    numbers: Int64 = users.dictionary_encode().indices.to_numpy(zero_copy_only=False).astype(np.int64)
    return numbers


def ranges(first: Int64, last: Int64) -> Int64:
    """The numbers of [first, last) of each pair, one range after the other."""
    length = last - first
    ends = np.cumsum(length)
    numbers: Int64 = np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - (ends - length), length)
    return numbers
