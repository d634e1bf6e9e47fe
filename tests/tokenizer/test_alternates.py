"""Soft semantic IDs: laws of the alternates, their slow loop, and the calibration of the temperatures."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from data import topics
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tokenizer import RQGMM, CodebookError, DataError, fit_rqgmm, load, save_codebook
from tokenizer.alternates import ALTERNATES, FULL_WEIGHT, TEMPERATURES, calibrated, rounded
from tokenizer.gmm import spherical_gmm

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.from_numpy(topics(3000, 24, groups=40, spread=0.5))


@pytest.fixture(scope="module")
def rqgmm(x: torch.Tensor) -> RQGMM:
    return fit_rqgmm(x, levels=2, components=16, seed=0, iterations=20).rqgmm


def slow_alternates(
    rqgmm: RQGMM, row: np.ndarray, codes: list[int], top: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Codes and weights of one row along its path, level by level, as their definition says."""
    residual, all_codes, all_weights = row.astype(np.float64), [], []
    for gmm, own, temperature in zip(rqgmm.levels, codes, rqgmm.temperatures, strict=True):
        means, variances = gmm.means.double().numpy(), gmm.variances.double().numpy()
        joint = -0.5 * (np.log(2 * np.pi * variances) + (residual - means) ** 2 / variances).sum(1)
        joint += gmm.weights.double().log().numpy()
        others = sorted((k for k in range(len(means)) if k != own), key=lambda k: (-joint[k], k))
        listed = [own, *others[: top - 1]]
        share = np.exp((joint[listed] - joint[listed].max()) / temperature)
        exact = [Fraction(value) * FULL_WEIGHT / Fraction(share.sum()) for value in share]
        weights = [math.floor(value) for value in exact]
        for place in sorted(range(len(listed)), key=lambda p: (weights[p] - exact[p], p))[: FULL_WEIGHT - sum(weights)]:
            weights[place] += 1
        all_codes.append(listed)
        all_weights.append(weights)
        residual = residual - means[own]
    return all_codes, all_weights


@pytest.mark.parametrize("method", ["annealed", "em"])
@pytest.mark.parametrize("of_another", [False, True], ids=["own codes", "given codes"])
def test_alternates_are_the_slow_loop(x: torch.Tensor, method: str, of_another: bool) -> None:
    rqgmm = fit_rqgmm(x, levels=2, components=12, seed=1, iterations=15, method=method).rqgmm  # type: ignore[arg-type]
    rqgmm = replace(rqgmm, temperatures=(3.0, 1.5))
    codes = rqgmm.encode(x[:60])
    if of_another:
        codes = (codes + 5) % 12
    result = rqgmm.alternates(x[:60], codes, 5)
    expected = [slow_alternates(rqgmm, row, own, 5) for row, own in zip(x[:60].numpy(), codes.tolist(), strict=True)]
    np.testing.assert_array_equal(result.codes, [codes for codes, _ in expected])
    # float32 scores may move a unit from one code to another, where remainders are nearly equal
    assert np.abs(result.weights.numpy().astype(int) - np.array([weights for _, weights in expected])).max() <= 1


@settings(max_examples=25, deadline=None)
@given(top=st.integers(1, 20), shift=st.integers(0, 15), temperature=st.floats(0.01, 1e4), rows=st.integers(1, 40))
def test_laws(x: torch.Tensor, rqgmm: RQGMM, top: int, shift: int, temperature: float, rows: int) -> None:
    """The ID's own code comes first, codes are distinct, the others' weights descend, all sum to 255, whatever the
    codes.
    """
    soft = replace(rqgmm, temperatures=(temperature, temperature))
    codes = (rqgmm.encode(x[:rows]) + shift) % 16
    result = soft.alternates(x[:rows], codes, top)
    assert result.codes.shape == result.weights.shape == (rows, 2, min(top, 16))
    assert (result.codes.dtype, result.weights.dtype) == (torch.int32, torch.uint8)
    assert torch.equal(result.codes[:, :, 0], codes)
    assert (result.codes.sort(2).values.diff(dim=2) > 0).all()
    assert (result.weights.sum(2) == FULL_WEIGHT).all()
    assert (result.weights[:, :, 1:].int().diff(dim=2) <= 1).all()  # a remainder may lift a later one by a unit


