"""Batches of users from the files of `ctr_examples`, for training and scoring in bounded memory.

Row groups are read in random order. Those of a window, WINDOW behaviours and impressions or the largest row group, are in
memory at once; their users are sorted by length and cut into batches of a size, and the batches shuffled. The next batch is
made in a thread while the current one is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from jobs.ctr.batch import Items, UserBatch
from jobs.ctr.hashing import item_row, stable_hash
from jobs.ctr.tokens import TokenScheme
from jobs.ctr.users import Int64, ranges
from jobs.files.parquet import RowGroup, footers, read_ahead, row_groups_of

WINDOW = 2**19
COLUMNS = ["user_id", "behaviours", "impressions"]
SHUFFLED_LENGTH = 0.2  # by how much the length that users are sorted by may differ from theirs, so that batches vary


@dataclass(frozen=True)
class ExampleRowGroup(RowGroup):
    """A row group of `ctr_examples`, and its number of behaviours and impressions."""

    positions: int


@dataclass(frozen=True)
class ExampleStream:
    """Batches of the impressions of one split, each time that it is iterated over; the same ones for the same seed and epoch.

    Attributes:
        groups: What to read: `row_groups` of the files of a version of `ctr_examples`.
        split: Which impressions: "train", "validation" or "test".
        scheme: How codes become tokens.
        history: Latest behaviours that an impression sees.
        item_rows: Rows of the item table.
        batch_size: Behaviours and impressions of a batch, padding included. A row of the table is never cut: a longer one
            is a batch by itself.
        shuffle: In random order; without it in the order of the files, for scoring.
        seed, epoch: What the random order depends on.
        rank, world: Of `world` processes this one reads its share of the row groups.
    """

    groups: tuple[ExampleRowGroup, ...]
    split: str
    scheme: TokenScheme
    history: int
    item_rows: int
    batch_size: int
    shuffle: bool = False
    seed: int = 0
    epoch: int = 0
    rank: int = 0
    world: int = 1

    def at(self, epoch: int) -> ExampleStream:
        """The batches of another epoch."""
        return replace(self, epoch=epoch)

    def __iter__(self) -> Iterator[UserBatch]:
        return read_ahead(self._batches())

    def _batches(self) -> Iterator[UserBatch]:
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(len(self.groups)) if self.shuffle else np.arange(len(self.groups))
        own = [self.groups[number] for number in order[self.rank :: self.world]]
        for window in _windows(own):
            users = _Users.read(window, self)
            for rows in _cut(users.behaviours, users.impressions, self.batch_size, random if self.shuffle else None):
                yield users.batch(rows, self)


def row_groups(uris: Sequence[str]) -> tuple[ExampleRowGroup, ...]:
    """The row groups with users of all files, in order; reads footers only."""
    return tuple(
        ExampleRowGroup(group.uri, group.index, group.rows, _positions(footer.row_group(group.index)))
        for uri, footer in zip(uris, footers(uris), strict=True)
        for group in row_groups_of(uri, footer)
    )


def _positions(group: pq.RowGroupMetaData) -> int:
    columns = (group.column(number) for number in range(group.num_columns))
    return sum(column.num_values for column in columns if column.path_in_schema.endswith(".item_id"))


def _windows(groups: Sequence[ExampleRowGroup]) -> Iterator[list[ExampleRowGroup]]:
    """Neighbours of at most WINDOW positions together, or one by itself."""
    window: list[ExampleRowGroup] = []
    for group in groups:
        if window and sum(each.positions for each in window) + group.positions > WINDOW:
            yield window
            window = []
        window.append(group)
    if window:
        yield window


def _cut(behaviours: Int64, impressions: Int64, size: int, random: np.random.Generator | None) -> Iterator[Int64]:
    """Numbers of users of like length, so many that users x longest behaviours + impressions is at most `size`, or one."""
    length = behaviours.astype(np.float64)
    if random is not None:
        noise = random.random(len(length))
        length = length * (1 - SHUFFLED_LENGTH / 2 + SHUFFLED_LENGTH * noise) + noise
    order = np.argsort(length, kind="stable")
    cuts, longest, total, begin = [0], 0, 0, 0
    for number, (long, many) in enumerate(zip(behaviours[order].tolist(), impressions[order].tolist(), strict=True)):
        longest, total = max(longest, long), total + many
        if number > begin and (number + 1 - begin) * longest + total > size:
            cuts.append(number)
            begin, longest, total = number, long, many
    cuts.append(len(order))
    pairs = list(pairwise(cuts)) if len(order) else []
    for number in random.permutation(len(pairs)) if random is not None else range(len(pairs)):
        yield order[slice(*pairs[number])]


@dataclass(frozen=True, eq=False)
class _Table:
    """Behaviours or impressions of a window as flat arrays; those of a user are [first, last)."""

    first: Int64
    last: Int64
    item: Int64
    ts: Int64
    codes: npt.NDArray[np.int32]  # (rows, L, m), -1 without a semantic ID
    weights: npt.NDArray[np.uint8]

    def items(self, rows: Int64, used: npt.NDArray[np.bool_], scheme: TokenScheme) -> Items:
        """The items of `rows`, padding where they are not `used`."""
        flat, mask = rows.ravel(), torch.from_numpy(used)
        codes, weights = torch.from_numpy(self.codes[flat]), torch.from_numpy(self.weights[flat])
        tokens, weight = (part.reshape(*rows.shape, -1) for part in scheme.rows(codes, weights))
        return Items(
            torch.from_numpy(np.where(used, self.item[rows], 0)), tokens * mask[..., None], weight * mask[..., None]
        )


@dataclass(frozen=True, eq=False)
class _Users:
    """The users of a window that have impressions of the split, and what these need."""

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
    def read(window: Sequence[ExampleRowGroup], stream: ExampleStream) -> _Users:
        table = pa.concat_tables([group.read(COLUMNS) for group in window]).combine_chunks()
        behaviours, impressions = _fields(table, "behaviours"), _fields(table, "impressions")
        chosen = pc.equal(impressions["split"], stream.split).to_numpy(zero_copy_only=False)
        lengths = {name: table[name].combine_chunks().value_lengths() for name in ("behaviours", "impressions")}
        ends = {name: np.cumsum(length.to_numpy(zero_copy_only=False)) for name, length in lengths.items()}
        before = np.append(0, np.cumsum(chosen))  # impressions of the split before each
        first, last = before[np.append(0, ends["impressions"][:-1])], before[ends["impressions"]]
        users = np.flatnonzero(last > first)
        first, last, rows = first[users], last[users], np.flatnonzero(chosen)
        known = impressions["known"].to_numpy(zero_copy_only=False)[rows].astype(np.int64)
        # Impressions are in order of time: the first needs the oldest behaviours, the last the newest.
        low, high = np.maximum(0, known[first] - stream.history), known[last - 1]
        begin = np.append(0, ends["behaviours"][:-1])[users]
        end = np.cumsum(high - low)
        features = impressions["features"].flatten().to_numpy(zero_copy_only=False).reshape(len(chosen), -1)
        return _Users(
            number=stable_hash(table["user_id"].take(pa.array(users)).to_pylist()),
            behaviour=_flat(behaviours, ranges(begin + low, begin + high), end - (high - low), end, stream),
            impression=_flat(impressions, rows, first, last, stream),
            known=known - np.repeat(low, last - first),
            features=features[rows],
            label=impressions["label"].to_numpy(zero_copy_only=False)[rows].astype(np.float32),
            shown=impressions["shown"].to_numpy(zero_copy_only=False)[rows].astype(np.int64),
        )

    def batch(self, users: Int64, stream: ExampleStream) -> UserBatch:
        first, length = self.behaviour.first[users], self.behaviours[users]
        position = np.arange(max(1, int(length.max())))
        used = position < length[:, None]
        rows = np.where(used, first[:, None] + position, 0)
        impressions = ranges(self.impression.first[users], self.impression.last[users])
        known = self.known[impressions]
        tensor = torch.from_numpy
        return UserBatch(
            behaviours=self.behaviour.items(rows, used, stream.scheme),
            behaviour_time=tensor(np.where(used, self.behaviour.ts[rows], 0)),
            length=tensor(length),
            candidates=self.impression.items(impressions, np.ones(len(impressions), bool), stream.scheme),
            user=tensor(np.repeat(np.arange(len(users)), self.impressions[users])),
            first=tensor(np.maximum(0, known - stream.history)),
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


def _flat(fields: dict[str, pa.Array], rows: Int64, first: Int64, last: Int64, stream: ExampleStream) -> _Table:
    """These `rows` of the fields, or one of padding where there are none."""
    levels, alternates = stream.scheme.levels, stream.scheme.alternates
    codes = np.full((max(1, len(rows)), levels, alternates), -1, np.int32)
    weights = np.zeros(codes.shape, np.uint8)
    item, ts = np.zeros(len(codes), np.int64), np.zeros(len(codes), np.int64)
    if len(rows):
        taken = {name: fields[name].take(pa.array(rows)) for name in ("item_id", "ts", "codes", "weights")}
        names = taken["item_id"].dictionary_encode()
        item = item_row(names.dictionary.to_pylist(), stream.item_rows)[names.indices.to_numpy(zero_copy_only=False)]
        ts = taken["ts"].to_numpy(zero_copy_only=False)
        length = taken["codes"].value_lengths().to_numpy(zero_copy_only=False)
        for number in np.unique(length[length > 0]):  # one, but where encode.alternates has changed
            same = length == number
            kept = min(alternates, number // levels)
            for name, into in (("codes", codes), ("weights", weights)):
                values = taken[name].filter(pa.array(same)).flatten().to_numpy(zero_copy_only=False)
                into[same, :, :kept] = values.reshape(-1, levels, number // levels)[:, :, :kept]
    return _Table(first, last, item, ts, codes, weights)
