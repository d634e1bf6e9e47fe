"""What a fit reports of each of its steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tokenizer.gmm import GMMStatistics


@dataclass(frozen=True)
class Iteration:
    """One step of a fit.

    Attributes:
        level: from 1; 0 for the joint steps of all levels. Their iteration 0 is the state after the fit level by level,
            with the RMSE of the last residuals and the last level's perplexity and use.
        temperature: of an annealing step; 0 for a hard step, 1 for one of plain EM.
        rmse: sqrt(expected squared error / (rows * dimensions)).
        max_posterior: mean of each row's largest responsibility, at the step's temperature.
        log_likelihood: nats a row; of hard steps that of the rows with their components; None while annealing.
        perplexity: exp(entropy of the shares of the components) / K.
        used: components with rows.
    """

    level: int
    iteration: int
    temperature: float
    rmse: float
    max_posterior: float
    log_likelihood: float | None
    perplexity: float
    used: int

    def summary(self) -> str:
        where = f"level {self.level}" if self.level else "all levels"
        return f"{where}, iteration {self.iteration}, RMSE {self.rmse:.5f}"


class Trace:
    """The steps so far; each new one is also given to `on_iteration`."""

    def __init__(
        self, steps: Iterable[Iteration] = (), on_iteration: Callable[[Iteration], None] | None = None
    ) -> None:
        self.steps, self._on_iteration = list(steps), on_iteration

    def add(self, level: int, temperature: float, stats: GMMStatistics, rows: int) -> None:
        before = sum(step.level == level for step in self.steps)
        step = _iteration(stats, level, before + (level > 0), temperature, rows)
        self.steps.append(step)
        if self._on_iteration is not None:
            self._on_iteration(step)


def _iteration(stats: GMMStatistics, level: int, iteration: int, temperature: float, rows: int) -> Iteration:
    k, d = stats.sum_x.shape
    share = stats.count / stats.count.sum()
    entropy = -float((share * share.clamp_min(1e-300).log()).sum())
    annealing = temperature not in (0.0, 1.0)
    log_likelihood = float(stats.log_likelihood) / rows
    return Iteration(
        level=level,
        iteration=iteration,
        temperature=temperature,
        rmse=math.sqrt(float(stats.squared_error) / (rows * d)),
        max_posterior=float(stats.max_posterior) / rows,
        log_likelihood=None if annealing or not math.isfinite(log_likelihood) else log_likelihood,
        perplexity=math.exp(entropy) / k,
        used=int((stats.count > 0.5).sum()),
    )
