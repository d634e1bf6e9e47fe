"""A mixture of Gaussians with diagonal covariances: density, E-step, statistics, M-step.

RQ-GMM (arXiv 2602.12593, section 3) fits one per level. Equation numbers are those of Bishop, PRML, chapter 9.
N rows, D dimensions, K components; a table of the symbols is in tokenizer/README.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tokenizer.errors import DataError
from tokenizer.kernels import (
    argmax,
    linear,
    responsibilities,
    squared_distances,
    squared_norms,
    sums_by_code,
    values_at,
    weighted_squares,
)

TRUNCATION = 1e-5  # responsibilities below this share of their row's largest may be set to zero
WEIGHT_SMOOTHING = 1e-3  # rows added to each component's count, so that no weight is zero


@dataclass(frozen=True, eq=False)
class DiagonalGMM:
    """weights (K,), means (K, D), variances (K, D), float32."""

    weights: Tensor
    means: Tensor
    variances: Tensor

    def __post_init__(self) -> None:
        k, d = self.means.shape
        if self.weights.shape != (k,) or self.variances.shape != (k, d):
            raise DataError(
                f"weights {tuple(self.weights.shape)}, means {tuple(self.means.shape)}, variances "
                f"{tuple(self.variances.shape)} do not fit together; expected (K,), (K, D), (K, D)"
            )
        smallest, _ = self.variances.aminmax()  # NaN if there is one
        if not (self.means.isfinite().all() and self.variances.isfinite().all() and smallest > 0):
            raise DataError(
                "means and variances must be finite and variances above 0; was the mixture fitted on NaN, Inf or huge "
                "values?"
            )

    @property
    def components(self) -> int:
        return self.means.shape[0]

    @property
    def dim(self) -> int:
        return self.means.shape[1]

    def to(self, device: torch.device) -> DiagonalGMM:
        """On another device; itself where it is there already."""
        means = self.means.to(device)
        return self if means is self.means else DiagonalGMM(self.weights.to(device), means, self.variances.to(device))

    @cached_property
    def tied(self) -> bool:
        """All components have the same variances."""
        return bool((self.variances == self.variances[:1]).all())

    @cached_property
    def variance(self) -> float | None:
        """The variance of every component and dimension, where they are all equal and the weights too; else None."""
        spherical = (self.variances == self.variances[0, 0]).all() and (self.weights == self.weights[0]).all()
        return float(self.variances[0, 0]) if spherical else None

    @cached_property
    def origin(self) -> Tensor | None:
        """(D,): where the means lie far from zero compared with their spread, their centre, else None.

        The products of `log_joint` would lose their digits there; they are taken of x - origin.
        """
        centre = self.means.double().mean(0)
        return centre.float() if centre.square().sum() > 100 * self.variances.double().mean(0).sum() else None

    @cached_property
    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """The log-joint as a polynomial: slope (K, D), quadratic (K, D) and constant (K,).

        log pi_k + log N(x | mu_k, var_k) = constant_k + sum_d (slope_kd x_d + quadratic_kd x_d^2)
            slope = mu / var, quadratic = -1 / (2 var), constant = log pi - sum_d (log(2 pi var_d) + mu_d^2 / var_d) / 2

        `quadratic` is (1, D) if the components share it. Computed in float64, returned in float32.
        """
        means = (self.means - self.origin if self.origin is not None else self.means).double()
        variances = (self.variances[:1] if self.tied else self.variances).double()
        log_norm = (2 * math.pi * variances).log().sum(1)
        constant = self.weights.double().log() - 0.5 * (log_norm + (means.square() / variances).sum(1))
        return (means / variances).float(), (-0.5 / variances).float(), constant.float()

    def log_joint(self, x: Tensor) -> Tensor:
        """(N, K): log pi_k + log N(x_n | mu_k, diag(var_k)) (PRML eq. 9.7, logarithm of the summand)."""
        slope, quadratic, constant = self.coefficients
        x = x - self.origin if self.origin is not None else x
        log_joint = linear(x, slope, constant)
        if self.variance is not None:
            return log_joint.add_(squared_norms(x).mul_(-0.5 / self.variance)[:, None])
        return log_joint.add_(weighted_squares(x, quadratic))

    def log_likelihood(self, x: Tensor) -> Tensor:
        """(N,): log p(x_n) = log sum_k pi_k N(x_n | mu_k, diag(var_k)) (PRML eq. 9.14)."""
        return self.log_joint(x).logsumexp(dim=1)

    def responsibilities(self, x: Tensor) -> Tensor:
        """(N, K): gamma_nk = p(k | x_n); rows sum to 1 (PRML eq. 9.13)."""
        return self.log_joint(x).softmax(dim=1)


def spherical_gmm(means: Tensor, variance: float) -> DiagonalGMM:
    """Flat weights, and one variance for every component and dimension."""
    k = len(means)
    return DiagonalGMM(torch.full((k,), 1 / k), means, torch.full_like(means, variance))


@dataclass(frozen=True, eq=False)
class GMMStatistics:
    """What an M-step needs of the rows, float64. The statistics of disjoint rows add."""

    count: Tensor  # (K,)    N_k = sum_n gamma_nk
    sum_x: Tensor  # (K, D)  sum_n gamma_nk x_n
    sum_xx: Tensor | None  # (K, D)  sum_n gamma_nk x_n^2; None where variances are not fitted
    squared_error: Tensor  # ()  sum_nk gamma_nk |x_n - mu_k|^2
    log_likelihood: Tensor  # ()  sum_n log p(x_n)
    max_posterior: Tensor  # ()  sum_n max_k gamma_nk

    def __add__(self, other: GMMStatistics) -> GMMStatistics:
        return GMMStatistics(
            count=self.count + other.count,
            sum_x=self.sum_x + other.sum_x,
            sum_xx=None if self.sum_xx is None or other.sum_xx is None else self.sum_xx + other.sum_xx,
            squared_error=self.squared_error + other.squared_error,
            log_likelihood=self.log_likelihood + other.log_likelihood,
            max_posterior=self.max_posterior + other.max_posterior,
        )


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """(): sum_kd a_kd b_kd; by rows first, so that the rounding does not depend on the number of threads."""
    return (a * b).sum(1).sum()


def expected_squared_error(gmm: DiagonalGMM, x: Tensor, count: Tensor, sum_x: Tensor) -> Tensor:
    """(): sum_nk gamma_nk |x_n - mu_k|^2 = sum_n |x_n|^2 - 2 sum_k mu_k . (sum_n gamma_nk x_n) + sum_k N_k |mu_k|^2."""
    means = gmm.means.double()
    if gmm.origin is not None:
        x, means, sum_x = x - gmm.origin, means - gmm.origin, sum_x - count[:, None] * gmm.origin
    error = squared_norms(x).double().sum() - 2 * inner_product(means, sum_x) + count @ means.square().sum(1)
    return error.clamp_min(0)


def e_step(
    gmm: DiagonalGMM, x: Tensor, *, second_moments: bool = True, truncation: float = TRUNCATION
) -> GMMStatistics:
    """Expected statistics of the rows x (N, D) under the responsibilities (PRML eq. 9.13, 9.18)."""
    resp = responsibilities(gmm.log_joint(x), truncation, gmm.dim)  # (N, K)
    sum_x = resp.weighted_sums(x).double()  # (K, D)
    return GMMStatistics(
        count=resp.count,
        sum_x=sum_x,
        sum_xx=resp.weighted_squares(x).double() if second_moments else None,
        squared_error=expected_squared_error(gmm, x, resp.count, sum_x),
        log_likelihood=resp.log_evidence.double().sum(),
        max_posterior=resp.max_posterior.double().sum(),
    )


def hard_e_step(gmm: DiagonalGMM, x: Tensor) -> GMMStatistics:
    """The E-step of classification EM (Celeux and Govaert 1992): gamma is 1 for the most probable component, else 0.

    The log-likelihood is that of the rows with their components, sum_n max_k log p(x_n, k). Without second moments.
    """
    log_joint = gmm.log_joint(x)  # (N, K)
    code = argmax(log_joint)  # (N,)
    count, sum_x = sums_by_code(code, x, gmm.components)
    return GMMStatistics(
        count=count,
        sum_x=sum_x.double(),
        sum_xx=None,
        squared_error=squared_distances(x, gmm.means, code).double().sum(),
        log_likelihood=values_at(log_joint, code).double().sum(),
        max_posterior=count.sum(),
    )


def update_weights(stats: GMMStatistics) -> Tensor:
    """(K,): pi_k = N_k / N (PRML eq. 9.22), smoothed."""
    smoothed = stats.count + WEIGHT_SMOOTHING
    return smoothed / smoothed.sum()


def update_means(stats: GMMStatistics, previous: Tensor, *, prior_rows: float = 0.0) -> Tensor:
    """(K, D) float64: mu_k = (sum_n gamma_nk x_n + a m) / (N_k + a), with a = `prior_rows` and m the mean of all rows.

    a = 0 gives PRML eq. 9.17. Otherwise the mode of the posterior under a Gaussian prior worth `a` rows at m (eq.
    2.141); one row is the unit information prior of Kass and Wasserman (1995). A component without rows keeps its
    `previous` mean.
    """
    mean = stats.sum_x.sum(0) / stats.count.sum()
    count = stats.count[:, None]
    means = (stats.sum_x + prior_rows * mean) / (count + prior_rows).clamp_min(1e-6)
    return torch.where(count > 1e-6, means, previous.double())


def pooled_variance(stats: GMMStatistics, previous: Tensor, means: Tensor) -> Tensor:
    """(): sum_nk gamma_nk |x_n - mu_k|^2 / (N D) for the new `means`, from the error under the `previous` ones."""
    old = previous.double()
    gain = 2 * inner_product(means - old, stats.sum_x) - stats.count @ (means.square() - old.square()).sum(1)
    return (stats.squared_error - gain) / (stats.count.sum() * means.shape[1])


def component_variances(stats: GMMStatistics, means: Tensor) -> Tensor:
    """(K, D): var_k = sum_n gamma_nk (x_n - mu_k)^2 / N_k (PRML eq. 9.19, its diagonal)."""
    if stats.sum_xx is None:
        raise ValueError("variances of single components need second moments; call e_step(second_moments=True)")
    count = stats.count.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    return stats.sum_xx / count - 2 * means * stats.sum_x / count + means.square()


def m_step(
    stats: GMMStatistics,
    previous: DiagonalGMM,
    *,
    diagonal: bool,
    floor: float,
    prior_rows: float = 0.0,
) -> DiagonalGMM:
    """The mixture that maximises the expected log-likelihood (PRML eq. 9.17, 9.19, 9.22).

    Args:
        diagonal: fit the weights and the diagonal covariance of each component. Otherwise weights are flat, and all
            components and dimensions share one variance.
        floor: least variance.
        prior_rows: see `update_means`.
    """
    means = update_means(stats, previous.means, prior_rows=prior_rows)
    pooled = pooled_variance(stats, previous.means, means).clamp_min(floor)
    weights, variances = torch.full_like(stats.count, 1 / len(stats.count)), pooled.expand_as(means)
    if diagonal:
        own = torch.where(stats.count[:, None] > 0, component_variances(stats, means), pooled)
        weights, variances = update_weights(stats), own.clamp_min(floor)
    return DiagonalGMM(weights.float(), means.float(), variances.float().contiguous())
