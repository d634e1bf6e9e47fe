"""Batches of a version of `item_embeddings` for the fit, read from the table's files by pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch

from jobs.embeddings.packed import unpack
from jobs.files.parquet import RowGroup, read_ahead, row_groups
from tokenizer import FIT_BLOCK


@dataclass(frozen=True)
class EmbeddingFiles:
    """A table version as a re-iterable of float32 batches (n, dim): the rows of `files` of one worker of a fit.

    Only every `step`-th row is used. Each worker gets one contiguous range of rows that begins at a block of the fit,
    so that the blocks, and with them the codebook, are the same for any number of workers. Only row groups that overlap
    the range are read.

    Attributes:
        files: paths or URIs of the Parquet files, in a fixed order.
        dim: components of an embedding.
        batch_rows: most rows of a batch.
        rank, world: number of this worker, and of workers.
        step: distance of the rows that are used; 1 for all.
        in_memory: whether `rows` reads the batches once and keeps them.
    """

    files: tuple[str, ...]
    dim: int
    batch_rows: int
    rank: int = 0
    world: int = 1
    step: int = 1
    in_memory: bool = False

    def rows(self) -> Self | list[torch.Tensor]:
        """What to fit on: a list of all batches if `in_memory`, else this object, which reads the files each time."""
        return list(self) if self.in_memory else self

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Batches; the next one is read while the caller works on the current one."""
        return read_ahead(self._batches())

    @cached_property
    def _groups(self) -> list[RowGroup]:
        return row_groups(self.files)

    def _batches(self) -> Iterator[torch.Tensor]:
        rows = sum(group.rows for group in self._groups)
        blocks = -(-rows // (FIT_BLOCK * self.step))
        begin, end = (FIT_BLOCK * self.step * (blocks * rank // self.world) for rank in (self.rank, self.rank + 1))
        first = 0  # row of the table at which the row group, then the batch, begins
        for group in self._groups:
            if first >= end or first + group.rows <= begin:
                first += group.rows
                continue
            for batch in group.batches(["embedding"], self.batch_rows):
                own = batch.slice(max(0, begin - first), max(0, end - max(first, begin)))
                skipped = -max(first, begin) % self.step
                first += len(batch)
                if len(own):
                    yield torch.tensor(unpack(own.column(0), self.dim)[skipped :: self.step])
