"""Learned pieces: laws of segmentation and learning, against slow loops over all segmentations of a tuple."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.ctr.pieces import NO_PIECE, PRIOR, Pieces, em_step, learn

Run = tuple[int, tuple[int, ...]]  # first level, codes
few = settings(max_examples=20, deadline=None)
shapes = {"levels": st.integers(1, 4), "components": st.integers(1, 6), "seed": st.integers(0, 10**6)}


def some_tuples(levels: int, components: int, seed: int, rows: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, of which the low ones are likelier, with counts; some tuples occur in several rows."""
    g = np.random.default_rng(seed)
    codes = (components * g.random((rows, levels)) ** 2).astype(np.int64)
    return torch.from_numpy(codes), torch.from_numpy(g.integers(0, 30, rows))


def some_pieces(levels: int, components: int, seed: int) -> Pieces:
    """Pieces with random probabilities."""
    learned = learn(*some_tuples(levels, components, seed), components, levels * components + 10)
    log_prob = torch.rand(len(learned), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).log()
    return Pieces(components, learned.several, log_prob)


def by_run(pieces: Pieces) -> dict[Run, int]:
    """The number of each piece."""
    k = pieces.components
    found: dict[Run, int] = {(n // k, (n % k,)): n for n in range(pieces.single)}
    for number, row in enumerate(pieces.several.tolist(), pieces.single):
        first = next(level for level, code in enumerate(row) if code >= 0)
        found[first, tuple(code for code in row if code >= 0)] = number
    return found


def segmentations(codes: tuple[int, ...], first: int = 0) -> Iterator[list[Run]]:
    """All segmentations of codes."""
    if not codes:
        yield []
    for length in range(1, len(codes) + 1):
        for rest in segmentations(codes[length:], first + length):
            yield [(first, codes[:length]), *rest]


def log_prob_of(way: list[Run], numbers: dict[Run, int], log_prob: list[float]) -> float:
    return sum(log_prob[numbers[run]] if run in numbers else -math.inf for run in way)


@few
@given(**shapes)
def test_the_segmentation_is_a_most_probable_one_and_holds_each_code_once(
    levels: int, components: int, seed: int
) -> None:
    pieces = some_pieces(levels, components, seed)
    numbers, log_prob = by_run(pieces), pieces.log_prob.tolist()
    runs = {number: run for run, number in numbers.items()}
    codes, _ = some_tuples(levels, components, seed + 1)
    for own, found in zip(codes.tolist(), pieces.segment(codes).tolist(), strict=True):
        assert all(runs[number][0] == level for level, number in enumerate(found) if number >= 0)
        chosen = [runs[number] for number in found if number >= 0]
        assert [code for _, part in chosen for code in part] == own
        best = max(log_prob_of(way, numbers, log_prob) for way in segmentations(tuple(own)))
        assert log_prob_of(chosen, numbers, log_prob) == pytest.approx(best, abs=1e-12)


@few
@given(**shapes)
def test_a_step_of_em_is_that_of_a_slow_loop(levels: int, components: int, seed: int) -> None:
    codes, counts = some_tuples(levels, components, seed)
    codes, row = torch.unique(codes, dim=0, return_inverse=True)
    counts = torch.bincount(row, weights=counts.double())
    pieces = some_pieces(levels, components, seed)
    numbers, log_prob = by_run(pieces), pieces.log_prob.tolist()
    expected = np.zeros(len(pieces))
    likelihood = PRIOR * sum(log_prob[: pieces.single])
    for own, count in zip(codes.tolist(), counts.tolist(), strict=True):
        every = list(segmentations(tuple(own)))
        probability = [math.exp(log_prob_of(way, numbers, log_prob)) for way in every]
        likelihood += count * math.log(sum(probability))
        for way, share in zip(every, probability, strict=True):
            for run in way if share else []:
                expected[numbers[run]] += count * share / sum(probability)
    weight = expected + np.where(np.arange(len(pieces)) < pieces.single, PRIOR, 0)
    after, found, objective = em_step(pieces, pieces.runs(codes), counts)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    np.testing.assert_allclose(after.log_prob.exp(), weight / weight.sum(), atol=1e-12)
    assert objective == pytest.approx(likelihood, rel=1e-9)


@few
@given(**shapes)
def test_the_likelihood_never_falls(levels: int, components: int, seed: int) -> None:
    """From normalised probabilities on; it is that of the tuples and of the prior of single codes."""
    codes, row = torch.unique(some_tuples(levels, components, seed)[0], dim=0, return_inverse=True)
    counts = torch.bincount(row).double()
    pieces = some_pieces(levels, components, seed)
    pieces = Pieces(components, pieces.several, pieces.log_prob.log_softmax(0))
    runs, objectives = pieces.runs(codes), []
    for _ in range(12):
        pieces, _, objective = em_step(pieces, runs, counts)
        objectives.append(objective)
    assert (np.diff(objectives) >= -1e-9 * abs(objectives[0])).all()


@few
@given(**shapes, extra=st.integers(0, 40))
def test_what_is_learned_is_bounded_and_depends_on_counts_only(
    levels: int, components: int, seed: int, extra: int
) -> None:
    codes, counts = some_tuples(levels, components, seed)
    size = levels * components + extra
    pieces = learn(codes, counts, components, size)
    assert len(pieces) <= size
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(seed))
    assert learn(codes[order], counts[order], components, size) == pieces
    part = counts // 3
    split = learn(torch.cat([codes, codes]), torch.cat([part, counts - part]), components, size)
    assert split == pieces
    seen = {tuple(row) for row, count in zip(codes.tolist(), counts.tolist(), strict=True) if count}
    for first, run in by_run(pieces):
        assert len(run) == 1 or any(row[first : first + len(run)] == run for row in seen)


@few
@given(levels=st.integers(2, 4), seed=st.integers(0, 10**6))
def test_tuples_that_are_seen_often_become_one_piece(levels: int, seed: int) -> None:
    """Ten tuples seen 400 times each among 600 that are seen once; there is room for ten pieces of several codes."""
    g = np.random.default_rng(seed)
    codes = torch.from_numpy(np.unique(g.integers(0, 30, (700, levels)), axis=0))
    codes = codes[torch.from_numpy(g.permutation(len(codes)))]
    counts = torch.ones(len(codes), dtype=torch.int64)
    counts[:10] = 400
    pieces = learn(codes, counts, 30, levels * 30 + 10)
    found = pieces.segment(codes[:10])
    assert ((found >= 0).sum(1) == 1).all()
    assert (found[:, 0] >= pieces.single).all()


def test_without_tuples_the_pieces_are_the_single_codes() -> None:
    pieces = learn(torch.empty(0, 2, dtype=torch.int64), torch.empty(0, dtype=torch.int64), 5, 100)
    assert (len(pieces), pieces.single) == (10, 10)
    assert pieces.segment(torch.tensor([[4, 0]])).tolist() == [[4, 5]]


def test_the_content_of_pieces_decides_whether_they_are_equal() -> None:
    one = some_pieces(3, 4, 1)
    assert one == Pieces(4, one.several.clone(), one.log_prob.clone())
    assert one != Pieces(4, one.several, one.log_prob - 1)
    assert one != some_pieces(3, 4, 2)


@pytest.mark.parametrize(
    ("several", "log_prob", "message"),
    [
        ([[1, -1]], [0.0] * 5, "no run of at least two codes below 2"),
        ([[1, 2]], [0.0] * 5, "no run of at least two codes below 2"),
        ([[1, 1], [1, 1]], [0.0] * 6, "one occurs twice"),
        ([[1, 1]], [0.0] * 6, r"shape \(6,\); expected a finite number for each of 4 single codes and 1 pieces"),
        ([[1, 1]], [0.0] * 4 + [-math.inf], "expected a finite number"),
        ([[1] * 9], [0.0] * 19, "9 levels; learned pieces need 1 to 8"),
    ],
)
def test_pieces_that_are_none_cannot_be_made(several: list[list[int]], log_prob: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pieces(2, torch.tensor(several, dtype=torch.int32), torch.tensor(log_prob, dtype=torch.float64))


def test_a_piece_has_no_gap() -> None:
    with pytest.raises(ValueError, match="no run"):
        Pieces(2, torch.tensor([[1, -1, 1]], dtype=torch.int32), torch.zeros(7, dtype=torch.float64))


@pytest.mark.parametrize(
    ("code", "count", "size", "message"),
    [
        (0, 1, 3, "3 pieces; expected at least one for each of 2 x 2 single codes"),
        (2, 1, 9, "expected codes of 0 to 1"),
        (-1, 1, 9, "expected codes of 0 to 1"),
        (0, -1, 9, "counts from 0"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(code: int, count: int, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learn(torch.tensor([[0, code]]), torch.tensor([count]), 2, size)


def test_a_piece_that_nothing_needs_has_the_least_probability() -> None:
    """It is no -inf, which would not be a number to store or to add to."""
    pieces = some_pieces(2, 4, 3)
    after, _, _ = em_step(pieces, pieces.runs(torch.empty(0, 2, dtype=torch.int64)), torch.empty(0))
    assert (after.log_prob[after.single :] == NO_PIECE).all()
    assert after.log_prob[: after.single].exp().sum() == pytest.approx(1)
