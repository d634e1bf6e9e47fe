"""The means of all levels at once: the joint M-step for given codes, and the refinement of a fit by such steps.

Level by level (arXiv 2602.12593, section 3) a mean is the best one for the residuals of its own level, as if no level
came after. With the codes c given, x = sum_l mu_l[c_l] + noise is linear in the means of all levels, so the most
probable ones solve a least-squares problem. All it needs of the rows are sums of residuals and counts of pairs of
components.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from tokenizer.annealing import PRIOR_ROWS
from tokenizer.collectives import gather_rows, on_grid, sum_statistics
from tokenizer.data import Rows
from tokenizer.gmm import DiagonalGMM, GMMStatistics, spherical_gmm
from tokenizer.iterations import Trace
from tokenizer.kernels import GroupedRows, Indices, parallel_map, squared_norms, sums_by_code
from tokenizer.rqgmm import RQGMM

PAIR_ROWS = 2**18  # rows whose pairs of codes are counted at once: pairs are few, rows need not be
JOINT_SWEEPS = 3  # of block Gauss-Seidel in one joint step; 20 give the same error
JOINT_GAIN = 1e-3  # least relative gain in squared error of a joint step: less is not worth the codes that it moves


def joint_means(
    residual_sums: Sequence[Tensor],
    codes: Tensor,
    means: Sequence[Tensor],
    anchors: Sequence[Tensor],
    prior_rows: float,
    sweeps: int,
) -> list[Tensor]:
    """The means (K, D) of each level, float64, that maximise the posterior for the given codes (N, L).

    Args:
        residual_sums: of each level (K, D): the residuals x - sum_l mu_l[c_l] under `means`, summed by component.
        means: of each level (K, D).
        anchors: of each level (K, D) or (1, D), where its Gaussian prior has its mode; a component without rows goes
            there.
        prior_rows: how many rows the prior is worth, above 0.
        sweeps: each solves the normal equations of one level after the other (block Gauss-Seidel) and never lowers the
            posterior.
    """
    levels, k = len(means), means[0].shape[0]
    count = [torch.bincount(codes[:, level], minlength=k).double()[:, None] for level in range(levels)]  # (K, 1) each
    pairs = {}  # by level and other level: rows of moves of the other level, by component of the level
    for a, b in combinations(range(levels), 2):
        of_a, of_b, together = count_pairs(codes[:, a], codes[:, b], k)
        pairs[a, b] = GroupedRows.of(of_a, of_b, together, k)
        pairs[b, a] = GroupedRows.of(of_b, of_a, together, k)
    pulls = [prior_rows * (anchor.double() - mean.double()) for anchor, mean in zip(anchors, means, strict=True)]
    moves = [torch.zeros_like(mean, dtype=torch.float64) for mean in means]
    for _ in range(sweeps):
        for level in range(levels):
            residual = residual_sums[level].clone()  # (K, D), after the moves of the other levels
            for other in range(levels):
                if other != level:
                    residual -= pairs[level, other].sums(moves[other])
            moves[level] = (residual + pulls[level]) / (count[level] + prior_rows)
    return [mean.double() + move for mean, move in zip(means, moves, strict=True)]


def count_pairs(a: Tensor, b: Tensor, components: int) -> tuple[Indices, Indices, Tensor]:
    """The pairs of codes (M,), (M,) that rows have at two levels, and the number of rows (M,) of each, float64."""
    parts = [
        torch.unique(part_a.long() * components + part_b, return_counts=True)
        for part_a, part_b in zip(torch.split(a, PAIR_ROWS), torch.split(b, PAIR_ROWS), strict=True)
    ]
    pair, index = torch.unique(torch.cat([pair for pair, _ in parts]), return_inverse=True)
    rows = torch.cat([rows for _, rows in parts]).double()
    count = torch.zeros(len(pair), dtype=torch.float64).index_add_(0, index, rows)
    return (pair // components).numpy(), (pair % components).numpy(), count


def level_statistics(source: Rows, levels: Sequence[DiagonalGMM], beam: int) -> tuple[list[GMMStatistics], Tensor]:
    """The codes (N, L) that encode gives the rows of all processes, and by level the statistics under these codes.

    `sum_x` is of the residual after the last level, `squared_error` of the residual after the level itself.
    """
    rqgmm = RQGMM(tuple(levels), beam).to(source.device)
    largest = source.largest + sum(float(gmm.means.abs().amax()) for gmm in levels)

    def encode(rows: Tensor) -> tuple[Tensor, list[GMMStatistics]]:
        codes = rqgmm.encode(rows)
        return codes, [on_grid(stats, source.total, largest) for stats in _block_statistics(rqgmm, rows, codes)]

    codes = torch.empty(source.own, len(levels), dtype=torch.int32)
    totals: list[GMMStatistics] = []
    first = 0
    for block_codes, stats in parallel_map(encode, source, source.device):
        codes[first : first + len(block_codes)] = block_codes
        first += len(block_codes)
        totals = [a + b for a, b in zip(totals, stats, strict=True)] if totals else stats
    if not totals:  # a process without rows
        empty = torch.empty(0, source.dim, device=source.device)
        totals = _block_statistics(rqgmm, empty, rqgmm.encode(empty))
    return [sum_statistics(total) for total in totals], gather_rows(codes)


def _block_statistics(rqgmm: RQGMM, rows: Tensor, codes: Tensor) -> list[GMMStatistics]:
    errors, residual = [], rows
    for level, gmm in enumerate(rqgmm.levels):
        residual = residual - gmm.means[codes[:, level].long()]
        errors.append(squared_norms(residual).double().sum())
    statistics = []
    for level, error in enumerate(errors):
        count, sum_x = sums_by_code(codes[:, level].long(), residual, rqgmm.components)
        no_likelihood = torch.full_like(error, torch.nan)
        statistics.append(GMMStatistics(count, sum_x.double(), None, error, no_likelihood, count.sum()))
    return statistics


def refine_jointly(
    source: Rows, levels: Sequence[DiagonalGMM], beam: int, floor: float, steps: int, trace: Trace
) -> list[DiagonalGMM]:
    """Alternate a joint least-squares update of all means (codes fixed) and re-encoding.

    Stops when the relative gain of a step is below JOINT_GAIN or a component would lose its last row. The prior of a
    mean is one row at its value before the first step; in the last level, whose overfitting no later level can correct,
    one row at the level's mean.
    """
    levels, elements = list(levels), source.total * source.dim

    def spherical(means: Tensor, stats: GMMStatistics) -> DiagonalGMM:
        return spherical_gmm(means.float(), max(float(stats.squared_error) / elements, floor))

    def dead(stats: Sequence[GMMStatistics]) -> int:
        return sum(int((level.count == 0).sum()) for level in stats)

    anchors = [gmm.means.double() for gmm in levels[:-1]]
    stats, codes = level_statistics(source, levels, beam)
    trace.add(0, 0.0, stats[-1], source.total)
    for _ in range(steps):
        means = [gmm.means.double() for gmm in levels]
        last_mean = (stats[-1].sum_x.sum(0) + stats[-1].count @ means[-1]) / source.total  # of what the last level gets
        means = joint_means(
            [level.sum_x for level in stats], codes, means, [*anchors, last_mean[None]], PRIOR_ROWS, JOINT_SWEEPS
        )
        candidates = [spherical(mean, level) for mean, level in zip(means, stats, strict=True)]
        candidate_stats, codes = level_statistics(source, candidates, beam)
        error = float(stats[-1].squared_error)
        gain = error - float(candidate_stats[-1].squared_error)
        if gain <= JOINT_GAIN * error or dead(candidate_stats) > dead(stats):
            break
        levels, stats = candidates, candidate_stats
        trace.add(0, 0.0, stats[-1], source.total)
    return [spherical(gmm.means, level) for gmm, level in zip(levels, stats, strict=True)]
