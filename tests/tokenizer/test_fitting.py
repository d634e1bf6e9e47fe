"""The fit: batches, threads and processes change nothing, k-means is beaten, every component has rows."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from operator import add
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from data import topics
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.mixture import GaussianMixture

from tokenizer import (
    FIT_BLOCK,
    RQGMM,
    DataError,
    GMMStatistics,
    e_step,
    fit_rqgmm,
    load_codebook,
    measure_quality,
)
from tokenizer.annealing import ANNEALING_TRUNCATION
from tokenizer.collectives import on_grid
from tokenizer.data import Residuals, Rows
from tokenizer.dead_components import reassign_dead_components, worst_rows
from tokenizer.gmm import spherical_gmm
from tokenizer.kernels import DENSE_CELLS
from tokenizer.start import distinct_rows, largest_eigenvalue


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.from_numpy(topics(3000, 24, groups=40, spread=0.5))


def test_the_number_of_threads_changes_neither_fit_nor_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.from_numpy(topics(5000, 48, groups=60, spread=0.5))
    many = x.repeat(3, 1)[:-7]  # blocks enough for every thread to have its own
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            fit = fit_rqgmm(x, levels=2, components=64, seed=0)  # one block, by all threads
            rqgmm = fit.rqgmm
            assigned = rqgmm.assign(many)
            with monkeypatch.context() as patch:
                patch.setattr("tokenizer.data.FIT_BLOCK", 512)  # ten, each by one thread
                fits = [
                    fit_rqgmm(data, levels=2, components=64, seed=0, beam=b).rqgmm
                    for data in (x, x.split(777))
                    for b in (1, 2)
                ]
            results.append(
                [
                    torch.tensor(
                        [[step.temperature, step.rmse, step.max_posterior] for step in fit.trace], dtype=torch.float64
                    )
                ]
                + [rqgmm.encode(many), assigned.codes, assigned.confidence, assigned.log_likelihood]
                + [level.means for fitted in (rqgmm, *fits) for level in fitted.levels]
            )
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == before
    assert all(torch.equal(one, other) for others in results[1:] for one, other in zip(results[0], others, strict=True))


def test_chunks_of_the_data_do_not_change_the_fit() -> None:
    x = torch.from_numpy(topics(2 * FIT_BLOCK + 100, 8, groups=30, spread=0.4))
    whole = fit_rqgmm(x, levels=2, components=8, seed=1, iterations=8).rqgmm
    for size in (1000, 7777, len(x)):
        chunked = fit_rqgmm(list(x.split(size)), levels=2, components=8, seed=1, iterations=8).rqgmm
        for a, b in zip(whole.levels, chunked.levels, strict=True):
            assert torch.equal(a.means, b.means)


def test_a_beam_in_batches_is_the_beam_of_the_whole() -> None:
    x = torch.from_numpy(topics(FIT_BLOCK + 300, 6, groups=30, spread=0.4))
    whole = fit_rqgmm(x, levels=3, components=8, seed=0, beam=3, iterations=8).rqgmm
    batches = fit_rqgmm(list(x.split(900)), levels=3, components=8, seed=0, beam=3, iterations=8).rqgmm
    assert whole.beam == batches.beam == 3
    for a, b in zip(whole.levels, batches.levels, strict=True):
        assert torch.equal(a.means, b.means)


def test_a_fit_with_a_beam_serves_new_items_better_than_faiss_s() -> None:
    x = torch.from_numpy(topics(4400, 12, groups=300, spread=0.7, seed=5))
    train, new = x[:4000], x[4000:]
    ours = fit_rqgmm(train, levels=3, components=32, seed=0, beam=5).rqgmm
    theirs = faiss.ResidualQuantizer(12, 3, 5)
    theirs.max_beam_size = 5
    theirs.train(train.numpy())
    rebuilt = theirs.decode(theirs.compute_codes(new.numpy()))
    error = float((new - ours.decode(ours.encode(new))).square().mean())
    assert error < 1.01 * float(((new.numpy() - rebuilt) ** 2).mean())


@pytest.mark.parametrize("dim", [6, 96])
def test_annealing_beats_residual_k_means(dim: int) -> None:
    x = torch.from_numpy(topics(4000, dim, groups=200, spread=0.6, seed=3))
    ours = fit_rqgmm(x, levels=2, components=32, seed=0).rqgmm
    rest = x.numpy().copy()
    for level in range(2):
        kmeans = faiss.Kmeans(dim, 32, niter=100, seed=level, min_points_per_centroid=1, max_points_per_centroid=10**9)
        kmeans.train(rest)
        rest -= kmeans.centroids[kmeans.index.search(rest, 1)[1][:, 0]]
    quality = measure_quality(x, ours.encode(x), ours)
    assert quality.rmse < 1.005 * math.sqrt((rest**2).mean())
    assert all(level.dead == 0 for level in quality.levels)


def test_the_k_means_limit_is_a_fixed_point_of_lloyd(x: torch.Tensor) -> None:
    means = fit_rqgmm(x, levels=1, components=10, seed=0, method="kmeans", iterations=100).rqgmm.levels[0].means
    code = torch.cdist(x, means).argmin(1)
    again = torch.stack([x[code == k].mean(0) for k in range(10)])
    torch.testing.assert_close(again, means, rtol=1e-3, atol=1e-3)


def test_a_warm_start_moves_few_codes_and_a_free_refit_many(x: torch.Tensor) -> None:
    champion = fit_rqgmm(x[:2700], levels=2, components=16, seed=0, iterations=20).rqgmm
    before = champion.encode(x[:2700])
    warm = fit_rqgmm(x, levels=2, components=16, seed=0, init=champion).rqgmm.encode(x[:2700])
    free = fit_rqgmm(x, levels=2, components=16, seed=9, iterations=20).rqgmm.encode(x[:2700])
    churn_warm, churn_free = ((codes != before).any(1).float().mean() for codes in (warm, free))
    assert churn_warm < 0.1 < 0.5 < churn_free


def test_the_largest_eigenvalue_is_that_of_the_covariance() -> None:
    x = torch.from_numpy(topics(500, 12, spread=1.0))
    exact = np.linalg.eigvalsh(np.cov(x.double().numpy().T, bias=True))[-1]
    assert largest_eigenvalue(x, x.double().mean(0)) == pytest.approx(exact, rel=1e-4)


def test_a_start_has_distinct_rows_where_there_are_as_many() -> None:
    rows = torch.arange(5.0).repeat(20)[:, None]
    assert len(torch.unique(distinct_rows(rows, 5, 0))) == 5
    assert distinct_rows(rows, 8, 0).shape == (8, 1)
    assert torch.equal(distinct_rows(rows, 8, 3), distinct_rows(rows, 8, 3))


def test_dead_components_move_to_the_rows_of_the_largest_error() -> None:
    x = torch.tensor([[0.0], [0.0], [5.0], [5.0], [9.0], [0.1]])
    residuals = Residuals(Rows(x, 1, torch.device("cpu")), beam=1)
    gmm = spherical_gmm(torch.tensor([[0.0], [-100.0], [-200.0], [-300.0]]), 1.0)
    rows, errors = worst_rows(gmm, 3, residuals)
    assert rows[:, 0].tolist() == pytest.approx([9.0, 5.0, 0.1])  # 5 counts once
    assert errors.tolist() == pytest.approx([81.0, 25.0, 0.01])
    dead = torch.tensor([False, True, False, True])
    moved = reassign_dead_components(gmm, dead, residuals)
    assert moved.means[:, 0].tolist() == [0.0, 9.0, -200.0, 5.0]
    assert reassign_dead_components(gmm, dead & False, residuals) is gmm


@pytest.mark.parametrize(
    "nasty",
    [
        torch.ones(64, 4),
        torch.arange(5.0).repeat(20)[:, None] * torch.ones(1, 4),
        torch.cat([torch.zeros(5000, 4), torch.eye(4)]),
        torch.cat([torch.randn(100, 1, generator=torch.Generator().manual_seed(0)), torch.full((100, 3), 7.0)], dim=1),
    ],
    ids=["one point", "five points", "one item many times", "constant columns"],
)
def test_degenerate_data_gives_finite_codes(nasty: torch.Tensor) -> None:
    rqgmm = fit_rqgmm(nasty, levels=2, components=8, seed=0, iterations=10).rqgmm
    codes = rqgmm.encode(nasty)
    assert int(codes.min()) >= 0
    assert int(codes.max()) < 8
    distinct = len(torch.unique(nasty, dim=0))
    if distinct <= 8:
        torch.testing.assert_close(rqgmm.decode(codes), nasty, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("rows", "dim", "components"), [(2400, 6, 1000), (600, 300, 256), (64, 3, 64)])
def test_no_component_is_left_without_rows_however_few_there_are(rows: int, dim: int, components: int) -> None:
    x = torch.randn(rows, dim, generator=torch.Generator().manual_seed(0))
    rqgmm = fit_rqgmm(x, levels=1, components=components, seed=0, iterations=15).rqgmm
    assert len(torch.unique(rqgmm.encode(x))) == components


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (torch.zeros(3, 4), "3 embeddings are fewer than 8 components"),
        (torch.full((20, 4), torch.nan), "NaN or Inf"),
        ([torch.zeros(10, 4), torch.zeros(10, 5)], "expected \\(n, 4\\) in every batch"),
        ([], "no embeddings"),
    ],
)
def test_data_that_cannot_be_fitted_is_refused(data: torch.Tensor, says: str) -> None:
    with pytest.raises(DataError, match=says):
        fit_rqgmm(data, levels=1, components=8, seed=0)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_any_number_of_processes_of_torchrun_gives_the_codebook_of_one(tmp_path: Path, world: int) -> None:
    """Four blocks: two ranks have equal shares, three unequal ones, of five one has none."""
    script = Path(__file__).with_name("fit_under_torchrun.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    tests = Path(__file__).parents[1]
    path = {"PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}  # the packages, then tests/data.py
    subprocess.run([*torchrun, str(script), str(tmp_path)], env=os.environ | path, check=True, timeout=240)
    x = torch.from_numpy(topics(4 * FIT_BLOCK, 8, groups=30, spread=0.4))
    one = fit_rqgmm(x, levels=2, components=8, seed=1).rqgmm
    many = load_codebook(tmp_path).rqgmm
    assert torch.equal(one.encode(x), many.encode(x))
    for a, b in zip(one.levels, many.levels, strict=True):
        assert torch.equal(a.means, b.means)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 60), seed=st.integers(0, 9), scale=st.sampled_from([1e-3, 1.0, 300.0]))
def test_rounded_statistics_add_to_the_same_bits_in_any_order(rows: int, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(rows, 4, generator=generator)
    gmm = spherical_gmm(scale * torch.randn(3, 4, generator=generator), scale**2)
    parts = [on_grid(e_step(gmm, row), rows, float(x.abs().amax())) for row in x.split(1)]
    order = torch.randperm(rows, generator=generator).tolist()
    forward, shuffled = reduce(add, parts), reduce(add, [parts[n] for n in order])
    for name in ("count", "sum_x", "sum_xx", "squared_error", "log_likelihood", "max_posterior"):
        assert torch.equal(getattr(forward, name), getattr(shuffled, name))
    exact = e_step(gmm, x).sum_x
    torch.testing.assert_close(forward.sum_x, exact, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("dim", [24, DENSE_CELLS // 16 + 1], ids=["dense", "sparse"])
def test_a_mixture_of_t_times_the_variance_is_the_one_at_temperature_t(dim: int) -> None:
    """Responsibilities softmax(log-joint / T) (Rose 1998) are those of an e_step with T times the variance."""
    x = torch.from_numpy(topics(1000, dim, groups=40, spread=0.4))
    gmm = spherical_gmm(x[:16].clone(), 0.3)
    for temperature in (30.0, 3.0, 0.5):
        hot = spherical_gmm(gmm.means, temperature * 0.3)
        stats = e_step(hot, x, second_moments=False, truncation=ANNEALING_TRUNCATION)
        resp = (gmm.log_joint(x).double() / temperature).softmax(1)
        distance = torch.cdist(x.double(), gmm.means.double()).square()
        torch.testing.assert_close(stats.count, resp.sum(0), rtol=2e-3, atol=2.0)  # what is truncated counts elsewhere
        torch.testing.assert_close(stats.sum_x, resp.T @ x.double(), rtol=2e-3, atol=2.0)
        assert float(stats.count.sum()) == pytest.approx(len(x), rel=1e-5)
        assert float(stats.squared_error) == pytest.approx(float((resp * distance).sum()), rel=1e-3)
        assert float(stats.max_posterior) == pytest.approx(float(resp.amax(1).sum()), rel=ANNEALING_TRUNCATION)


@pytest.mark.parametrize("beam", [1, 3])
def test_residuals_in_memory_are_those_streamed(beam: int) -> None:
    x = torch.from_numpy(topics(FIT_BLOCK + 700, 6, groups=30, spread=0.4))
    levels = fit_rqgmm(x, levels=2, components=8, seed=0, iterations=8).rqgmm.levels
    sources = [Residuals(Rows(data, 8, torch.device("cpu")), beam) for data in (x, x.split(900))]
    totals: list[GMMStatistics] = []
    for residuals in sources:
        for gmm in levels:
            residuals.descend(gmm)
        totals.append(residuals.sum(lambda rows: e_step(levels[0], rows), 8))
    rows = [torch.cat(list(residuals)) for residuals in sources]
    assert len(rows[0]) == sources[0].rows == beam * len(x)
    assert torch.equal(*rows)
    assert all(torch.equal(getattr(totals[0], name), getattr(totals[1], name)) for name in ("count", "sum_x", "sum_xx"))
    greedy = RQGMM(levels, beam=beam)
    if beam == 1:
        torch.testing.assert_close(rows[0], x - greedy.decode(greedy.encode(x)), rtol=1e-4, atol=1e-5)


def test_clusters_far_tighter_than_apart_are_found() -> None:
    """The critical temperature is a million variances here, so annealing must hurry through where nothing splits."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(20, 6, generator=generator)
    x = centres.repeat_interleave(60, 0) + 1e-3 * torch.randn(1200, 6, generator=generator)
    rqgmm = fit_rqgmm(x, levels=1, components=20, seed=0).rqgmm
    assert float((x - rqgmm.decode(rqgmm.encode(x))).square().mean().sqrt()) < 0.1


