"""The same laws on a GPU: statistics, codes but for near-ties, quality of the fit. Run with `pytest -m gpu` where there
is one.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from data import topics

from tokenizer import RQGMM, e_step, fit_rqgmm, measure_quality
from tokenizer.annealing import ANNEALING_TRUNCATION
from tokenizer.collectives import sum_statistics
from tokenizer.gmm import hard_e_step, spherical_gmm

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")]
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.from_numpy(topics(40_000, 96, groups=300, spread=0.6))


@pytest.fixture(scope="module")
def rqgmm(x: torch.Tensor) -> RQGMM:
    return fit_rqgmm(x, levels=3, components=128, seed=0).rqgmm


def test_statistics_are_those_of_the_cpu(x: torch.Tensor) -> None:
    gmm = spherical_gmm(x[:64].clone(), 0.9)
    annealing_step = partial(e_step, second_moments=False, truncation=ANNEALING_TRUNCATION)
    for step in (annealing_step, hard_e_step, e_step):
        here, there = step(gmm, x[:8192]), sum_statistics(step(gmm.to(CUDA), x[:8192].to(CUDA)))
        torch.testing.assert_close(there.count, here.count, rtol=1e-3, atol=1.0)
        torch.testing.assert_close(there.sum_x, here.sum_x, rtol=1e-3, atol=1.0)
        assert float(there.squared_error) == pytest.approx(float(here.squared_error), rel=1e-4)


@pytest.mark.parametrize("beam", [1, 4])
def test_codes_are_those_of_the_cpu_but_for_near_ties(x: torch.Tensor, rqgmm: RQGMM, beam: int) -> None:
    searched = replace(rqgmm, beam=beam)
    here, there = searched.encode(x), searched.to(CUDA).encode(x.to(CUDA)).cpu()
    differ = (here != there).any(1)
    assert float(differ.float().mean()) < 1e-3
    errors = [(x - rqgmm.decode(codes)).square().sum(1)[differ] for codes in (here, there)]
    torch.testing.assert_close(*errors, rtol=1e-2, atol=1e-3)


def test_posteriors_are_those_of_the_cpu(x: torch.Tensor, rqgmm: RQGMM) -> None:
    here, there = rqgmm.assign(x), rqgmm.to(CUDA).assign(x.to(CUDA))
    same = (here.codes == there.codes.cpu()).all(1)
    torch.testing.assert_close(there.log_likelihood.cpu()[same], here.log_likelihood[same], rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(there.confidence.cpu()[same], here.confidence[same], rtol=0, atol=1e-2)


@pytest.mark.parametrize("batches", [False, True])
def test_a_fit_is_as_good_and_repeats_itself(x: torch.Tensor, rqgmm: RQGMM, batches: bool) -> None:
    data = list(x.split(3000)) if batches else x
    fits = [fit_rqgmm(data, levels=3, components=128, seed=0, device=CUDA).rqgmm for _ in range(2)]
    assert all(torch.equal(a.means, b.means) for a, b in zip(fits[0].levels, fits[1].levels, strict=True))
    there, here = (measure_quality(x, model.encode(x), model) for model in (fits[0], rqgmm))
    assert there.rmse == pytest.approx(here.rmse, rel=5e-3)
    assert all(level.dead == 0 for level in there.levels)
