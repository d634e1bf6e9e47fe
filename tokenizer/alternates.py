"""Soft semantic IDs: the most probable codes of each level with weights, and the temperatures that set the weights.

In hundreds of dimensions the posterior of a level is one-hot. Divided by a temperature T, the log-joint ranks
components as before and weights them softly: w_k = softmax_k(log p(r, k) / T) over the codes that are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokenizer.gmm import DiagonalGMM
from tokenizer.kernels import one_thread, pieces, top_k

ALTERNATES = 8  # codes a level for which the temperatures are calibrated
FULL_WEIGHT = 255  # what the weights of a level sum to
CALIBRATION_ROWS = 4096  # of the fit, evenly spread, at least where there are as many
TEMPERATURES = tuple(float(np.float32(2 ** (step / 4))) for step in range(-16, 57))  # tried: 1/16 to 16,384


@dataclass(frozen=True, eq=False)
class Alternates:
    """The soft semantic IDs of N rows: at each level the code of the semantic ID and the m - 1 most probable others.

    Attributes:
        codes: (N, L, m) int32; the code of the semantic ID first, then the others, the most probable first.
        weights: (N, L, m) uint8, in 1/255; they sum to 255 at each level.
    """

    codes: Tensor
    weights: Tensor


def level_alternates(scores: Tensor, code: Tensor, top: int, temperature: float | None) -> tuple[Tensor, Tensor]:
    """codes (n, m) int32 and weights (n, m) uint8 of one level, from its scores (n, K) and the codes (n,) of the
    semantic IDs.

    First `code`, then the `top` - 1 most probable others in descending order; the lowest index wins a tie. Without a
    temperature `code` has all the weight.
    """
    listed = top_k(scores, min(top, scores.shape[1]))  # (n, m)
    given = (listed[:, 0] != code).nonzero()[:, 0]  # not the most probable: kept from before, or of a beam's path
    if len(given):
        own = listed[given] == code[given, None]
        own[~own.any(1), -1] = True
        ranked = torch.where(own, code[given, None], listed[given])
        listed[given] = ranked.gather(1, (~own).byte().argsort(dim=1, stable=True))
    if temperature is None:
        weights = torch.zeros(listed.shape, dtype=torch.uint8, device=listed.device)
        weights[:, 0] = FULL_WEIGHT
        return listed.int(), weights
    share = (scores.gather(1, listed).double() / temperature).softmax(dim=1)
    return listed.int(), rounded(share)


def rounded(share: Tensor) -> Tensor:
    """Shares (n, m) that sum to 1 as uint8 that sum to 255, by largest remainder; ties go to the first."""
    exact = share * FULL_WEIGHT
    whole = exact.floor()
    missing = FULL_WEIGHT - whole.sum(1, keepdim=True)  # (n, 1), units left
    by_remainder = (whole - exact).argsort(dim=1, stable=True)
    rank = by_remainder.argsort(dim=1)
    return (whole + (rank < missing)).to(torch.uint8)


# ---- calibration ----


def calibrated(
    levels: Sequence[DiagonalGMM], x: Tensor, codes: Tensor, rows: int, prior_rows: float
) -> tuple[float, ...]:
    """The temperature of each level at which soft IDs reconstruct rows best that the means have not seen.

    It minimises the mean over rows of |r - sum_k w_k mu_k|^2 over TEMPERATURES; r is the residual, and k runs over the
    code of the row and its ALTERNATES - 1 most probable others. A row of the fit has pulled the mean of its own
    component towards itself, so that mean is taken without the row (leave-one-out): of n_k rows and a prior of a rows,
    r - mu_k becomes (r - mu_k)(1 + 1 / (n_k + a - 1)). With a = 1, in a component of 4 rows a row at distance 1 counts
    as at 1.25. A row that is alone in its component and has no prior counts as one of two. A higher temperature mixes
    in components that are too far away; a lower one ignores where in its cell a row lies.

    Args:
        levels: the fitted levels.
        x: (N, D) rows of the fit, evenly spread.
        codes: (N, L) their codes.
        rows: of the fit, all of which the means rest on.
        prior_rows: a, see `gmm.update_means`.
    """
    with one_thread():
        residual, found = x, []
        for gmm, code in zip(levels, codes.long().T, strict=True):
            count = torch.bincount(code, minlength=gmm.components)[code] * (rows / len(x))
            found.append(_best_temperature(*_left_out(gmm, residual, code, count + prior_rows)))
            residual = residual - gmm.means[code]
    return tuple(found)


def _left_out(gmm: DiagonalGMM, residual: Tensor, code: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Log-joints (n, m) of the ALTERNATES of each row and products (n, m, m) of r - mu_j and r - mu_k, float64, both
    with the mean of the own code, which rests on `count` (n,) rows, taken without the row.
    """
    log_joints, products = [], []
    first = 0
    for r in pieces(residual, ALTERNATES * gmm.components):
        rows = slice(first, first := first + len(r))
        scores, own = gmm.log_joint(r), code[rows]
        listed = level_alternates(scores, own, ALTERNATES, None)[0].long()  # (n, m), the own code first
        away = r[:, None] - gmm.means[listed]  # (n, m, D)
        growth = 1 + 1 / (count[rows, None] - 1).clamp_min(1)  # (n, 1)
        mahalanobis = (away[:, 0].square() / gmm.variances[own]).sum(1)
        log_joint = scores.gather(1, listed)
        log_joint[:, 0] -= (growth[:, 0].square() - 1) * mahalanobis / 2
        away[:, 0] *= growth
        log_joints.append(log_joint.double())
        products.append((away @ away.transpose(1, 2)).double())
    return torch.cat(log_joints), torch.cat(products)


def _best_temperature(log_joint: Tensor, products: Tensor) -> float:
    """The one of TEMPERATURES with the least squared error of all rows: among every fourth, then between its
    neighbours.
    """

    def error(place: int) -> float:
        weights = (log_joint / TEMPERATURES[place]).softmax(dim=1)  # (n, m)
        # As the weights sum to 1, |r - sum_k w_k mu_k|^2 = sum_jk w_j w_k (r - mu_j) . (r - mu_k).
        return float(((products @ weights[:, :, None])[..., 0] * weights).sum())

    coarse = min(range(0, len(TEMPERATURES), 4), key=error)
    return TEMPERATURES[min(range(max(0, coarse - 3), min(coarse + 4, len(TEMPERATURES))), key=error)]


def temperature_problem(temperatures: tuple[float, ...], levels: int) -> str:
    """What is wrong with the temperatures of a model; empty where nothing is."""
    if temperatures and len(temperatures) != levels:
        return f"{len(temperatures)} temperatures for {levels} levels; expected one a level, or none"
    if not all(math.isfinite(value) and value > 0 for value in temperatures):
        return f"temperatures are {temperatures}; expected finite numbers above 0"
    return ""
