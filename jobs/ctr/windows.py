"""Sums over many windows of one sequence, each element read once: the cost does not depend on the windows' length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def window_sums(weights: Tensor, values: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """`sum of weights[n, m, w] * values[n, m, v] over first[q] <= m < last[q]` for each window q.

    The sequence is cut at all ends of windows, so that a window is a run of whole segments. The sums of segments are
    accumulated in float64: a window that is the difference of two long sums is as precise as one summed alone. Segments
    are cut into blocks of about their mean length, which one batched product sums; at most half of what it reads is
    padding.

    Args:
        weights: (N, M, W) float.
        values: (N, M, V) float.
        first, last: (Q,) int64, 0 <= first <= last <= M.

    Returns:
        (N, Q, W, V), of the dtype of `values`.
    """
    edges, at = torch.unique(torch.cat([first, last]), return_inverse=True)
    segments = edges.diff()
    if not len(segments):  # every window is empty
        return values.new_zeros(len(values), len(first), weights.shape[2], values.shape[2])
    size = -(-int(edges[-1] - edges[0]) // len(segments))
    blocks = -(-segments // size)  # of each segment
    ends = blocks.cumsum(0)
    segment = torch.repeat_interleave(torch.arange(len(segments), device=edges.device), blocks)
    block = torch.arange(len(segment), device=edges.device) - (ends - blocks)[segment]  # within its segment
    element = (edges[segment] + block * size)[:, None] + torch.arange(size, device=edges.device)
    used = element < edges[segment + 1][:, None]
    element = element.where(used, edges[0])
    n, _, w = weights.shape
    v = values.shape[2]
    left = torch.where(used[..., None], weights[:, element], 0.0).flatten(0, 1)  # (N * blocks, size, W)
    right = values[:, element].flatten(0, 1)
    sums = torch.bmm(left.mT, right).view(n, len(segment), w * v)
    until = torch.cat([ends.new_zeros(1), ends])[at]  # blocks before each end of a window
    return _RunSums.apply(sums, *until.split(len(first))).view(n, len(first), w, v)  # type: ignore[no-any-return, no-untyped-call]


class _RunSums(torch.autograd.Function):
    """Sums (N, B, C) of blocks -> sums (N, Q, C) over the runs [start, stop) of blocks, by running sums in float64.

    Torch's own gradient of a running sum reverses it twice. This one needs a running sum only: of a block it is the sum
    of the gradients of the runs that have begun and not ended.
    """

    @staticmethod
    def forward(ctx: Any, sums: Tensor, start: Tensor, stop: Tensor) -> Tensor:
        ctx.save_for_backward(start, stop)
        ctx.shape, ctx.dtype = sums.shape, sums.dtype
        running = sums.new_zeros(sums.shape[0], sums.shape[1] + 1, sums.shape[2], dtype=torch.float64)
        running[:, 1:] = sums
        running.cumsum_(1)
        return (running[:, stop] - running[:, start]).to(sums.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        start, stop = ctx.saved_tensors
        n, blocks, c = ctx.shape
        change = gradient.new_zeros(n, blocks + 1, c, dtype=torch.float64)
        change.index_add_(1, start, gradient.double()).index_add_(1, stop, gradient.double(), alpha=-1)
        return change.cumsum_(1)[:, :-1].to(ctx.dtype), None, None
