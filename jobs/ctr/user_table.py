"""Rows of `ctr_examples` in memory as flat arrays, and batches of them as models read them.

Training, scoring, the cache of interests and the pyfunc all make their batches here, so a model sees the same in each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from jobs.ctr.batch import Items, UserBatch
from jobs.ctr.hashing import item_row, stable_hash
from jobs.ctr.tokens import TokenScheme
from jobs.ctr.users import Int64, ranges

# The columns of `ctr_examples` that batches are made of, as Arrow types.
CODES = [("codes", pa.list_(pa.int32())), ("weights", pa.list_(pa.int16()))]
BEHAVIOUR = pa.struct([("item_id", pa.string()), ("ts", pa.int64()), *CODES])
COUNTS = [("label", pa.int32()), ("ts", pa.int64()), ("known", pa.int32()), ("split", pa.string())]
IMPRESSION = pa.struct(
    [("item_id", pa.string()), *COUNTS, ("features", pa.list_(pa.float32())), ("shown", pa.int32()), *CODES]
)
USERS = pa.schema(
    [("user_id", pa.string()), ("behaviours", pa.list_(BEHAVIOUR)), ("impressions", pa.list_(IMPRESSION))]
)


@dataclass(frozen=True)
class ModelInputs:
    """How items and histories become what a model reads.

    Attributes:
        scheme: From codes to rows of the token table; None for a model without tokens.
        item_rows: Rows of the item table, padding included.
        history: Latest behaviours that an impression sees.
    """

    scheme: TokenScheme | None
    item_rows: int
    history: int

    @property
    def settings(self) -> dict[str, Any]:
        """All that is set and not learned, for JSON."""
        scheme = self.scheme.settings if self.scheme else None
        return {"scheme": scheme, "item_rows": self.item_rows, "history": self.history}


@dataclass(frozen=True, eq=False)
class _Table:
    """Behaviours or impressions of a window as flat arrays; those of a user are [first, last)."""

    first: Int64
    last: Int64
    item: Int64
    ts: Int64
    codes: npt.NDArray[np.int32]  # (rows, L, m), -1 without a semantic ID
    weights: npt.NDArray[np.uint8]

    def items(self, rows: Int64, used: npt.NDArray[np.bool_], scheme: TokenScheme | None) -> Items:
        """The items of `rows`, padding where they are not `used`."""
        item = torch.from_numpy(np.where(used, self.item[rows], 0))
        if scheme is None:
            none = torch.zeros(*rows.shape, 0)
            return Items(item, none.long(), none)
        flat, mask = rows.ravel(), torch.from_numpy(used)[..., None]
        codes, weights = torch.from_numpy(self.codes[flat]), torch.from_numpy(self.weights[flat])
        tokens, weight = (part.reshape(*rows.shape, -1) for part in scheme.rows(codes, weights))
        return Items(item, tokens * mask, weight * mask)


@dataclass(frozen=True, eq=False)
class UserTable:
    """Users with impressions and what these need: of each user the behaviours from the oldest history to the newest.

    Attributes:
        number: A number of each user that is the same in every table.
        known: Of each impression, how many of its user's behaviours here happened before it.
    """

    inputs: ModelInputs
    number: Int64
    behaviour: _Table
    impression: _Table
    known: Int64
    features: npt.NDArray[np.float32]
    label: npt.NDArray[np.float32]
    shown: Int64

    @property
    def behaviours(self) -> Int64:
        return self.behaviour.last - self.behaviour.first

    @property
    def impressions(self) -> Int64:
        return self.impression.last - self.impression.first

    @staticmethod
    def of(table: pa.Table, split: str, inputs: ModelInputs) -> UserTable:
        """The users of `table`, rows of `ctr_examples`, that have impressions of the split."""
        table = table.combine_chunks()
        behaviours, impressions = _fields(table, "behaviours"), _fields(table, "impressions")
        chosen = pc.equal(impressions["split"], split).to_numpy(zero_copy_only=False)
        lengths = {name: table[name].combine_chunks().value_lengths() for name in ("behaviours", "impressions")}
        ends = {name: np.cumsum(length.to_numpy(zero_copy_only=False)) for name, length in lengths.items()}
        before = np.append(0, np.cumsum(chosen))  # impressions of the split before each
        first, last = before[np.append(0, ends["impressions"][:-1])], before[ends["impressions"]]
        users = np.flatnonzero(last > first)
        first, last, rows = first[users], last[users], np.flatnonzero(chosen)
        known = impressions["known"].to_numpy(zero_copy_only=False)[rows].astype(np.int64)
        # Impressions are in order of time: the first needs the oldest behaviours, the last the newest.
        low, high = np.maximum(0, known[first] - inputs.history), known[last - 1]
        begin = np.append(0, ends["behaviours"][:-1])[users]
        end = np.cumsum(high - low)
        features = impressions["features"].flatten().to_numpy(zero_copy_only=False).reshape(len(chosen), -1)
        return UserTable(
            inputs=inputs,
            number=stable_hash(table["user_id"].take(pa.array(users)).to_pylist()),
            behaviour=_flat(behaviours, ranges(begin + low, begin + high), end - (high - low), end, inputs),
            impression=_flat(impressions, rows, first, last, inputs),
            known=known - np.repeat(low, last - first),
            features=features[rows],
            label=impressions["label"].to_numpy(zero_copy_only=False)[rows].astype(np.float32),
            shown=impressions["shown"].to_numpy(zero_copy_only=False)[rows].astype(np.int64),
        )

    def cut(self, impressions: int) -> UserTable:
        """Users with more than this many impressions as several, each with the behaviours that its own need; no copy
        is made of what the table holds.
        """
        parts = -(-self.impressions // impressions)
        user = np.repeat(np.arange(len(parts)), parts)
        first = self.impression.first[user] + impressions * ranges(np.zeros_like(parts), parts)
        last = np.minimum(first + impressions, self.impression.last[user])
        low, begin = np.maximum(0, self.known[first] - self.inputs.history), self.behaviour.first[user]
        return replace(
            self,
            number=self.number[user],
            behaviour=replace(self.behaviour, first=begin + low, last=begin + self.known[last - 1]),
            impression=replace(self.impression, first=first, last=last),
            known=self.known - np.repeat(low, last - first),
        )

    def batch(self, users: Int64) -> UserBatch:
        """The users at these indices, with all their impressions."""
        first, length = self.behaviour.first[users], self.behaviours[users]
        position = np.arange(max(1, int(length.max())))
        used = position < length[:, None]
        rows = np.where(used, first[:, None] + position, 0)
        impressions = ranges(self.impression.first[users], self.impression.last[users])
        known = self.known[impressions]
        tensor = torch.from_numpy
        return UserBatch(
            behaviours=self.behaviour.items(rows, used, self.inputs.scheme),
            behaviour_time=tensor(np.where(used, self.behaviour.ts[rows], 0)),
            length=tensor(length),
            candidates=self.impression.items(impressions, np.ones(len(impressions), bool), self.inputs.scheme),
            user=tensor(np.repeat(np.arange(len(users)), self.impressions[users])),
            first=tensor(np.maximum(0, known - self.inputs.history)),
            last=tensor(known),
            time=tensor(self.impression.ts[impressions]),
            features=tensor(self.features[impressions]),
            label=tensor(self.label[impressions]),
            shown=tensor(self.shown[impressions]),
            user_number=tensor(np.repeat(self.number[users], self.impressions[users])),
        )


def _fields(table: pa.Table, name: str) -> dict[str, pa.Array]:
    """The fields of a column of lists of structs, without the lists."""
    structs = table[name].combine_chunks().flatten()
    return dict(zip(structs.type.names, structs.flatten(), strict=True))


def _flat(fields: dict[str, pa.Array], rows: Int64, first: Int64, last: Int64, inputs: ModelInputs) -> _Table:
    """These `rows` of the fields, or one of padding where there are none."""
    levels, alternates = (inputs.scheme.levels, inputs.scheme.alternates) if inputs.scheme else (0, 0)
    if not len(rows):
        codes, zero = np.full((1, levels, alternates), -1, np.int32), np.zeros(1, np.int64)
        return _Table(first, last, zero, zero, codes, np.zeros(codes.shape, np.uint8))
    taken = {name: fields[name].take(pa.array(rows)) for name in ("item_id", "ts", "codes", "weights")}
    names = taken["item_id"].dictionary_encode()
    item = item_row(names.dictionary.to_pylist(), inputs.item_rows)[names.indices.to_numpy(zero_copy_only=False)]
    ts = taken["ts"].to_numpy(zero_copy_only=False)
    return _Table(first, last, item, ts, *code_arrays(taken["codes"], taken["weights"], levels, alternates))


def code_arrays(
    codes: pa.ListArray, weights: pa.ListArray, levels: int, alternates: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
    """Codes and weights (N, levels, alternates) of items from lists of levels x m numbers, the first `alternates` of
    the m; -1 and 0 where there are fewer, or none.
    """
    shape = len(codes), levels, alternates
    code, weight = np.full(shape, -1, np.int32), np.zeros(shape, np.uint8)
    length = codes.value_lengths().to_numpy(zero_copy_only=False)
    for number in np.unique(length[length > 0]) if levels else ():  # one, but where encode.alternates has changed
        same = length == number
        kept = min(alternates, number // levels)
        for column, into in ((codes, code), (weights, weight)):
            values = column.filter(pa.array(same)).flatten().to_numpy(zero_copy_only=False)
            into[same, :, :kept] = values.reshape(-1, levels, number // levels)[:, :, :kept]
    return code, weight
