"""The means of all levels at once: what a joint M-step finds when the codes of the rows are given.

A level is fitted to the residuals of its own level alone (arXiv 2602.12593, section 3), as if nothing came after it. With
the codes c given, x = sum_l mu_l[c_l] + noise is linear in the means of all levels, and the most probable ones are the
solution of a least-squares problem, of which residual sums and counts of pairs of components are all that it needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tokenizer.gmm import Indices, gathered_sums


def joint_means(
    residual_sums: Sequence[Tensor],
    codes: Tensor,
    means: Sequence[Tensor],
    anchors: Sequence[Tensor],
    prior: float,
    sweeps: int,
) -> list[Tensor]:
    """Means (K, D) float64 of each level: the posterior mode for the given codes (N, L), in `sweeps` over the levels.

    `residual_sums` (K, D) of each level: what the rows of each component have left under `means`. Every mean has a prior of
    `prior` rows at its anchor, a (K, D) or (1, D) tensor. A sweep solves the normal equations of a level with the others held
    (block Gauss-Seidel), so none leads away from the optimum, and a component without rows goes to its anchor.
    """
    levels, k = len(means), means[0].shape[0]
    own = [torch.from_numpy(np.bincount(codes[:, level], minlength=k)).double()[:, None] for level in range(levels)]
    pairs = {(a, b): _pairs(codes, a, b, k) for a in range(levels) for b in range(levels) if a != b}
    moves = [torch.zeros_like(mean, dtype=torch.float64) for mean in means]
    pulls = [prior * (anchor.double() - mean.double()) for anchor, mean in zip(anchors, means, strict=True)]
    for _ in range(sweeps):
        for level in range(levels):
            left = residual_sums[level].clone()
            for other in range(levels):
                if other != level:
                    component, row, together = pairs[level, other]
                    left -= gathered_sums(component, row, together, (moves[other],), k)[1]
            moves[level] = (left + pulls[level]) / (own[level] + prior)
    return [mean.double() + move for mean, move in zip(means, moves, strict=True)]


def _pairs(codes: Tensor, a: int, b: int, components: int) -> tuple[Indices, Indices, Tensor]:
    """The pairs of components that rows have at two levels, and the number of rows of each pair, float64."""
    pair, count = np.unique(codes[:, a].numpy().astype(np.int64) * components + codes[:, b].numpy(), return_counts=True)
    return pair // components, pair % components, torch.from_numpy(count).double()
