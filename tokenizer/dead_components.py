"""Components without rows, and the rows they move to."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenizer.collectives import gather_rows
from tokenizer.data import Residuals
from tokenizer.gmm import DiagonalGMM
from tokenizer.kernels import argmax, squared_distances


def reassign_dead_components(gmm: DiagonalGMM, dead: Tensor, residuals: Residuals) -> DiagonalGMM:
    """Move each component that `dead` (K,) marks to a row: those of the largest squared error, distinct ones.

    Returns `gmm` itself where no component is dead or no row is left with an error.
    """
    index = dead.nonzero()[:, 0]
    if not len(index):
        return gmm
    rows, errors = worst_rows(gmm, len(index), residuals)
    rows = rows[errors > residuals.floor]
    if not len(rows):  # fewer distinct rows than components
        return gmm
    means = gmm.means.clone()
    means[index[: len(rows)]] = rows
    return DiagonalGMM(gmm.weights, means, gmm.variances)


def worst_rows(gmm: DiagonalGMM, count: int, residuals: Residuals) -> tuple[Tensor, Tensor]:
    """The `count` distinct residuals (count, D) of all processes with the largest errors (count,), descending."""
    gmm = gmm.to(residuals.device)
    rows, errors = gmm.means.new_empty(0, gmm.dim), gmm.means.new_empty(0)
    for block in residuals:
        error = squared_distances(block, gmm.means, argmax(gmm.log_joint(block)))
        rows, errors = _largest_distinct(torch.cat([rows, block]), torch.cat([errors, error]), count)
    return _largest_distinct(gather_rows(rows), gather_rows(errors), count)


def _largest_distinct(rows: Tensor, errors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of equal rows the first one in the order of errors counts."""
    order = errors.sort(descending=True, stable=True).indices[: 4 * count]
    rows, errors = rows[order], errors[order]
    _, group = torch.unique(rows, dim=0, return_inverse=True)
    groups = int(group.max()) + 1 if len(group) else 0
    first = group.new_full((groups,), len(rows))
    first.scatter_reduce_(0, group, torch.arange(len(rows), device=rows.device), reduce="amin")
    chosen = first.sort().values[:count]
    return rows[chosen], errors[chosen]