@settings(max_examples=15, deadline=None)
@given(cut=st.lists(st.integers(1, 2999), max_size=4), seed=st.integers(0, 5))
def test_alternates_do_not_depend_on_batches_or_order(x: torch.Tensor, rqgmm: RQGMM, cut: list[int], seed: int) -> None:
    whole = rqgmm.assign(x, alternates=8)
    assert whole.alternates is not None
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    for parts, expected in ((torch.tensor_split(x, sorted(set(cut))), slice(None)), ((x[order],), order)):
        result = [rqgmm.assign(part, alternates=8).alternates for part in parts]
        assert torch.equal(torch.cat([part.codes for part in result if part]), whole.alternates.codes[expected])
        assert torch.equal(torch.cat([part.weights for part in result if part]), whole.alternates.weights[expected])
    # The codes and all else are those of an encoding without alternates.
    plain = rqgmm.assign(x)
    assert torch.equal(plain.codes, whole.codes)
    assert torch.equal(plain.confidence, whole.confidence)
    assert torch.equal(plain.log_likelihood, whole.log_likelihood)
    assert plain.alternates is None


@pytest.mark.parametrize("beam", [1, 4])
def test_the_code_is_the_first_alternate_and_without_a_beam_the_heaviest(
    x: torch.Tensor, rqgmm: RQGMM, beam: int
) -> None:
    result = replace(rqgmm, beam=beam).assign(x, alternates=4)
    assert result.alternates is not None
    assert torch.equal(result.alternates.codes[:, :, 0], result.codes)
    weights = result.alternates.weights.int()
    assert bool((weights[:, :, 0] + 1 >= weights.amax(2)).all()) == (beam == 1)


def test_the_lowest_index_wins_a_tie() -> None:
    twins = RQGMM((spherical_gmm(torch.zeros(6, 3), 1.0),), temperatures=(2.0,))
    result = twins.alternates(torch.ones(4, 3), torch.tensor([[0], [2], [5], [4]]).int(), 4)
    assert result.codes[:, 0].tolist() == [[0, 1, 2, 3], [2, 0, 1, 3], [5, 0, 1, 2], [4, 0, 1, 2]]
    assert result.weights[:, 0].tolist() == [[64, 64, 64, 63]] * 4


def test_without_temperatures_the_own_code_has_all_the_weight(x: torch.Tensor, rqgmm: RQGMM) -> None:
    hard = replace(rqgmm, temperatures=())
    codes = (rqgmm.encode(x[:50]) + 3) % 16
    result, soft = hard.alternates(x[:50], codes, 4), rqgmm.alternates(x[:50], codes, 4)
    assert torch.equal(result.codes[:, :, 0], codes)
    assert result.weights.flatten(0, 1).tolist() == [[FULL_WEIGHT, 0, 0, 0]] * 100
    assert torch.equal(result.codes.sort(2).values, soft.codes.sort(2).values)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12).filter(lambda shares: sum(shares) > 0))
def test_rounding_is_by_largest_remainder(shares: list[float]) -> None:
    share = torch.tensor([shares], dtype=torch.float64) / sum(shares)
    weights = rounded(share)[0].tolist()
    assert sum(weights) == FULL_WEIGHT
    exact = (share[0] * FULL_WEIGHT).tolist()
    assert all(abs(weight - value) < 1 for weight, value in zip(weights, exact, strict=True))
    up = [value - math.floor(value) for weight, value in zip(weights, exact, strict=True) if weight > math.floor(value)]
    down = [
        value - math.floor(value) for weight, value in zip(weights, exact, strict=True) if weight <= math.floor(value)
    ]
    assert not up or not down or min(up) >= max(down)


# ---- calibration ----


