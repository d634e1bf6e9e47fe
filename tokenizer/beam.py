"""Beam search over tuples of codes.

The model of a row with its codes c is p(x, c) = prod_l pi_c_l * N(x | sum_l mu_c_l, var_c_L): the weights along the
path times the density of what the last level leaves. A beam keeps the most probable paths from level to level by the
same rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenizer.errors import DataError
from tokenizer.gmm import DiagonalGMM
from tokenizer.kernels import top_k

NOT_FINITE = (
    "embeddings hold NaN, Inf or numbers too large for float32; expected finite ones. Reject such rows when loading"
)


def check_finite(scores: Tensor) -> None:
    if not math.isfinite(float(scores.double().sum())):
        raise DataError(NOT_FINITE)


def path_log_weights(levels: Sequence[DiagonalGMM], codes: Tensor) -> Tensor:
    """(...): sum_l log pi_c_l of codes (..., L) under the first L levels."""
    total = torch.zeros(codes.shape[:-1], device=codes.device)
    for level, gmm in zip(range(codes.shape[-1]), levels, strict=False):
        total = total + gmm.weights.log()[codes[..., level].long()]
    return total


def beam_step(
    above: Sequence[DiagonalGMM], gmm: DiagonalGMM, residual: Tensor, codes: Tensor, beam: int
) -> tuple[Tensor, Tensor]:
    """The `beam` most probable ways to go on from the paths of each row by a component of `gmm`; the lowest index wins
    a tie.

    residual (n, paths, D) and codes (n, paths, levels above) in and out, the best path first.
    """
    n, paths, d = residual.shape
    log_joint = gmm.log_joint(residual.reshape(-1, d)).view(n, paths, -1)
    log_joint += path_log_weights(above, codes)[:, :, None]
    scores = log_joint.view(n, -1)  # (n, paths K)
    index = top_k(scores, min(beam, scores.shape[1]))  # (n, kept)
    check_finite(scores.gather(1, index[:, :1]))
    path, code = index // gmm.components, index % gmm.components
    codes = codes.gather(1, path[:, :, None].expand(-1, -1, codes.shape[2]))
    if paths > 1:
        residual = residual.gather(1, path[:, :, None].expand(-1, -1, d))
    return residual - gmm.means[code], torch.cat([codes, code[:, :, None].int()], dim=2)


def beam_search(levels: Sequence[DiagonalGMM], x: Tensor, beam: int) -> Tensor:
    """codes (N, L) int32 of the most probable path that was kept to the end, of rows x (N, D)."""
    residual = x[:, None, :]  # (N, paths, D)
    codes = residual.new_zeros(len(x), 1, 0, dtype=torch.int32)  # (N, paths, levels so far)
    for level, gmm in enumerate(levels):
        last = level == len(levels) - 1
        residual, codes = beam_step(levels[:level], gmm, residual, codes, 1 if last else beam)
    return codes[:, 0]
