"""Ids as numbers that are the same everywhere and always, so that no process needs a list of all ids."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def stable_hash(ids: Sequence[str]) -> npt.NDArray[np.int64]:
    """A number in [0, 2**60) of each id. In Spark SQL: `CAST(conv(substring(md5(id), 1, 15), 16, 10) AS BIGINT)`."""
    digests = (hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()[:15] for text in ids)
    return np.array([int(digest, 16) for digest in digests], np.int64)


def item_row(ids: Sequence[str], rows: int) -> npt.NDArray[np.int64]:
    """Row of each item in an item table of `rows` rows, of which row 0 is padding."""
    return 1 + stable_hash(ids) % (rows - 1)
