"""How good semantic IDs are: reconstruction, use of the components, collisions, neighbours kept. All global, never per
batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokenizer.rqgmm import RQGMM


@dataclass(frozen=True)
class LevelUsage:
    """How evenly the components of a level are used: `utilization`, `perplexity` (exp entropy / K), `gini` in 0..1."""

    utilization: float
    perplexity: float
    dead: int
    gini: float


@dataclass(frozen=True)
class Quality:
    """`distinct` counts code tuples; `rmse` is per element: sqrt(mean over items and dimensions of squared error)."""

    items: int
    rmse: float
    levels: tuple[LevelUsage, ...]
    distinct: int
    largest_collision: int
    neighbour_recall: float


def level_usage(counts: Tensor) -> tuple[LevelUsage, ...]:
    """Usage of each level from its items per component, `counts` (L, K)."""
    return tuple(_usage(row.double()) for row in counts)


def _usage(count: Tensor) -> LevelUsage:
    k = len(count)
    share = count / count.sum().clamp_min(1)
    entropy = -(share * share.clamp_min(1e-300).log()).sum()
    ranked = count.sort().values  # ascending; Gini from the ordered counts
    gini = (2 * torch.arange(1, k + 1) - k - 1).double() @ ranked / (k * count.sum().clamp_min(1))
    used = int((count > 0).sum())
    return LevelUsage(used / k, float(entropy.exp() / k) if used else 0.0, k - used, float(gini))


def measure_quality(x: Tensor, codes: Tensor, rqgmm: RQGMM, *, neighbour_sample: int = 2000, seed: int = 0) -> Quality:
    """Quality of `codes` (N, L) for `x` (N, D). Neighbour recall is over a seeded sample of items."""
    x_hat = rqgmm.decode(codes)
    counts = torch.stack(
        [torch.bincount(codes[:, level].long(), minlength=rqgmm.components) for level in range(rqgmm.n_levels)]
    )
    groups = torch.unique(codes, dim=0, return_counts=True)[1]
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:neighbour_sample]
    return Quality(
        items=len(x),
        rmse=float((x - x_hat).double().square().mean().sqrt()),
        levels=level_usage(counts),
        distinct=len(groups),
        largest_collision=int(groups.max()),
        neighbour_recall=neighbour_recall(x[chosen], x_hat[chosen]),
    )


def neighbour_recall(x: Tensor, x_hat: Tensor, *, neighbours: int = 10) -> float:
    """Share of each row's exact nearest rows by `x` that are among its nearest by `x_hat` (N, D); 1 for under two rows.

    Rows with equal `x_hat` are equally near; the first ones in order count, as for a ranker.
    """
    k = min(neighbours, len(x) - 1)
    if k < 1:
        return 1.0
    nearest = [_nearest(rows, k) for rows in (x, x_hat)]
    return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(*nearest, strict=True)]))


def _nearest(rows: Tensor, k: int) -> np.ndarray:
    import faiss

    matrix = np.ascontiguousarray(rows.numpy(), np.float32)
    index = faiss.IndexFlatL2(matrix.shape[1])
    index.add(matrix)
    _, near = index.search(matrix, k + 1)
    own = near == np.arange(len(near))[:, None]
    own[~own.any(1), -1] = True  # among many equal rows the row itself may not be listed: drop the last instead
    others: np.ndarray = near[~own].reshape(len(near), k)
    return others
