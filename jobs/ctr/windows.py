"""Sums over many windows of one sequence, each element read once: the cost does not depend on the windows' length."""

from __future__ import annotations

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
    running = torch.cat([sums.new_zeros(n, 1, w * v, dtype=torch.float64), sums.double().cumsum(1)], dim=1)
    until = torch.cat([ends.new_zeros(1), ends])[at]  # blocks before each end of a window
    start, stop = until.split(len(first))
    return (running[:, stop] - running[:, start]).to(values.dtype).view(n, len(first), w, v)