@pytest.mark.parametrize("prior", [0, 1])
def test_the_temperature_is_that_of_the_best_leave_one_out_reconstruction(x: torch.Tensor, prior: int) -> None:
    """Against a loop that takes each row out of its component and fits that mean anew."""
    rows = x[:200].double()
    near = torch.cdist(rows, rows[:12])
    codes = near.argmin(1)
    mean = rows.mean(0)
    sums = torch.zeros(12, 24, dtype=torch.float64).index_add(0, codes, rows)
    count = torch.bincount(codes, minlength=12)
    assert int(count.min()) > 1
    means = (sums + prior * mean) / (count + prior)[:, None]  # as fitted, the prior's rows at the mean of all
    gmm = spherical_gmm(means.float(), 0.5)
    errors = np.zeros(len(TEMPERATURES))
    for row, code in zip(rows, codes.tolist(), strict=True):
        others = sorted((k for k in range(12) if k != code), key=lambda k: float((row - means[k]).square().sum()))
        centres = means[[code, *others[: ALTERNATES - 1]]].clone()
        centres[0] = (sums[code] - row + prior * mean) / (count[code] - 1 + prior)
        distance = (row - centres).square().sum(1) / (2 * 0.5)
        for place, temperature in enumerate(TEMPERATURES):
            weights = (-distance / temperature).softmax(0)
            errors[place] += float((row - weights @ centres).square().sum())
    result = calibrated([gmm], x[:200], codes[:, None].int(), 200, prior)
    assert result == (TEMPERATURES[int(errors.argmin())],)
    assert TEMPERATURES[0] < result[0] < TEMPERATURES[-1]


def test_soft_ids_reconstruct_rows_that_the_fit_has_not_seen_better_than_hard_ones(x: torch.Tensor) -> None:
    rqgmm = fit_rqgmm(x[:2700], levels=2, components=16, seed=0).rqgmm
    residual = x[2700:]
    result = rqgmm.assign(residual, alternates=8)
    assert result.alternates is not None
    for level, gmm in enumerate(rqgmm.levels):
        weights = result.alternates.weights[:, level, :, None].float() / FULL_WEIGHT
        soft = (gmm.means[result.alternates.codes[:, level].long()] * weights).sum(1)
        hard = gmm.means[result.codes[:, level].long()]
        assert float((residual - soft).square().mean()) < 0.99 * float((residual - hard).square().mean())
        residual = residual - hard


def test_rows_all_alike_are_calibrated_too() -> None:
    rqgmm = fit_rqgmm(torch.ones(50, 4), levels=2, components=3, seed=0).rqgmm
    result = rqgmm.assign(torch.ones(5, 4), alternates=8)
    assert result.alternates is not None
    assert (result.alternates.weights.sum(2) == FULL_WEIGHT).all()


# ---- files ----


def test_temperatures_are_part_of_the_content(rqgmm: RQGMM, tmp_path: Path) -> None:
    name = save_codebook(tmp_path / "soft", rqgmm, {})
    again = load(tmp_path / "soft", expect_hash=name)
    assert again.rqgmm.temperatures == rqgmm.temperatures
    assert len(rqgmm.temperatures) == 2
    others = [replace(rqgmm, temperatures=()), replace(rqgmm, temperatures=(1.0, 2.0))]
    assert len({name, *(save_codebook(tmp_path / str(n), other, {}) for n, other in enumerate(others))}) == 3


def test_codebooks_of_format_1_have_hard_alternates() -> None:
    codebook = load(GOLDEN / "annealed")
    ids = codebook.encode(load_file(GOLDEN / "annealed" / "expected.safetensors")["x"], alternates=3)
    assert codebook.rqgmm.temperatures == ()
    assert ids.alternates is not None
    assert torch.equal(ids.alternates.codes[:, :, 0], ids.codes)
    assert (ids.alternates.weights[:, :, 0] == FULL_WEIGHT).all()


@pytest.mark.parametrize(
    "temperatures",
    [None, torch.ones(3), torch.ones(2).double(), torch.tensor([1.0, -1.0]), torch.tensor([1.0, math.nan])],
    ids=str,
)
def test_wrong_temperatures_in_a_file_are_refused(
    rqgmm: RQGMM, tmp_path: Path, temperatures: torch.Tensor | None
) -> None:
    save_codebook(tmp_path, rqgmm, {})
    tensors = load_file(tmp_path / "codebook.safetensors")
    tensors.pop("temperatures")
    save_file(
        tensors if temperatures is None else {**tensors, "temperatures": temperatures},
        tmp_path / "codebook.safetensors",
    )
    with pytest.raises(CodebookError, match="damaged"):
        load(tmp_path)


def test_wrong_arguments_are_refused(x: torch.Tensor, rqgmm: RQGMM) -> None:
    with pytest.raises(DataError, match="1 temperatures for 2 levels"):
        replace(rqgmm, temperatures=(1.0,))
    with pytest.raises(DataError, match="alternates is -1"):
        rqgmm.assign(x, alternates=-1)
    with pytest.raises(DataError, match="top is 0"):
        rqgmm.alternates(x, rqgmm.encode(x), 0)
