"""One mixture of Gaussians with diagonal covariance: density, E-step, statistics, M-step.

RQ-GMM (arXiv 2602.12593, section 3) fits one per level; equation numbers are of Bishop, PRML, section 9.2.
Notation is in tokenizer/README.md: N rows, D dimensions, K components.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tokenizer.errors import DataError

LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class DiagonalGMM:
    """weights (K,), means (K, D), variances (K, D); float32. An unfitted or degenerate one cannot be built."""

    weights: Tensor
    means: Tensor
    variances: Tensor

    def __post_init__(self) -> None:
        k, d = self.means.shape
        if self.weights.shape != (k,) or self.variances.shape != (k, d):
            raise DataError(
                f"weights {tuple(self.weights.shape)}, means {tuple(self.means.shape)}, variances {tuple(self.variances.shape)} "
                "do not fit together; expected (K,), (K, D), (K, D)"
            )
        if not (
            torch.isfinite(self.means).all() and torch.isfinite(self.variances).all() and (self.variances > 0).all()
        ):
            raise DataError(
                "means and variances must be finite and variances above 0; was the mixture fitted on NaN, Inf or huge values?"
            )

    @property
    def components(self) -> int:
        return self.means.shape[0]

    @property
    def dim(self) -> int:
        return self.means.shape[1]

    @cached_property
    def tied(self) -> bool:
        """All components share one variance per dimension; then the log-joint costs one matrix product, not two."""
        return bool((self.variances == self.variances[:1]).all())

    @cached_property
    def _shift(self) -> Tensor | None:
        """Where the means lie far from zero compared with their spread, products with them lose digits: work around their centre."""
        centre = self.means.double().mean(0)
        return centre.float() if centre.square().sum() > 100 * self.variances.double().mean(0).sum() else None

    @cached_property
    def _linear(self) -> tuple[Tensor, Tensor, Tensor]:
        """Coefficients of the log-joint: `x @ slope.T - x^2 @ half_precision.T + intercept`."""
        means = (self.means - self._shift if self._shift is not None else self.means).double()
        precision = 1 / self.variances.double()
        log_norm = -0.5 * (self.variances.double().log().sum(1) + self.dim * LOG_2PI)
        intercept = self.weights.double().log() + log_norm - 0.5 * (means.square() * precision).sum(1)
        return (means * precision).float(), (0.5 * precision).float(), intercept.float()

    def affinity(self, x: Tensor) -> Tensor:
        """(N, K): the log-joint up to a term of each row, which changes neither argmax nor posterior."""
        slope, half_precision, intercept = self._linear
        if self._shift is not None:
            x = x - self._shift
        score = torch.addmm(intercept, x, slope.T)
        return score if self.tied else score.addmm_(x.square(), half_precision.T, alpha=-1)

    def row_term(self, x: Tensor) -> Tensor:
        """(N,): what `affinity` leaves out of the log-joint."""
        if not self.tied:
            return x.new_zeros(len(x))
        if self._shift is not None:
            x = x - self._shift
        return -(x.square() @ self._linear[1][0])

    def log_joint(self, x: Tensor) -> Tensor:
        """(N, K): log pi_k + log N(x_n | mu_k, diag var_k)."""
        return self.affinity(x) + self.row_term(x)[:, None]

    def responsibilities(self, x: Tensor) -> Tensor:
        """(N, K): p(k | x_n), rows sum to 1 (PRML eq. 9.23)."""
        return self.affinity(x).softmax(dim=1)


@dataclass(frozen=True, eq=False)
class GMMStatistics:
    """What an M-step needs of the data; float64. Statistics of disjoint rows add."""

    count: Tensor  # (K,)    sum_n gamma_nk
    sum_x: Tensor  # (K, D)  sum_n gamma_nk x_n
    sum_xx: Tensor | None  # (K, D)  sum_n gamma_nk x_n^2, where asked for
    log_likelihood: Tensor  # ()  sum_n log p(x_n)
    squared_error: Tensor  # ()  sum_n |x_n - mu_code(n)|^2

    def __add__(self, other: GMMStatistics) -> GMMStatistics:
        both = None if self.sum_xx is None or other.sum_xx is None else self.sum_xx + other.sum_xx
        return GMMStatistics(
            self.count + other.count,
            self.sum_x + other.sum_x,
            both,
            self.log_likelihood + other.log_likelihood,
            self.squared_error + other.squared_error,
        )


def e_step(gmm: DiagonalGMM, x: Tensor, *, temperature: float = 1.0, second_moments: bool = True) -> GMMStatistics:
    """Expected counts and moments of `x` (N, D) under `gmm` (PRML eq. 9.23, 9.28), annealed by `temperature`.

    Responsibilities are softmax(log-joint / temperature) (deterministic annealing, Rose 1998); temperature 0 means
    one-hot (classification EM). Products of a block are float32, their sums over blocks float64.
    """
    affinity = gmm.affinity(x)  # (N, K)
    row_term = gmm.row_term(x)  # (N,)
    best, code = affinity.max(dim=1)  # (N,), (N,)
    log_likelihood = (affinity.logsumexp(dim=1) + row_term).double().sum()
    squared_error = (x - gmm.means[code]).double().square().sum()
    if temperature > 0:
        resp = affinity.sub_(best[:, None]).div_(temperature).exp_()
        resp /= resp.sum(dim=1, keepdim=True)
        count, sum_x = resp.sum(0), resp.T @ x
        sum_xx = resp.T @ x.square() if second_moments else None
    else:
        count = torch.bincount(code, minlength=gmm.components)
        sum_x = x.new_zeros(gmm.means.shape).index_add_(0, code, x)
        sum_xx = x.new_zeros(gmm.means.shape).index_add_(0, code, x.square()) if second_moments else None
    return GMMStatistics(
        count.double(), sum_x.double(), None if sum_xx is None else sum_xx.double(), log_likelihood, squared_error
    )


def m_step(
    stats: GMMStatistics, previous: DiagonalGMM, *, shrinkage: float, fitted_weights: bool, floor: float
) -> DiagonalGMM:
    """Weights, means and variances from the statistics (PRML eq. 9.24-9.26).

    `shrinkage` s pulls each variance to the mean variance of the level: (1 - s) var_k + s mean; 1 gives one variance for
    all, 0 the paper's model. Weights are flat unless fitted. A component without rows keeps its mean.
    """
    if stats.sum_xx is None:
        raise ValueError("the M-step of variances needs second moments; call e_step(second_moments=True)")
    used = stats.count > 0
    count = stats.count.clamp_min(torch.finfo(torch.float64).tiny)[:, None]  # (K, 1)
    means = torch.where(used[:, None], stats.sum_x / count, previous.means.double())
    variances = (stats.sum_xx / count - means.square()).clamp_min(0)  # (K, D)
    within = (stats.sum_xx[used] - stats.count[used, None] * means[used].square()).sum() / (
        stats.count.sum() * means.shape[1]
    )
    within = within.clamp_min(floor)
    variances = torch.where(used[:, None], variances, within)
    variances = ((1 - shrinkage) * variances + shrinkage * within).clamp_min(floor)
    k = len(stats.count)
    weights = (stats.count + 1e-3) / (stats.count + 1e-3).sum() if fitted_weights else torch.full((k,), 1 / k)
    return DiagonalGMM(weights.float(), means.float(), variances.float())


def with_means(sums: GMMStatistics, previous: DiagonalGMM) -> DiagonalGMM:
    """`previous` with the means moved to their rows' mean; the step of annealing, where variances are held."""
    used = sums.count > 1e-6
    means = torch.where(used[:, None], sums.sum_x / sums.count.clamp_min(1e-6)[:, None], previous.means.double())
    return DiagonalGMM(previous.weights, means.float(), previous.variances)


def isotropic(means: Tensor, variance: float) -> DiagonalGMM:
    """Flat weights and one variance for every component and dimension."""
    k = len(means)
    return DiagonalGMM(torch.full((k,), 1 / k), means, torch.full_like(means, variance))
