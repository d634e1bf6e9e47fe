"""The scores of a row at each level on the greedy path: by its residuals, or without them if levels are spherical."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

from torch import Tensor

from tokenizer.gmm import DiagonalGMM
from tokenizer.kernels import add_rows, linear, squared_norms


class ResidualPath:
    """Of any mixtures: subtract the mean of the code, score what is left by the next level."""

    def __init__(self, levels: Sequence[DiagonalGMM], x: Tensor) -> None:
        self.levels, self.level, self.residual = levels, 0, x

    def scores(self) -> Tensor:
        """(n, K): the log-joint of this level."""
        return self.levels[self.level].log_joint(self.residual)

    def row_term(self) -> Tensor:
        """(n,): what `scores` leaves out of the log-joint of this level."""
        return self.residual.new_zeros(len(self.residual))

    def choose(self, code: Tensor, scores: Tensor) -> None:
        """Go on to the next level by the component `code` (n,), whose scores are (n,)."""
        gmm, self.level = self.levels[self.level], self.level + 1
        if self.level < len(self.levels):
            self.residual = self.residual - gmm.means[code]


class SphericalTables:
    """What spherical levels need instead of residuals: the scores of a mean mu_j of a level above under each component.

    With s_k = x . mu_k / var + constant_k the scores of a row, those of its residual are s_k - sum_j mu_j . mu_k / var:
    a product of the row itself, and one row of a table (K, K) for each level above.
    """

    def __init__(self, levels: Sequence[DiagonalGMM]) -> None:
        self.levels = levels
        self.tables = [  # of each level, for each level above it, (K, K) with the sign of the correction
            [-(above.means.double() @ gmm.coefficients[0].double().T).float() for above in levels[:level]]
            for level, gmm in enumerate(levels)
        ]
        # Of each level log pi - D log(2 pi var) / 2: its log-joint at a mean.
        self.log_norms = [
            math.log(float(gmm.weights[0])) - 0.5 * gmm.dim * math.log(2 * math.pi * float(gmm.variances[0, 0]))
            for gmm in levels
        ]

    @staticmethod
    def exact_enough(levels: Sequence[DiagonalGMM]) -> bool:
        """Levels are spherical, and no residual is so small beside the means that the difference loses its digits."""
        smallest = 1e-3 * float(levels[0].means.square().mean())
        return all(gmm.variance is not None and gmm.variance >= smallest and gmm.origin is None for gmm in levels)


class SphericalPath:
    """`ResidualPath` of spherical levels without residuals: the same but for rounding, with less memory traffic."""

    def __init__(self, tables: SphericalTables, x: Tensor) -> None:
        self.tables, self.x = tables, x
        self.codes: list[Tensor] = []  # of the levels above
        self._explained = x.new_zeros(len(x))  # |x|^2 - |residual|^2

    @cached_property
    def _squares(self) -> Tensor:
        return squared_norms(self.x)

    @property
    def _gmm(self) -> DiagonalGMM:
        return self.tables.levels[len(self.codes)]

    def scores(self) -> Tensor:
        """(n, K): the log-joint of this level without its row term, which no argmax or posterior needs."""
        slope, _, constant = self._gmm.coefficients
        scores = linear(self.x, slope, constant)
        for code, table in zip(self.codes, self.tables.tables[len(self.codes)], strict=True):
            add_rows(scores, table, code)
        return scores

    def row_term(self) -> Tensor:
        """(n,): -|residual|^2 / (2 variance)."""
        assert self._gmm.variance is not None
        return (self._squares - self._explained).clamp_min(0) / (-2 * self._gmm.variance)

    def choose(self, code: Tensor, scores: Tensor) -> None:
        variance, log_norm = self._gmm.variance, self.tables.log_norms[len(self.codes)]
        assert variance is not None
        # |r|^2 - |r - mu|^2 = 2 r . mu - |mu|^2 = 2 var (score - log_norm)
        self._explained.add_(scores - log_norm, alpha=2 * variance)
        self.codes.append(code)
