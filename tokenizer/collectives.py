"""Sums and rows of all processes of a fit; the only file that imports torch.distributed. One process is its own group.

Every process adds the same numbers in the same order and so takes the same step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from tokenizer.errors import LostWorker
from tokenizer.gmm import GMMStatistics


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def lost_worker() -> Iterator[None]:
    """A collective operation in the block that fails, or times out, raises LostWorker."""
    try:
        yield
    except RuntimeError as error:  # all that torch.distributed says when a peer has gone
        raise LostWorker(
            f"another worker is gone ({error}); expected all of them. Run again to go on from what is finished"
        ) from error


def gather_rows(own: Tensor) -> Tensor:
    """The rows (N, ...) of all processes, on the CPU, in the order of ranks; each process may have another number of
    them.
    """
    own = own.cpu()
    if not distributed():
        return own
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    with lost_worker():
        dist.all_gather(lengths, torch.tensor([len(own)]))
    longest = max(int(length) for length in lengths)
    padded = torch.cat([own, own.new_zeros(longest - len(own), *own.shape[1:])])
    parts = [torch.empty_like(padded) for _ in lengths]
    with lost_worker():
        dist.all_gather(parts, padded)
    return torch.cat([part[: int(length)] for part, length in zip(parts, lengths, strict=True)])


def sum_statistics(own: GMMStatistics) -> GMMStatistics:
    """The statistics of the rows of all processes, on the CPU. Exact for statistics that `on_grid` has rounded."""
    return GMMStatistics(
        count=total(own.count),
        sum_x=total(own.sum_x),
        sum_xx=None if own.sum_xx is None else total(own.sum_xx),
        squared_error=total(own.squared_error),
        log_likelihood=total(own.log_likelihood),
        max_posterior=total(own.max_posterior),
    )


def total(own: Tensor) -> Tensor:
    """The sum of the tensors of all processes, on the CPU; a tensor that is there is overwritten."""
    # all_reduce adds memory, so the order of elements in memory must be the same on every rank.
    own = own.cpu().contiguous()
    if distributed():
        with lost_worker():
            dist.all_reduce(own)
    return own


def totals(own: Sequence[Tensor]) -> list[Tensor]:
    """`total` of several tensors of one dtype, sent together."""
    if not own:
        return []
    parts = total(torch.cat([each.flatten() for each in own])).split([each.numel() for each in own])
    return [part.view_as(each) for part, each in zip(parts, own, strict=True)]


def total_rows(own: Tensor) -> Tensor:
    """`total` of matrices (N, D) in which few rows are not zero: only these are sent. On the CPU."""
    own = own.cpu()
    used = own.abs().amax(dim=1).nonzero()[:, 0]
    rows, place = torch.unique(gather_rows(used), return_inverse=True)
    values = gather_rows(own[used])
    result = torch.zeros_like(own)
    result[rows] = values.new_zeros(len(rows), own.shape[1]).index_add_(0, place, values)
    return result


def on_grid(stats: GMMStatistics, rows: int, largest: float) -> GMMStatistics:
    """Rounded so that the sum of such statistics over all `rows` is exact, whatever the order: any number of processes
    gives the same bits.

    Each number becomes a multiple of a power of two below 2^-52 of the largest sum possible, and doubles add such
    numbers without rounding. Elements of the rows are at most `largest`, log-likelihoods 10,000 nats an element.
    """
    dim = stats.sum_x.shape[1]

    def rounded(value: Tensor, bound: float) -> Tensor:
        grid = 2.0 ** (math.frexp(max(bound, 1e-290))[1] - 52)
        return value.div(grid).round_().mul_(grid)

    return GMMStatistics(
        count=rounded(stats.count, 2 * rows),
        sum_x=rounded(stats.sum_x, 2 * rows * largest),
        sum_xx=None if stats.sum_xx is None else rounded(stats.sum_xx, 2 * rows * largest**2),
        squared_error=rounded(stats.squared_error, 8 * rows * dim * largest**2),
        log_likelihood=rounded(stats.log_likelihood, 1e4 * rows * dim),
        max_posterior=rounded(stats.max_posterior, 2 * rows),
    )
