"""The fit of RQ-GMM: level by level, then all levels jointly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from tokenizer.alternates import CALIBRATION_ROWS, calibrated
from tokenizer.annealing import Level, Method, fit_level, prior_rows_of, refit_level
from tokenizer.data import Data, Residuals, Rows
from tokenizer.errors import DataError
from tokenizer.iterations import Iteration, Trace
from tokenizer.joint import refine_jointly
from tokenizer.rqgmm import RQGMM

JOINT_STEPS = 20  # at most
REFIT_STEPS = 3  # EM or Lloyd steps a level of a refit that starts from a champion (stable IDs)
REFIT_JOINT_STEPS = 1  # joint steps of such a refit: the first brings most of the gain, for half the codes moved


@dataclass(frozen=True, eq=False)
class RQGMMFit:
    """A codebook and the steps of its fit; of a fit that has not ended, the levels done so far."""

    rqgmm: RQGMM
    trace: tuple[Iteration, ...]


def fit_rqgmm(
    data: Data,
    *,
    levels: int,
    components: int,
    seed: int,
    init: RQGMM | None = None,
    iterations: int = 300,
    method: Method = "annealed",
    beam: int = 1,
    device: str | torch.device = "cpu",
    resume: RQGMMFit | None = None,
    on_iteration: Callable[[Iteration], None] | None = None,
    on_level: Callable[[RQGMMFit], None] | None = None,
) -> RQGMMFit:
    """Fit RQ-GMM (arXiv 2602.12593, section 3).

    By default with one spherical covariance per level, shared by its components, and flat weights, annealed level by
    level and then refined jointly (ours). The paper's own model is method="em": diagonal covariances and weights by EM.
    In hundreds of dimensions it reconstructs worse than k-means.

    Args:
        data: float tensor (N, D), or a re-iterable of float batches that may be larger than memory. Where
            torch.distributed is initialised each rank passes its own rows: with ranks in order, and each one's rows
            starting at a multiple of FIT_BLOCK, any number of ranks gives the codebook of one.
        init: start from this codebook and take a single joint step (or a few Lloyd or EM steps), so that codes change
            only where the data changed.
        iterations: annealing steps (or EM, or Lloyd steps) per level, at most.
        method: "annealed", "em" or "kmeans", the last with hard codes and one variance, that is RQ-KMeans.
        beam: tuples of codes that encode keeps from level to level; each level is fitted on the residuals of all of
            them, and the trace's errors are theirs. 1 is greedy; fit and encode take about `beam` times as long.
        device: where rows and their statistics are computed; the codebook comes back on the CPU.
        resume: what `on_level` got last from a fit of the same arguments that was interrupted; the result is that of a
            fit that was not interrupted.
        on_iteration: called with each step.
        on_level: called with the levels done so far, after each level.

    Raises:
        DataError: no rows, fewer than components, NaN or Inf, batches of different width, or `init` or `resume` of
            another shape.
        LostWorker: another rank is gone.
    """
    if init is not None and (init.n_levels, init.components) != (levels, components):
        raise DataError(
            f"init has {init.n_levels} levels of {init.components} components, asked for are {levels} of {components}; "
            "expected the same. Fit without init to change the shape"
        )
    jointly = method == "annealed" and levels > 1
    source = Rows(data, components, torch.device(device))
    if init is not None and init.dim != source.dim:
        raise DataError(f"init has dimension {init.dim}, the data {source.dim}; expected the same. Fit without init")
    trace = Trace(() if resume is None else resume.trace, on_iteration)
    done = [] if resume is None else list(resume.rqgmm.levels)
    if resume is not None and (resume.rqgmm.components, resume.rqgmm.dim) != (components, source.dim):
        raise DataError(
            f"the fit to resume has {resume.rqgmm.components} components of dimension {resume.rqgmm.dim}, this one "
            f"{components} of {source.dim}; expected the same fit. Start anew without resume"
        )
    residuals = Residuals(source, beam)
    floor, sample = residuals.floor, residuals.sample(CALIBRATION_ROWS)
    for gmm in done[: levels - 1]:
        residuals.descend(gmm)
    for number in range(len(done) + 1, levels + 1):
        level = Level(number, residuals, components, seed, method, trace)
        if init is None:
            gmm = fit_level(level, iterations)
        else:
            gmm = refit_level(level, init.levels[number - 1], 0 if jointly else REFIT_STEPS)
        done.append(gmm)
        if on_level is not None:
            on_level(RQGMMFit(RQGMM(tuple(done), beam), tuple(trace.steps)))
        if number < levels:
            residuals.descend(gmm)
    if jointly:
        del residuals
        done = refine_jointly(source, done, beam, floor, JOINT_STEPS if init is None else REFIT_JOINT_STEPS, trace)
    hard = RQGMM(tuple(done), beam)
    temperatures = calibrated(done, sample, hard.encode(sample), source.total, prior_rows_of(method))
    return RQGMMFit(replace(hard, temperatures=temperatures), tuple(trace.steps))
