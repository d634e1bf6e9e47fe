"""The frozen model: encode, assign and the beam agree with slow loops; batches, order and ties change nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from data import topics
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.mixture import GaussianMixture

from tokenizer import (
    RQGMM,
    DataError,
    DiagonalGMM,
    fit_rqgmm,
)
from tokenizer.annealing import Method
from tokenizer.gmm import spherical_gmm
from tokenizer.greedy import ResidualPath, SphericalPath, SphericalTables


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.from_numpy(topics(3000, 24, groups=40, spread=0.5))


@pytest.fixture(scope="module")
def rqgmm(x: torch.Tensor) -> RQGMM:
    return fit_rqgmm(x, levels=2, components=16, seed=0, iterations=20, method="em").rqgmm


def log_joint(gmm: DiagonalGMM, residual: np.ndarray) -> np.ndarray:
    """(K,): log pi_k + log N(residual | mu_k, var_k), written out."""
    return np.array(
        [
            math.log(gmm.weights[k])
            - 0.5
            * sum(
                math.log(2 * math.pi * v) + (r - m) ** 2 / v
                for r, m, v in zip(residual, gmm.means[k].tolist(), gmm.variances[k].tolist(), strict=True)
            )
            for k in range(gmm.components)
        ]
    )


@pytest.mark.parametrize("method", ["annealed", "em"])
@pytest.mark.parametrize("levels", [1, 3])
def test_encode_is_the_slow_loop(x: torch.Tensor, levels: int, method: Method) -> None:
    """Codes, confidence and likelihood as their definitions say, by residuals and without them."""
    rqgmm = fit_rqgmm(x, levels=levels, components=16, seed=0, iterations=20, method=method).rqgmm
    codes, likelihood, posterior = np.zeros((50, levels), int), np.zeros(50), np.ones(50)
    for n, row in enumerate(x[:50].double().numpy()):
        residual = row.copy()
        for level, gmm in enumerate(rqgmm.levels):
            joint = log_joint(gmm, residual)
            evidence = joint.max() + math.log(np.exp(joint - joint.max()).sum())
            code = codes[n, level] = joint.argmax()
            likelihood[n] += evidence if level == levels - 1 else math.log(gmm.weights[code])
            posterior[n] *= math.exp(joint.max() - evidence)
            residual -= gmm.means[code].double().numpy()
    result = rqgmm.assign(x[:50])
    np.testing.assert_array_equal(result.codes, codes)
    np.testing.assert_allclose(result.log_likelihood, likelihood, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(result.confidence, posterior, rtol=1e-3, atol=1e-4)


def test_the_likelihood_is_a_bound_of_the_model_s_and_that_of_scikit_learn_with_one_level(x: torch.Tensor) -> None:
    """log p(x) = log sum_c prod_l pi_c_l N(x | sum_l mu_c_l, var_c_L), here over all tuples c."""
    rqgmm = fit_rqgmm(x, levels=2, components=8, seed=0).rqgmm
    rows = x[:30]
    first, last = rqgmm.levels
    tuples = [
        float(first.weights[k].log()) + last.log_joint(rows - first.means[k]).double() for k in range(8)
    ]  # (30, 8) each
    exact = torch.cat(tuples, dim=1).logsumexp(1)
    bound = rqgmm.log_likelihood(rows).double()
    assert (bound <= exact + 1e-3).all()
    assert float((exact - bound).mean()) < 0.5
    one = RQGMM(rqgmm.levels[:1])
    twin = GaussianMixture(8, covariance_type="diag")
    twin.weights_, twin.means_, twin.covariances_ = (
        part.double().numpy() for part in (first.weights, first.means, first.variances)
    )
    twin.precisions_cholesky_ = 1 / np.sqrt(twin.covariances_)
    np.testing.assert_allclose(one.log_likelihood(rows), twin.score_samples(rows.double().numpy()), rtol=1e-4)


def test_scores_without_residuals_are_those_of_the_residuals(x: torch.Tensor) -> None:
    levels = fit_rqgmm(x, levels=3, components=16, seed=0).rqgmm.levels
    slow, fast = ResidualPath(levels, x[:200]), SphericalPath(SphericalTables(levels), x[:200])
    for gmm in levels:
        scores = slow.scores()
        row_term, score = fast.row_term(), fast.scores()
        torch.testing.assert_close(score + row_term[:, None], scores, rtol=1e-4, atol=1e-2)
        code = scores.argmax(1)
        slow.choose(code, scores.amax(1))
        fast.choose(code, score.amax(1))
        assert gmm.variance is not None


@settings(max_examples=20, deadline=None)
@given(cut=st.lists(st.integers(1, 2999), max_size=5), seed=st.integers(0, 5))
def test_codes_do_not_depend_on_batches_or_order(x: torch.Tensor, rqgmm: RQGMM, cut: list[int], seed: int) -> None:
    codes = rqgmm.encode(x)
    parts = torch.tensor_split(x, sorted(set(cut)))
    assert torch.equal(torch.cat([rqgmm.encode(part) for part in parts]), codes)
    assert torch.equal(
        rqgmm.encode(x[cut[0] : cut[0] + 1] if cut else x[:1]), codes[cut[0] : cut[0] + 1] if cut else codes[:1]
    )
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(rqgmm.encode(x[order]), codes[order])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e37], ids=str)
def test_what_is_not_finite_at_any_level_is_refused(value: float) -> None:
    """1e37 overflows in the first level's products, and not in the second's."""
    rqgmm = RQGMM(
        tuple(spherical_gmm(torch.linspace(-size, size, 4)[:, None].expand(4, 6).clone(), 0.01) for size in (1.0, 1e-3))
    )
    assert rqgmm.encode(torch.ones(20, 6)).shape == (20, 2)
    broken = torch.ones(20, 6)
    broken[7, 3] = value
    for encode in (rqgmm.encode, rqgmm.assign, replace(rqgmm, beam=2).encode):
        with pytest.raises(DataError, match="NaN, Inf or numbers too large"):
            encode(broken)


def test_no_rows_have_no_codes(x: torch.Tensor, rqgmm: RQGMM) -> None:
    assert rqgmm.encode(x[:0]).shape == rqgmm.assign(x[:0]).codes.shape == (0, rqgmm.n_levels)


def test_other_floats_are_encoded_as_float32(x: torch.Tensor, rqgmm: RQGMM) -> None:
    assert torch.equal(rqgmm.encode(x.double()), rqgmm.encode(x))
    assert torch.equal(rqgmm.assign(x.half()).codes, rqgmm.encode(x.half().float()))


def test_a_beam_as_wide_as_all_tuples_finds_the_most_probable_one(x: torch.Tensor) -> None:
    """Against a slow loop over all tuples of codes: the density of the last residual times the weights of all
    levels.
    """
    fit = fit_rqgmm(x, levels=3, components=4, seed=0, method="em", iterations=5)
    searched = replace(fit.rqgmm, beam=16).encode(x[:40])
    for row, chosen in zip(x[:40], searched.tolist(), strict=True):
        scores = {}
        for codes in product(range(4), repeat=3):
            residual, score = row[None], 0.0
            for level, (gmm, code) in enumerate(zip(fit.rqgmm.levels, codes, strict=True), start=1):
                last = level == 3
                score += float(gmm.log_joint(residual)[0, code]) if last else float(gmm.weights[code].log())
                residual = residual - gmm.means[code]
            scores[codes] = score
        assert scores[tuple(chosen)] == pytest.approx(max(scores.values()), abs=1e-3)


def test_the_lowest_index_wins_a_tie_in_encode_and_in_the_beam() -> None:
    """Of components with equal means, and of paths that end at the same place, the first ones count."""
    means = torch.tensor([[2.0, 0.0], [0.0, 0.0], [2.0, 0.0], [0.0, 0.0]])
    twins = spherical_gmm(means, 1.0)
    rows = torch.tensor([[2.0, 0.0], [0.0, 0.0], [2.5, 0.0], [2.0, 0.5]])
    assert RQGMM((twins,)).encode(rows)[:, 0].tolist() == [0, 1, 0, 0]
    # (2, 0) = mu_0 + mu_1 = mu_1 + mu_0 and so on, all of one probability: the first of all tuples is (0, 1).
    for beam in (2, 4, 16):
        assert RQGMM((twins, twins), beam=beam).encode(rows[:1]).tolist() == [[0, 1]]
    many = spherical_gmm(torch.zeros(64, 2), 1.0)
    for beam in (1, 2, 7, 64):
        assert RQGMM((many, many, many), beam=beam).encode(rows).tolist() == [[0, 0, 0]] * 4
    component, _ = RQGMM((many,)).posteriors(rows, top=5)[0]
    assert component.tolist() == [[0, 1, 2, 3, 4]] * 4


def test_a_beam_lowers_the_error_and_one_is_greedy(x: torch.Tensor) -> None:
    rqgmm = fit_rqgmm(x, levels=3, components=16, seed=0).rqgmm
    errors = []
    for beam in (1, 2, 8):
        codes = replace(rqgmm, beam=beam).encode(x)
        errors.append(float((x - rqgmm.decode(codes)).square().mean()))
        assert torch.equal(replace(rqgmm, beam=beam).assign(x).codes, codes)
    assert errors[0] > errors[1] > errors[2]


def test_decoding_is_a_fixed_point_of_the_first_level(x: torch.Tensor, rqgmm: RQGMM) -> None:
    one = RQGMM(rqgmm.levels[:1])
    centres = one.decode(torch.arange(16, dtype=torch.int32)[:, None])
    tied = RQGMM(fit_rqgmm(x, levels=1, components=16, seed=0, iterations=5).rqgmm.levels)
    assert torch.equal(tied.encode(tied.levels[0].means)[:, 0], torch.arange(16, dtype=torch.int32))
    assert centres.shape == (16, 24)


def test_residuals_never_grow_with_levels(x: torch.Tensor) -> None:
    fit = fit_rqgmm(x, levels=3, components=16, seed=0, iterations=15)
    codes = fit.rqgmm.encode(x)
    errors = [float((x - RQGMM(fit.rqgmm.levels[:n]).decode(codes[:, :n])).square().mean()) for n in (1, 2, 3)]
    assert errors == sorted(errors, reverse=True)


def test_posteriors_sum_to_one_and_start_with_the_code(x: torch.Tensor, rqgmm: RQGMM) -> None:
    posteriors = rqgmm.posteriors(x[:100], top=16)
    codes = rqgmm.encode(x[:100])
    for level, (component, probability) in enumerate(posteriors):
        torch.testing.assert_close(probability.sum(1), torch.ones(100), rtol=0, atol=1e-4)
        assert torch.equal(component[:, 0], codes[:, level])


def test_given_codes_get_their_own_posterior(x: torch.Tensor, rqgmm: RQGMM) -> None:
    best = rqgmm.assign(x[:20])
    same = rqgmm.assign(x[:20], best.codes)
    assert torch.equal(same.confidence, best.confidence)
    other = rqgmm.assign(x[:20], (best.codes + 1) % 16)
    assert (other.confidence <= best.confidence).all()
    assert torch.equal(other.codes, (best.codes + 1) % 16)


def test_encode_refuses_another_dimension(rqgmm: RQGMM) -> None:
    with pytest.raises(DataError, match=r"expected \(N, 24\)"):
        rqgmm.encode(torch.zeros(2, 5))
