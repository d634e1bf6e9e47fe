"""Ids as numbers that are the same everywhere and always, so that no process needs a list of all ids."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def stable_hash(ids: Sequence[str]) -> npt.NDArray[np.int64]:
    """A number in [0, 2**60) of each id. In Spark SQL: `CAST(conv(substring(md5(id), 1, 15), 16, 10) AS BIGINT)`."""
    digests = (hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()[:15] for text in ids)
    return np.array([int(digest, 16) for digest in digests], np.int64)


def item_row(ids: Sequence[str], rows: int) -> npt.NDArray[np.int64]:
    """Row of each item in an item table of `rows` rows, of which row 0 is padding."""
    return 1 + stable_hash(ids) % (rows - 1)


def codes_hash(codes: Tensor) -> Tensor:
    """A number of each tuple of codes (..., any length), (...) int64."""
    mixed = torch.full(codes.shape[:-1], codes.shape[-1], dtype=torch.int64, device=codes.device)
    for code in codes.long().unbind(-1):
        mixed = _mix(mixed * 0x100000001B3 + code)
    return mixed


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer on int64, which wraps: of numbers that differ in one bit about half the bits differ."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))
