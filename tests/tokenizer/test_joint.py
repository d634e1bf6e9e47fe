"""The joint M-step against least squares, and what it does to a fit."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from data import topics
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer import RQGMM, fit_rqgmm
from tokenizer.joint import count_pairs, joint_means


def problem(
    n: int, levels: int, k: int, d: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Rows, codes, means and anchors without any order in them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    codes = torch.randint(k, (n, levels), generator=generator, dtype=torch.int32)
    means, anchors = (
        [torch.randn(k, d, generator=generator, dtype=torch.float64) for _ in range(levels)] for _ in "ab"
    )
    return x, codes, means, anchors


def decoded(codes: torch.Tensor, means: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([mean[codes[:, level].long()] for level, mean in enumerate(means)]).sum(0)


def sums_of_residuals(x: torch.Tensor, codes: torch.Tensor, means: list[torch.Tensor]) -> list[torch.Tensor]:
    residual = x - decoded(codes, means)
    return [torch.zeros_like(mean).index_add(0, codes[:, level].long(), residual) for level, mean in enumerate(means)]


def cost(
    x: torch.Tensor, codes: torch.Tensor, means: list[torch.Tensor], anchors: list[torch.Tensor], prior: float
) -> float:
    """What the posterior mode minimises."""
    prior_cost = sum(float((mean - anchor).square().sum()) for mean, anchor in zip(means, anchors, strict=True))
    return float((x - decoded(codes, means)).square().sum()) + prior * prior_cost


def test_pairs_are_counted_as_a_slow_loop_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenizer.joint.PAIR_ROWS", 7)
    codes = torch.randint(4, (40, 2), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    slow = Counter(map(tuple, codes.tolist()))
    a, b, count = count_pairs(codes[:, 0], codes[:, 1], 4)
    assert dict(zip(zip(a.tolist(), b.tolist(), strict=True), count.tolist(), strict=True)) == slow


shapes = st.tuples(st.integers(1, 30), st.integers(1, 4), st.integers(1, 9), st.integers(1, 5), st.integers(0, 1000))


@settings(max_examples=20, deadline=None)
@given(shape=shapes, prior=st.sampled_from([1.0, 4.0]))
def test_many_sweeps_solve_the_least_squares_problem(shape: tuple[int, int, int, int, int], prior: float) -> None:
    n, levels, k, _, _ = shape
    x, codes, means, anchors = problem(*shape)
    solution = joint_means(sums_of_residuals(x, codes, means), codes, means, anchors, prior, sweeps=1000)
    design = np.zeros((n, levels * k))
    for level in range(levels):
        design[np.arange(n), level * k + codes[:, level].numpy()] = 1
    stacked = np.concatenate([design, math.sqrt(prior) * np.eye(levels * k)])
    expected = np.linalg.lstsq(stacked, np.concatenate([x.numpy(), math.sqrt(prior) * torch.cat(anchors).numpy()]))[0]
    np.testing.assert_allclose(torch.cat(solution), expected, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, prior=st.sampled_from([0.5, 1.0, 4.0]))
def test_no_sweep_lowers_the_posterior(shape: tuple[int, int, int, int, int], prior: float) -> None:
    x, codes, means, anchors = problem(*shape)
    sums = sums_of_residuals(x, codes, means)
    costs = [cost(x, codes, joint_means(sums, codes, means, anchors, prior, n), anchors, prior) for n in range(4)]
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(costs))


def test_a_component_without_rows_goes_to_its_anchor() -> None:
    x, codes, means, anchors = problem(30, 2, 5, 3, seed=1)
    codes.clamp_(max=3)
    for mean, anchor in zip(
        joint_means(sums_of_residuals(x, codes, means), codes, means, anchors, 1.0, 3), anchors, strict=True
    ):
        torch.testing.assert_close(mean[4], anchor[4])


def rmse(rqgmm: RQGMM, x: torch.Tensor) -> float:
    return float((x - rqgmm.decode(rqgmm.encode(x))).square().mean().sqrt())


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize(("dim", "components"), [(3, 16), (40, 32)])
def test_all_levels_together_explain_the_rows_better_than_one_after_the_other(
    dim: int, components: int, beam: int
) -> None:
    x = torch.from_numpy(topics(4000, dim, groups=200, spread=0.5))
    levels: list[RQGMM] = []
    fit = fit_rqgmm(
        x, levels=3, components=components, seed=0, beam=beam, on_level=lambda so_far: levels.append(so_far.rqgmm)
    )
    alone, jointly = rmse(levels[-1], x), rmse(fit.rqgmm, x)
    assert jointly < 0.995 * alone
    errors = [step.rmse for step in fit.trace if step.level == 0]
    assert errors == sorted(errors, reverse=True)
    assert (errors[0], errors[-1]) == pytest.approx((alone, jointly), rel=1e-5)
    codes = fit.rqgmm.encode(x)
    assert all(len(codes[:, level].unique()) == components for level in range(3))
    residual = x
    for level, gmm in enumerate(fit.rqgmm.levels):  # their variances are those of the means as they are in the end
        residual = residual - gmm.means[codes[:, level].long()]
        assert gmm.variance == pytest.approx(float(residual.square().mean()), rel=1e-4)


def test_a_refit_on_the_same_rows_moves_hardly_a_code() -> None:
    x = torch.from_numpy(topics(4000, 40, groups=200, spread=0.5))
    champion = fit_rqgmm(x, levels=3, components=32, seed=0).rqgmm
    again = fit_rqgmm(x, levels=3, components=32, seed=0, init=champion).rqgmm
    assert (again.encode(x) != champion.encode(x)).any(1).float().mean() < 0.01
    assert rmse(again, x) <= rmse(champion, x) * (1 + 1e-6)
