"""Batches of users from the files of `ctr_examples`, for training and scoring in bounded memory.

Row groups are read in random order. Those of a window, WINDOW behaviours and impressions or the largest row group, are
in memory at once; their users are sorted by length and cut into batches of a size, and the batches shuffled. The next
batch is made in a thread while the current one is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.ctr.batch import UserBatch
from jobs.ctr.user_table import ModelInputs, UserTable
from jobs.ctr.users import Int64
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
    """Batches of the impressions of one split, each time that it is iterated over; the same ones for the same seed and
    epoch.

    Attributes:
        groups: What to read: `row_groups` of the files of a version of `ctr_examples`.
        split: Which impressions: "train", "validation" or "test".
        inputs: How items and histories become what the model reads.
        batch_positions: Behaviours and impressions of a batch, padding included. The impressions of a user are cut at
            this number, the behaviours never, so a batch can be longer by one history.
        shuffle: In random order; without it in the order of the files, for scoring.
        seed, epoch: What the random order depends on.
        rank, world: Of `world` processes this one has its share of the row groups, or of the users of each where there
            are fewer groups than processes.
    """

    groups: tuple[ExampleRowGroup, ...]
    split: str
    inputs: ModelInputs
    batch_positions: int
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
        share, whole = slice(self.rank, None, self.world), slice(None)
        of_groups, of_users = (share, whole) if len(order) >= self.world else (whole, share)
        own = [self.groups[number] for number in order[of_groups]]
        for window in _windows(own):
            yield from self._of_window(window, of_users, random if self.shuffle else None)

    def _of_window(
        self, window: Sequence[ExampleRowGroup], share: slice, random: np.random.Generator | None
    ) -> Iterator[UserBatch]:
        """Nothing of a window is referred to after its last batch, so that two are never in memory together."""
        table = pa.concat_tables([group.read(COLUMNS) for group in window])
        users = UserTable.of(table, self.split, self.inputs).cut(self.batch_positions)
        del table
        own = np.arange(len(users.number))[share]
        for rows in _cut(users.behaviours[own], users.impressions[own], self.batch_positions, random):
            yield users.batch(own[rows])


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
    """Numbers of users of like length, so many that users x longest behaviours + impressions is at most `size`, or
    one.
    """
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
