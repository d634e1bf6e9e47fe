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
from tokenizer.gmm import CACHED_ROWS, CHEAP, NEGLIGIBLE, Scratch, annealing_step, certainty, factor, isotropic, product


def mixture(k: int, d: int, *, seed: int = 0, tied: bool = False, width: float = 1.0) -> DiagonalGMM:
    g = torch.Generator().manual_seed(seed)
    variances = width * (torch.rand(1 if tied else k, d, generator=g).expand(k, d) + 0.5)
    return DiagonalGMM(torch.rand(k, generator=g).softmax(0), torch.randn(k, d, generator=g), variances.contiguous())


def close(a: GMMStatistics, b: GMMStatistics) -> bool:
    assert a.sum_xx is not None
    assert b.sum_xx is not None
    pairs = [
        (a.count, b.count),
        (a.sum_x, b.sum_x),
        (a.sum_xx, b.sum_xx),
        (a.log_likelihood, b.log_likelihood),
        (a.squared_error, b.squared_error),
    ]
    return all(torch.allclose(p, q, rtol=1e-4, atol=1e-3) for p, q in pairs)


def sklearn_twin(gmm: DiagonalGMM) -> GaussianMixture:
    twin = GaussianMixture(gmm.components, covariance_type="diag")
    twin.weights_, twin.means_ = gmm.weights.double().numpy(), gmm.means.double().numpy()
    twin.covariances_ = gmm.variances.double().numpy()
    twin.precisions_cholesky_ = 1 / np.sqrt(twin.covariances_)
    return twin


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 700), d=st.sampled_from([1, 7, 16, 100, 384]), k=st.integers(1, 130), seed=st.integers(0, 9))
def test_a_row_of_a_product_depends_neither_on_its_place_nor_on_the_threads(n: int, d: int, k: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, weight, bias = torch.randn(n, d, generator=g), torch.randn(k, d, generator=g), torch.randn(k, generator=g)
    assert torch.allclose(product(x.T, weight[:1].expand(n, d).T), x.T @ weight[:1].expand(n, d), atol=1e-2)
    order, threads = torch.randperm(n, generator=g), torch.get_num_threads()
    for form in (weight, factor(weight)):
        here = product(x, form, bias)
        assert torch.allclose(here.double(), x.double() @ weight.double().T + bias.double(), atol=1e-4)
        assert torch.equal(product(x[order], form, bias), here[order])
        try:
            for other in (1, 2, 3):
                torch.set_num_threads(other)
                assert torch.equal(product(x, form, bias), here)
        finally:
            torch.set_num_threads(threads)


def test_without_onednn_products_are_the_same_but_for_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(50, 9), torch.randn(4, 9)
    with_onednn = product(x, weight)
    monkeypatch.setattr("tokenizer.gmm._onednn", None)
    assert torch.allclose(product(x, weight), with_onednn, atol=1e-5)


@pytest.mark.parametrize("width", [1e-3, 1.0, 1e4])
def test_certainty_is_the_largest_posterior_however_wide_the_scores(width: float) -> None:
    affinity = width * torch.randn(100, 7)
    posterior = affinity.double().softmax(1).amax(1)
    assert torch.allclose(certainty(affinity, affinity.amax(1)).double(), posterior, rtol=1e-6)


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
    whole = e_step(gmm, x, hard=hard)
    assert close(e_step(gmm, x[:cut], hard=hard) + e_step(gmm, x[cut:], hard=hard), whole)
    assert float(whole.count.sum()) == pytest.approx(n, rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    n=st.one_of(st.integers(1, 80), st.just(CACHED_ROWS + 100)), spread=st.sampled_from([0.01, 0.3, 3.0]), hard=st.booleans(),
    width=st.sampled_from([0.1, 1.0, 20.0, 400.0]), tied=st.booleans(), d=st.sampled_from([5, CHEAP // 80 + 1]),
)  # fmt: skip
def test_statistics_are_those_of_products_of_all_responsibilities(
    n: int, spread: float, hard: bool, width: float, tied: bool, d: int
) -> None:
    """Rows of one component each, of a few, and of many: the sums take different ways there."""
    x = torch.from_numpy(topics(n, d, spread=spread))
    gmm = mixture(40, d, width=width, tied=tied)
    stats = e_step(gmm, x, hard=hard)
    joint = gmm.log_joint(x).double()
    resp = torch.nn.functional.one_hot(joint.argmax(1), 40).double() if hard else joint.softmax(1)
    distance = torch.cdist(x.double(), gmm.means.double()).square()
    assert stats.sum_xx is not None
    for found, wanted in (
        (stats.count, resp.sum(0)),
        (stats.sum_x, resp.T @ x.double()),
        (stats.sum_xx, resp.T @ x.double().square()),
        (stats.log_likelihood, joint.logsumexp(1).sum()),
        (stats.squared_error, (resp * distance).sum()),
        (stats.certainty, resp.amax(1).sum()),
    ):
        # Where only what counts is gathered; products leave out nothing, and neither do one-hot responsibilities.
        left_out = n * NEGLIGIBLE * float(x.square().amax()) if 2 * d * 40 >= CHEAP and not hard else 0.0
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 + left_out)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("hard", [False, True])
def test_statistics_without_second_moments_are_the_same_but_for_the_error(hard: bool, tied: bool) -> None:
    x, gmm = torch.from_numpy(topics(300, CHEAP // 40 + 1)), mixture(40, CHEAP // 40 + 1, tied=tied)
    less, whole = e_step(gmm, x, hard=hard, second_moments=False), e_step(gmm, x, hard=hard)
    assert less.sum_xx is None
    for name in ("count", "sum_x", "log_likelihood", "certainty"):
        torch.testing.assert_close(getattr(less, name), getattr(whole, name))
    code = gmm.log_joint(x).argmax(1)
    assert float(less.squared_error) == pytest.approx(float((x - gmm.means[code]).square().sum()), rel=1e-5)


def test_reused_memory_changes_no_statistic() -> None:
    gmm, scratch = mixture(40, 5), Scratch()
    for n in (300, 7, 300, 1):
        x = torch.from_numpy(topics(n, 5, seed=n))
        assert close(e_step(gmm, x, scratch=scratch), e_step(gmm, x))
        tied = isotropic(gmm.means, 0.3)
        assert torch.equal(annealing_step(tied, x, scratch).sum_x, annealing_step(tied, x).sum_x)


@pytest.mark.parametrize("tied", [False, True])
def test_densities_are_those_of_scikit_learn(tied: bool) -> None:
    gmm, x = mixture(6, 8, tied=tied), topics(50, 8)
    twin = sklearn_twin(gmm)
    np.testing.assert_allclose(gmm.log_joint(torch.from_numpy(x)).logsumexp(1), twin.score_samples(x), rtol=1e-4)
    np.testing.assert_allclose(gmm.responsibilities(torch.from_numpy(x)), twin.predict_proba(x), atol=1e-5)


def test_one_em_step_is_that_of_scikit_learn() -> None:
    gmm, x = mixture(4, 5), topics(300, 5, groups=4, spread=1.0)
    ours = m_step(e_step(gmm, torch.from_numpy(x)), gmm, shrinkage=0.0, fitted_weights=True, floor=1e-12)
    resp = sklearn_twin(gmm).predict_proba(x)
    nk = resp.sum(0)
    means = resp.T @ x / nk[:, None]
    np.testing.assert_allclose(ours.means, means, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours.variances, resp.T @ x**2 / nk[:, None] - means**2, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(ours.weights, nk / nk.sum(), atol=1e-4)


def test_likelihood_never_falls_under_em() -> None:
    x = torch.from_numpy(topics(400, 6, spread=0.7))
    gmm, last = mixture(8, 6), -np.inf
    for _ in range(15):
        stats = e_step(gmm, x)
        assert float(stats.log_likelihood) >= last - 1e-3
        last = float(stats.log_likelihood)
        gmm = m_step(stats, gmm, shrinkage=0.0, fitted_weights=True, floor=1e-9)


def test_means_far_from_zero_lose_no_digits() -> None:
    gmm, x = mixture(5, 4), torch.from_numpy(topics(100, 4))
    far = DiagonalGMM(gmm.weights, gmm.means + 1000, gmm.variances)
    agree = (far.affinity(x + 1000).argmax(1) == gmm.affinity(x).argmax(1)).float().mean()
    assert agree >= 0.98  # float32 itself rounds x + 1000


@pytest.mark.parametrize(
    "broken", [{"variances": torch.zeros(2, 3)}, {"means": torch.full((2, 3), torch.nan)}, {"weights": torch.ones(3)}]
)
def test_a_degenerate_mixture_cannot_be_built(broken: dict[str, torch.Tensor]) -> None:
    parts = {"weights": torch.full((2,), 0.5), "means": torch.zeros(2, 3), "variances": torch.ones(2, 3), **broken}
    with pytest.raises(DataError, match=r"expected|must be"):
        DiagonalGMM(**parts)
