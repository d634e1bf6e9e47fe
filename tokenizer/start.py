"""Where the fit of a level starts: distinct rows, and the largest eigenvalue of their covariance."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenizer.kernels import one_thread

SAMPLE_ROWS = 20_000  # residuals that the start is taken from
EIGENVALUE_ROWS = 8192  # of them, for the covariance


def distinct_rows(rows: Tensor, components: int, seed: int) -> Tensor:
    """(K, D): random rows (N, D), distinct where there are as many distinct ones; else repeats, which stay without
    rows.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = rows[torch.randperm(len(rows), generator=generator)]
    start = shuffled[:components]
    if len(torch.unique(start, dim=0)) < components:
        distinct = torch.unique(shuffled, dim=0)
        distinct = distinct[torch.randperm(len(distinct), generator=generator)]
        start = distinct[torch.arange(components) % len(distinct)]
    return start.clone()


def largest_eigenvalue(rows: Tensor, mean: Tensor) -> float:
    """lambda_max of the covariance of rows (N, D) about `mean` (D,)."""
    centred = rows[:: max(1, len(rows) // EIGENVALUE_ROWS)] - mean.float()
    with one_thread():
        return float(torch.linalg.eigvalsh(centred.T @ centred / len(centred))[-1])
