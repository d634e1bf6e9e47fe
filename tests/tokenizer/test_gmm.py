"""One mixture: laws of its statistics, and scikit-learn as the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from data import topics
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.mixture import GaussianMixture

from tokenizer import DataError, DiagonalGMM, GMMStatistics, e_step, m_step
from tokenizer.gmm import TRUNCATION, component_variances, hard_e_step, pooled_variance, spherical_gmm, update_means
from tokenizer.kernels import CACHED_ROWS, DENSE_CELLS


def mixture(k: int, d: int, *, seed: int = 0, tied: bool = False, width: float = 1.0) -> DiagonalGMM:
    g = torch.Generator().manual_seed(seed)
    variances = width * (torch.rand(1 if tied else k, d, generator=g).expand(k, d) + 0.5)
    return DiagonalGMM(torch.rand(k, generator=g).softmax(0), torch.randn(k, d, generator=g), variances.contiguous())


def close(a: GMMStatistics, b: GMMStatistics) -> bool:
    names = ["count", "sum_x", "log_likelihood", "squared_error", *([] if a.sum_xx is None else ["sum_xx"])]
    assert (a.sum_xx is None) == (b.sum_xx is None)
    return all(torch.allclose(getattr(a, name), getattr(b, name), rtol=1e-4, atol=1e-3) for name in names)


def sklearn_twin(gmm: DiagonalGMM) -> GaussianMixture:
    twin = GaussianMixture(gmm.components, covariance_type="diag")
    twin.weights_, twin.means_ = gmm.weights.double().numpy(), gmm.means.double().numpy()
    twin.covariances_ = gmm.variances.double().numpy()
    twin.precisions_cholesky_ = 1 / np.sqrt(twin.covariances_)
    return twin


def statistics(gmm: DiagonalGMM, x: torch.Tensor, hard: bool) -> GMMStatistics:
    return (hard_e_step if hard else e_step)(gmm, x)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(2, 60),
    cut=st.integers(1, 59),
    hard=st.booleans(),
    width=st.sampled_from([0.3, 1.0, 20.0]),
    tied=st.booleans(),
)
def test_statistics_of_two_parts_add_up_to_those_of_the_whole(
    n: int, cut: int, hard: bool, width: float, tied: bool
) -> None:
    x = torch.from_numpy(topics(n, 5))
    gmm, cut = mixture(4, 5, tied=tied, width=width), min(cut, n - 1)
    whole = statistics(gmm, x, hard)
    assert close(statistics(gmm, x[:cut], hard) + statistics(gmm, x[cut:], hard), whole)
    assert float(whole.count.sum()) == pytest.approx(n, rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    n=st.one_of(st.integers(1, 80), st.just(CACHED_ROWS + 100)),
    spread=st.sampled_from([0.01, 0.3, 3.0]),
    hard=st.booleans(),
    width=st.sampled_from([0.1, 1.0, 20.0, 400.0]),
    tied=st.booleans(),
    d=st.sampled_from([5, DENSE_CELLS // 40 + 1]),
)
def test_statistics_are_those_of_the_textbook_s_sums(
    n: int, spread: float, hard: bool, width: float, tied: bool, d: int
) -> None:
    """In float64 from all responsibilities, for rows of one component each, of a few, and of many."""
    x = torch.from_numpy(topics(n, d, spread=spread))
    gmm = mixture(40, d, width=width, tied=tied)
    stats = statistics(gmm, x, hard)
    joint = gmm.log_joint(x).double()
    resp = torch.nn.functional.one_hot(joint.argmax(1), 40).double() if hard else joint.softmax(1)
    distance = torch.cdist(x.double(), gmm.means.double()).square()
    assert (stats.sum_xx is None) == hard
    for ours, textbook in (
        (stats.count, resp.sum(0)),
        (stats.sum_x, resp.T @ x.double()),
        *([] if stats.sum_xx is None else [(stats.sum_xx, resp.T @ x.double().square())]),
        (stats.log_likelihood, joint.amax(1).sum() if hard else joint.logsumexp(1).sum()),
        (stats.squared_error, (resp * distance).sum()),
        (stats.max_posterior, resp.amax(1).sum()),
    ):
        truncated = 0.0 if hard else n * TRUNCATION * float(x.square().amax())
        torch.testing.assert_close(ours, textbook, rtol=1e-4, atol=1e-4 + truncated)


@pytest.mark.parametrize("tied", [False, True])
def test_statistics_without_second_moments_are_the_same(tied: bool) -> None:
    x, gmm = torch.from_numpy(topics(300, DENSE_CELLS // 40 + 1)), mixture(40, DENSE_CELLS // 40 + 1, tied=tied)
    less, whole = e_step(gmm, x, second_moments=False), e_step(gmm, x, second_moments=True)
    assert less.sum_xx is None
    for name in ("count", "sum_x", "squared_error", "log_likelihood", "max_posterior"):
        assert torch.equal(getattr(less, name), getattr(whole, name))


def test_statistics_of_no_rows_are_zero() -> None:
    for step in (e_step, hard_e_step):
        for d in (5, DENSE_CELLS // 40 + 1):
            gmm = mixture(40, d)
            x = torch.from_numpy(topics(30, d))
            assert close(step(gmm, x[:0]) + step(gmm, x), step(gmm, x))


@pytest.mark.parametrize("tied", [False, True])
def test_densities_are_those_of_scikit_learn(tied: bool) -> None:
    gmm, x = mixture(6, 8, tied=tied), topics(50, 8)
    twin = sklearn_twin(gmm)
    np.testing.assert_allclose(gmm.log_likelihood(torch.from_numpy(x)), twin.score_samples(x), rtol=1e-4)
    np.testing.assert_allclose(gmm.responsibilities(torch.from_numpy(x)), twin.predict_proba(x), atol=1e-5)


def test_one_em_step_is_that_of_scikit_learn() -> None:
    gmm, x = mixture(4, 5), topics(300, 5, groups=4, spread=1.0)
    ours = m_step(e_step(gmm, torch.from_numpy(x)), gmm, diagonal=True, floor=1e-12)
    resp = sklearn_twin(gmm).predict_proba(x)
    nk = resp.sum(0)
    means = resp.T @ x / nk[:, None]
    np.testing.assert_allclose(ours.means, means, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours.variances, resp.T @ x**2 / nk[:, None] - means**2, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(ours.weights, nk / nk.sum(), atol=1e-4)


@pytest.mark.parametrize("hard", [False, True])
def test_variances_are_mean_squares_about_the_new_means(hard: bool) -> None:
    gmm, x = mixture(4, 5), torch.from_numpy(topics(300, 5, groups=4, spread=1.0))
    stats = statistics(gmm, x, hard)
    joint = gmm.log_joint(x).double()
    resp = torch.nn.functional.one_hot(joint.argmax(1), 4).double() if hard else joint.softmax(1)
    means = update_means(stats, gmm.means, prior_rows=1.0)
    prior_mean = x.double().mean(0)
    slow_means = (resp.T @ x.double() + prior_mean) / (resp.sum(0) + 1)[:, None]
    torch.testing.assert_close(means, slow_means, rtol=1e-4, atol=1e-4)
    error = resp[:, :, None] * (x.double()[:, None] - means[None]).square()  # (N, K, D)
    assert float(pooled_variance(stats, gmm.means, means)) == pytest.approx(float(error.sum() / x.numel()), rel=1e-4)
    if hard:
        with pytest.raises(ValueError, match="second moments"):
            component_variances(stats, means)
    else:
        slow = error.sum(0) / resp.sum(0)[:, None]
        torch.testing.assert_close(component_variances(stats, means), slow, rtol=1e-3, atol=1e-4)


def test_a_component_without_rows_keeps_its_mean_and_gets_the_pooled_variance() -> None:
    x = torch.from_numpy(topics(60, 3, groups=2))
    far = spherical_gmm(torch.cat([x[:2], torch.full((1, 3), 50.0)]), 0.1)
    stats = e_step(far, x)
    fitted = m_step(stats, far, diagonal=True, floor=1e-9)
    assert torch.equal(fitted.means[2], far.means[2])
    pooled = float(pooled_variance(stats, far.means, update_means(stats, far.means)))
    assert fitted.variances[2].tolist() == pytest.approx([pooled] * 3, rel=1e-5)
    assert 0 < float(fitted.weights[2]) < 1e-4


def test_likelihood_never_falls_under_em() -> None:
    x = torch.from_numpy(topics(400, 6, spread=0.7))
    gmm, last = mixture(8, 6), -np.inf
    for _ in range(15):
        stats = e_step(gmm, x)
        assert float(stats.log_likelihood) >= last - 1e-3
        last = float(stats.log_likelihood)
        gmm = m_step(stats, gmm, diagonal=True, floor=1e-9)


def test_means_far_from_zero_lose_no_digits() -> None:
    gmm, x = mixture(5, 4), torch.from_numpy(topics(100, 4))
    far = DiagonalGMM(gmm.weights, gmm.means + 1000, gmm.variances)
    agree = (far.log_joint(x + 1000).argmax(1) == gmm.log_joint(x).argmax(1)).float().mean()
    assert agree >= 0.98  # float32 itself rounds x + 1000


def test_the_error_of_rows_far_from_zero_keeps_its_digits() -> None:
    gmm, x = mixture(5, 4, tied=True), torch.from_numpy(topics(100, 4))
    far = DiagonalGMM(gmm.weights, gmm.means + 300, gmm.variances)
    near, away = (e_step(model, rows).squared_error for model, rows in ((gmm, x), (far, x + 300)))
    assert float(away) == pytest.approx(float(near), rel=1e-3)


@pytest.mark.parametrize(
    "broken", [{"variances": torch.zeros(2, 3)}, {"means": torch.full((2, 3), torch.nan)}, {"weights": torch.ones(3)}]
)
def test_a_degenerate_mixture_cannot_be_built(broken: dict[str, torch.Tensor]) -> None:
    parts = {"weights": torch.full((2,), 0.5), "means": torch.zeros(2, 3), "variances": torch.ones(2, 3), **broken}
    with pytest.raises(DataError, match=r"expected|must be"):
        DiagonalGMM(**parts)
