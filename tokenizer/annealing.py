"""The fit of one level: deterministic annealing (Rose 1998), then classification EM; or plain EM, or k-means.

In hundreds of dimensions the log-densities of two components differ by hundreds of nats, so that EM at temperature 1 is
k-means from its first step. Annealing divides the log-joint by a temperature T that falls: of spherical components of
variance v that is the same mixture with variance T v. Clusters form by splitting, the first one where T v is the
largest eigenvalue of the covariance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from tokenizer.data import Residuals
from tokenizer.dead_components import reassign_dead_components
from tokenizer.gmm import DiagonalGMM, GMMStatistics, e_step, hard_e_step, m_step, spherical_gmm, update_means
from tokenizer.iterations import Trace
from tokenizer.start import SAMPLE_ROWS, distinct_rows, largest_eigenvalue

Method = Literal["annealed", "em", "kmeans"]

CONTRACTION = 1 / 4  # annealing starts this far from the level's mean towards the k-means centres
START_TEMPERATURE = 1 / 2  # as a share of the critical one, at which the first split happens
COOLING = 0.97  # factor of the temperature from one step to the next
FAST_COOLING = 0.7  # the same where the last step gained nothing: between two splits there is nothing to wait for
ANNEALING_TOL = 3e-5  # relative gain of an annealing step in squared error that counts as none
REL_TOL = 1e-4  # the same of a hard step in RMSE
OVERRELAXATION = 1.5  # means move this many times as far as an EM step moves them: near a split EM is slow
MAX_POSTERIOR = 0.99  # mean largest responsibility at which annealing ends
ANNEALING_TRUNCATION = 1e-3  # see gmm.TRUNCATION; the steps of annealing need not be exact
PRIOR_ROWS = 1.0  # see gmm.update_means
HARD_STEPS = 10  # classification EM after annealing, at most
EM_GAIN = 1e-3  # nats a row that an EM step must gain for another one (scikit-learn's default)


def prior_rows_of(method: Method) -> float:
    """How many rows the prior of a component's mean is worth."""
    return PRIOR_ROWS if method == "annealed" else 0.0


@dataclass(frozen=True)
class Level:
    """What the fit of a level needs besides its start."""

    number: int  # from 1
    residuals: Residuals
    components: int
    seed: int
    method: Method
    trace: Trace

    @property
    def prior_rows(self) -> float:
        return prior_rows_of(self.method)

    def sum(self, gmm: DiagonalGMM, step: Callable[[DiagonalGMM, Tensor], GMMStatistics]) -> GMMStatistics:
        """`step(gmm, residuals)` of all rows."""
        return self.residuals.sum(partial(step, gmm.to(self.residuals.device)), self.components)

    def m_step(self, stats: GMMStatistics, gmm: DiagonalGMM) -> DiagonalGMM:
        return m_step(
            stats,
            gmm,
            diagonal=self.method == "em",
            floor=self.residuals.floor,
            prior_rows=self.prior_rows,
        )

    def report(self, stats: GMMStatistics, temperature: float) -> None:
        self.trace.add(self.number, temperature, stats, self.residuals.rows)


def fit_level(level: Level, iterations: int) -> DiagonalGMM:
    """From random rows and one k-means step."""
    residuals = level.residuals
    rows = residuals.sample(max(SAMPLE_ROWS, 4 * level.components))
    start = spherical_gmm(distinct_rows(rows, level.components, 1000 * level.seed + level.number), 1.0)
    stats = level.sum(start, hard_e_step)
    kmeans = m_step(stats, start, diagonal=False, floor=residuals.floor)
    if level.method == "em":
        return em(level, kmeans, iterations)
    if level.method == "kmeans":
        return classification_em(level, kmeans, iterations)
    mean = stats.sum_x.sum(0) / stats.count.sum()
    return classification_em(level, anneal(level, kmeans, mean, largest_eigenvalue(rows, mean), iterations), HARD_STEPS)


def refit_level(level: Level, champion: DiagonalGMM, steps: int) -> DiagonalGMM:
    """`steps` from the champion's level. Components without rows always move: no item has their codes."""
    if level.method == "em":
        return em(level, champion, steps)
    residuals = level.residuals
    stats = level.sum(spherical_gmm(champion.means, 1.0), hard_e_step)
    variance = float(stats.squared_error) / (residuals.rows * residuals.dim)
    return classification_em(level, spherical_gmm(champion.means, max(variance, residuals.floor)), steps)


def anneal(level: Level, start: DiagonalGMM, mean: Tensor, lambda_max: float, steps: int) -> DiagonalGMM:
    """EM of spherical components while the temperature falls from half the critical one, lambda_max / variance.

    Ends when the mean largest responsibility reaches MAX_POSTERIOR.
    """
    floor = level.residuals.floor
    variance = float(start.variances[0, 0])
    if variance <= floor:  # the start explains its rows exactly: there is nothing to split
        return start
    means = (mean + CONTRACTION * (start.means.double() - mean)).float()
    temperature = START_TEMPERATURE * lambda_max / variance
    step = partial(e_step, second_moments=False, truncation=ANNEALING_TRUNCATION)
    for _ in range(steps):
        if temperature * variance <= floor:  # rows that differ by less cannot be told apart
            break
        stats = level.sum(spherical_gmm(means, temperature * variance), step)
        level.report(stats, temperature)
        target = update_means(stats, means, prior_rows=level.prior_rows)
        step_length = target - means.double()  # (K, D)
        means = (means.double() + OVERRELAXATION * step_length).float()
        if float(stats.max_posterior) >= MAX_POSTERIOR * level.residuals.rows:
            break
        gain = float(stats.count @ step_length.square().sum(1))  # in squared error, for these responsibilities
        temperature *= FAST_COOLING if gain <= ANNEALING_TOL * float(stats.squared_error) else COOLING
    return spherical_gmm(means, variance)


def em(level: Level, gmm: DiagonalGMM, steps: int) -> DiagonalGMM:
    """EM until a step gains less than EM_GAIN nats a row."""
    last = -math.inf
    for _ in range(steps):
        stats = level.sum(gmm, e_step)
        level.report(stats, 1.0)
        gmm = level.m_step(stats, gmm)
        log_likelihood = float(stats.log_likelihood) / level.residuals.rows
        if log_likelihood - last <= EM_GAIN:
            break
        last = log_likelihood
    return gmm


def classification_em(level: Level, gmm: DiagonalGMM, steps: int) -> DiagonalGMM:
    """Classification EM until the RMSE changes by less than REL_TOL; then components without rows move to rows of their
    own.

    As all components have one variance, that is Lloyd's k-means.
    """
    step = hard_e_step
    tolerance = REL_TOL if level.method == "annealed" else 0.0
    last_error = math.inf
    for _ in range(steps):
        stats = level.sum(gmm, step)
        level.report(stats, 0.0)
        gmm = level.m_step(stats, gmm)
        rmse = math.sqrt(float(stats.squared_error))
        dead = stats.count == 0
        if bool(dead.any()):
            gmm = reassign_dead_components(gmm, dead, level.residuals)
        elif last_error - rmse <= tolerance * rmse:
            break
        last_error = rmse
    # The last step may have left components without rows, and a row that a component moved to may have been the only
    # one of another. Each round lowers the error, until rows differ by less than float32 can represent.
    last_error = math.inf
    while True:
        stats = level.sum(gmm, hard_e_step)
        moved = reassign_dead_components(gmm, stats.count == 0, level.residuals)
        if moved is gmm or float(stats.squared_error) >= last_error:
            return gmm
        gmm, last_error = moved, float(stats.squared_error)