def test_the_paper_s_model_is_scikit_learn_s_mixture() -> None:
    """Diagonal EM from the same start: the same likelihood, means and variances."""
    x = torch.from_numpy(topics(1500, 5, groups=6, spread=1.0))
    fit = fit_rqgmm(x, levels=1, components=6, seed=0, method="em", iterations=400)
    gmm = fit.rqgmm.levels[0]
    start = gmm.means.double().numpy()
    theirs = GaussianMixture(6, covariance_type="diag", means_init=start, max_iter=2000, reg_covar=1e-9, tol=1e-6)
    theirs.fit(x.double().numpy())
    ours = fit.trace[-1].log_likelihood
    assert ours is not None
    assert ours == pytest.approx(theirs.score(x.double().numpy()), abs=2e-2)


def test_a_refit_of_the_paper_s_model_is_em_from_the_champion(x: torch.Tensor) -> None:
    champion = fit_rqgmm(x, levels=2, components=8, seed=0, method="em").rqgmm
    again = fit_rqgmm(x, levels=2, components=8, seed=5, method="em", init=champion)
    assert {step.temperature for step in again.trace} == {1.0}
    assert (again.rqgmm.encode(x) == champion.encode(x)).float().mean() > 0.9


def test_the_rq_k_means_limit_is_as_good_as_faiss(x: torch.Tensor) -> None:
    ours = fit_rqgmm(x, levels=1, components=40, seed=0, method="kmeans").rqgmm
    kmeans = faiss.Kmeans(24, 40, niter=100, seed=1, min_points_per_centroid=1, max_points_per_centroid=10**9)
    kmeans.train(x.numpy())
    error = float((x - ours.decode(ours.encode(x))).square().sum())
    assert error == pytest.approx(float(kmeans.index.search(x.numpy(), 1)[0].sum()), rel=0.25)
    assert (ours.levels[0].variances == ours.levels[0].variances[0, 0]).all()
