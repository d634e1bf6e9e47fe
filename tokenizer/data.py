"""The rows of a fit, in memory or streamed, and what the fitted levels leave of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from operator import add

import torch
from torch import Tensor

from tokenizer.beam import beam_step
from tokenizer.collectives import gather_rows, on_grid, sum_statistics
from tokenizer.errors import DataError
from tokenizer.gmm import DiagonalGMM, GMMStatistics
from tokenizer.kernels import parallel_map, pieces

Data = Tensor | Iterable[Tensor]
FIT_BLOCK = 8192  # rows of a block; statistics of blocks add, so batches of any size give the same fit
VARIANCE_FLOOR = 1e-12  # least variance, as a share of the mean square of an element


class Rows:
    """The rows (N, D) of this process in blocks of FIT_BLOCK, from a tensor or from a re-iterable of batches.

    Attributes:
        own: number of rows of this process.
        total: number of rows of all processes.
        dim: D.
        largest: of |x_nd|, over all processes.
        mean_square: mean of x_nd^2, over all processes.

    Raises:
        DataError: no rows, fewer than `components`, NaN or Inf, or batches of different width.
    """

    def __init__(self, data: Data, components: int, device: torch.device) -> None:
        if isinstance(data, Tensor) and data.ndim != 2:
            raise DataError(f"embeddings have shape {tuple(data.shape)}; expected (N, D)")
        self._data, self.device = data, device
        self.own, self.dim, largest, squares = 0, 0, 0.0, 0.0
        for block in self:
            if not torch.isfinite(block).all():
                raise DataError("embeddings hold NaN or Inf; expected finite numbers. Reject such rows before fitting")
            self.own, self.dim = self.own + len(block), block.shape[1]
            largest = max(largest, float(block.abs().amax()))
            squares += float(torch.linalg.vector_norm(block, dim=1).double().square().sum())
        # A process without rows takes part all the same.
        every = gather_rows(torch.tensor([[self.own, self.dim, largest, squares]], dtype=torch.float64))
        self.total, self.dim = int(every[:, 0].sum()), int(every[:, 1].max())
        if self.total == 0:
            raise DataError("there are no embeddings to fit on; expected at least as many as components")
        if self.total < components:
            raise DataError(
                f"{self.total} embeddings are fewer than {components} components; expected at least as many. "
                "Lower components or fit on more items"
            )
        self.largest = float(every[:, 2].max())
        self.mean_square = float(every[:, 3].sum()) / (self.total * self.dim)

    @property
    def in_memory(self) -> bool:
        return isinstance(self._data, Tensor)

    def tensor(self) -> Tensor:
        """A copy of all rows (N, D), float32, on the device."""
        assert isinstance(self._data, Tensor)
        return self._data.to(self.device, torch.float32, copy=True)

    def __iter__(self) -> Iterator[Tensor]:
        """(FIT_BLOCK, D) after (FIT_BLOCK, D), the last one shorter."""
        if isinstance(self._data, Tensor):
            for block in torch.split(self._data, FIT_BLOCK):
                yield block.to(self.device, torch.float32)
            return
        waiting: list[Tensor] = []
        rows = width = 0
        for batch in self._data:
            width = width or batch.shape[-1]
            if batch.ndim != 2 or batch.shape[1] != width:
                raise DataError(f"a batch has shape {tuple(batch.shape)}; expected (n, {width or 'D'}) in every batch")
            waiting.append(batch.float())
            rows += len(batch)
            while rows >= FIT_BLOCK:
                joined = torch.cat(waiting) if len(waiting) > 1 else waiting[0]
                yield self._on_device(joined[:FIT_BLOCK])
                waiting, rows = [joined[FIT_BLOCK:]], rows - FIT_BLOCK
        if rows:
            yield self._on_device(torch.cat(waiting))

    def _on_device(self, block: Tensor) -> Tensor:
        return block.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else block


class Residuals:
    """The residuals of the rows after the levels fitted so far; with a beam, one of each path (tuple of codes) kept.

    Rows in memory: the residuals are kept. Streamed rows: the codes are kept, and each pass subtracts the means again.

    Attributes:
        rows: number of residuals of all processes, each path of an item counted.
        largest: bound of |r_nd|.
        floor: least variance of a component.
    """

    def __init__(self, source: Rows, beam: int) -> None:
        self.source, self.beam, self.dim, self.device = source, beam, source.dim, source.device
        self.rows, self.largest = source.total, source.largest
        self.floor = max(VARIANCE_FLOOR * source.mean_square, 1e-30)
        self._levels: list[DiagonalGMM] = []
        self._residual = source.tensor()[:, None] if source.in_memory else None  # (N, paths, D)
        # (N, paths, levels); in one piece, as small pieces kept from each block would cut up the memory of blocks.
        self._codes = torch.zeros(source.own, 1, 0, dtype=torch.int32, device=source.device)

    @property
    def own_rows(self) -> int:
        """Number of residuals of this process."""
        return self._codes.shape[0] * self._codes.shape[1]

    def __iter__(self) -> Iterator[Tensor]:
        """Residuals (n, D) of every path, at most FIT_BLOCK at a time."""
        for _, residual in self._blocks():
            yield from torch.split(residual.flatten(0, 1), FIT_BLOCK)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The residuals (n, paths, D) of FIT_BLOCK items at a time, and where these stand among the items."""
        start = 0
        for block in self.source if self._residual is None else torch.split(self._residual, FIT_BLOCK):
            items = slice(start, start + len(block))
            start = items.stop
            if self._residual is None:
                residual = block[:, None]
                for level, gmm in enumerate(self._levels):
                    residual = residual - gmm.means[self._codes[items, :, level].long()]
                yield items, residual
            else:
                yield items, block

    def sum(self, step: Callable[[Tensor], GMMStatistics], components: int) -> GMMStatistics:
        """The statistics `step(residuals)` of all processes: the same bits for any batches and number of processes."""

        def block_statistics(block: Tensor) -> GMMStatistics:
            return on_grid(reduce(add, map(step, pieces(block, components))), self.rows, self.largest)

        total: GMMStatistics | None = None
        for stats in parallel_map(block_statistics, self, self.device):
            total = stats if total is None else total + stats
        if total is None:  # a process without rows
            total = step(torch.empty(0, self.dim, device=self.device))
        return sum_statistics(total)

    def sample(self, wanted: int) -> Tensor:
        """About `wanted` residuals of all processes, evenly spread; the same for any batches and processes."""
        step = max(1, self.rows // wanted)
        sample = torch.empty(self.own_rows // step + self.own_rows // FIT_BLOCK + 2, self.dim)
        count = 0
        for block in self:
            part = block[::step]
            sample[count : count + len(part)] = part  # copied: a view would keep the whole block alive
            count += len(part)
        return gather_rows(sample[:count])

    def descend(self, gmm: DiagonalGMM) -> None:
        """Subtract the means that encode subtracts at this level."""
        gmm = gmm.to(self.device)
        n, paths, levels = self._codes.shape
        kept = min(self.beam, paths * gmm.components)
        codes = self._codes.new_empty(n, kept, levels + 1)
        residual = self._residual
        if residual is not None and kept != paths:
            residual = residual.new_empty(n, kept, self.dim)

        def step(block: tuple[slice, Tensor]) -> None:
            items, before = block
            first = items.start
            for piece in pieces(before, paths * gmm.components):
                own = slice(first, first + len(piece))
                first = own.stop
                after, codes[own] = beam_step(self._levels, gmm, piece, self._codes[own], self.beam)
                if residual is not None:
                    residual[own] = after

        deque(parallel_map(step, self._blocks(), self.device), maxlen=0)
        self._codes, self._residual = codes, residual
        self._levels.append(gmm)
        self.largest += float(gmm.means.abs().amax())
        self.rows = self.source.total * kept
