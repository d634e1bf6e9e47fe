"""The means of all levels at once: the joint M-step for given codes.

Level by level (arXiv 2602.12593, section 3) a mean is the best one for the residuals of its own level, as if no level came
after. With the codes c given, x = sum_l mu_l[c_l] + noise is linear in the means of all levels, so the most probable ones
solve a least-squares problem. All it needs of the rows are sums of residuals and counts of pairs of components.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from tokenizer.gmm import Indices, gathered_sums

ROWS_AT_ONCE = 2**18  # whose pairs are sorted: pairs are few, rows need not be


def joint_means(
    residual_sums: Sequence[Tensor], codes: Tensor, means: Sequence[Tensor], anchors: Sequence[Tensor], prior: float, sweeps: int
) -> list[Tensor]:  # fmt: skip
    """By level the means (K, D), float64, of the largest posterior for the given codes (N, L).

    `residual_sums` (K, D) of each level: what the rows of its components leave, summed, under `means` (K, D) of all levels.
    Each mean has a Gaussian prior worth `prior` > 0 rows at its anchor, (K, D) or (1, D) a level; one without rows goes there.

    A sweep solves the normal equations of one level after the other (block Gauss-Seidel); none lowers the posterior.
    """
    levels, k = len(means), means[0].shape[0]
    rows = [torch.bincount(codes[:, level], minlength=k).double()[:, None] for level in range(levels)]  # (K, 1) each
    pairs = {}
    for a, b in combinations(range(levels), 2):
        first, second, together = _pairs(codes[:, a], codes[:, b], k)
        pairs[a, b], pairs[b, a] = (first, second, together), (second, first, together)
    pulls = [prior * (anchor.double() - mean.double()) for anchor, mean in zip(anchors, means, strict=True)]
    moves = [torch.zeros_like(mean, dtype=torch.float64) for mean in means]
    for _ in range(sweeps):
        for level in range(levels):
            left = residual_sums[level].clone()  # (K, D), of rows from which the other levels' moves are taken
            for other in range(levels):
                if other != level:
                    component, others, together = pairs[level, other]
                    left -= gathered_sums(component, others, together, moves[other], k)[1]
            moves[level] = (left + pulls[level]) / (rows[level] + prior)
    return [mean.double() + move for mean, move in zip(means, moves, strict=True)]


def _pairs(a: Tensor, b: Tensor, components: int) -> tuple[Indices, Indices, Tensor]:
    """The pairs of components (M,), (M,) that rows have at two levels, and how many rows have each, float64."""
    parts = [
        torch.unique(some_a.long() * components + some_b, return_counts=True)
        for some_a, some_b in zip(torch.split(a, ROWS_AT_ONCE), torch.split(b, ROWS_AT_ONCE), strict=True)
    ]
    pair, place = torch.unique(torch.cat([part for part, _ in parts]), return_inverse=True)
    count = torch.zeros(len(pair), dtype=torch.float64).index_add_(0, place, torch.cat([n for _, n in parts]).double())
    return (pair // components).numpy(), (pair % components).numpy(), count
