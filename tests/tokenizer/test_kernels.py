"""Each fast function against its plain version."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer import kernels
from tokenizer.kernels import (
    CACHED_ROWS,
    DENSE_CELLS,
    GroupedRows,
    add_rows,
    argmax,
    exp_minus,
    linear,
    parallel_map,
    pieces,
    responsibilities,
    squared_distances,
    squared_norms,
    sums_by_code,
    top_k,
    weighted_squares,
)

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 700), d=st.sampled_from([1, 7, 16, 100, 384]), k=st.integers(1, 130), seed=st.integers(0, 9))
def test_linear_is_the_plain_product_and_a_row_depends_neither_on_the_others_nor_on_the_threads(
    n: int, d: int, k: int, seed: int
) -> None:
    x, weight, bias = random(n, d, seed=seed), random(k, d, seed=seed + 1), random(k, seed=seed + 2)
    result = linear(x, weight, bias)
    assert torch.allclose(result.double(), x.double() @ weight.double().T + bias.double(), atol=1e-4)
    order, threads = torch.randperm(n, generator=torch.Generator().manual_seed(seed)), torch.get_num_threads()
    assert torch.equal(linear(x[order], weight, bias), result[order])
    for rows in (1, 2, 3, n // 2):
        assert torch.equal(linear(x[:rows], weight, bias), result[:rows])
    try:
        for other in (1, 2, 3):
            torch.set_num_threads(other)
            assert torch.equal(linear(x, weight, bias), result)
    finally:
        torch.set_num_threads(threads)


def test_linear_takes_transposed_matrices() -> None:
    x, y = random(50, 7), random(50, 9)
    torch.testing.assert_close(linear(x.T, y.T), x.T @ y, rtol=1e-5, atol=1e-5)


def test_without_onednn_products_are_the_same_but_for_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = random(50, 9), random(4, 9)
    with_onednn = linear(x, weight)
    monkeypatch.setattr(kernels, "_onednn_linear", None)
    torch.testing.assert_close(linear(x, weight), with_onednn, rtol=1e-5, atol=1e-5)


def test_sums_of_squares_are_the_plain_ones() -> None:
    x, weight, means = random(60, 9), random(4, 9, seed=1), random(5, 9, seed=2)
    code = torch.arange(60) % 5
    torch.testing.assert_close(squared_norms(x), (x * x).sum(1))
    torch.testing.assert_close(weighted_squares(x, weight), (x * x) @ weight.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(squared_distances(x, means, code), (x - means[code]).square().sum(1))
    scores, table = random(60, 3), random(5, 3, seed=3)
    expected = scores + table[code]
    add_rows(scores, table, code)
    assert torch.equal(scores, expected)


@settings(max_examples=40, deadline=None)
@given(
    scores=st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=20),
    count=st.integers(1, 6),
)
def test_the_largest_scores_are_those_of_a_stable_sort(scores: list[list[int]], count: int) -> None:
    """Ties abound, and the lowest index wins each."""
    values = torch.tensor(scores, dtype=torch.float32)
    stable = [sorted(range(6), key=lambda k, row=row: (-row[k], k))[:count] for row in scores]  # type: ignore[misc]
    assert top_k(values, count).tolist() == stable
    assert argmax(values).tolist() == [row[0] for row in stable]
    assert values.tolist() == scores


@settings(max_examples=40, deadline=None)
@given(
    n=st.sampled_from([0, 1, 5, 300]),
    k=st.sampled_from([3, 40]),
    width=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    dim=st.sampled_from([4, DENSE_CELLS // 3]),
    seed=st.integers(0, 5),
)
def test_responsibilities_are_the_softmax(n: int, k: int, width: float, dim: int, seed: int) -> None:
    log_joint, rows = width * random(n, k, seed=seed), random(n, 3, seed=seed + 1)
    gamma = log_joint.double().softmax(1)
    fast = responsibilities(log_joint.clone(), 1e-6, dim)
    close = {"rtol": 1e-4, "atol": 1e-4 * max(1, n) * 1e-2}
    torch.testing.assert_close(fast.log_evidence.double(), log_joint.double().logsumexp(1), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(fast.max_posterior.double(), gamma.amax(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(fast.count, gamma.sum(0), **close)
    torch.testing.assert_close(fast.weighted_sums(rows).double(), gamma.T @ rows.double(), **close)
    torch.testing.assert_close(fast.weighted_squares(rows).double(), gamma.T @ rows.double().square(), **close)


def test_both_forms_of_responsibilities_occur() -> None:
    sharp = responsibilities(100 * random(50, 40), 1e-3, DENSE_CELLS)
    soft = responsibilities(0.1 * random(50, 40), 1e-3, DENSE_CELLS)
    assert sharp.dense is None
    assert soft.sparse is None


@pytest.mark.parametrize("width", [1e-3, 1.0, 1e4])
def test_shifted_exponentials_are_the_plain_ones(width: float) -> None:
    scores = width * random(100, 7)
    best = scores.amax(1)
    expected = (scores.double() - best.double()[:, None]).exp()
    torch.testing.assert_close(exp_minus(scores, best).double(), expected, rtol=1e-5, atol=1e-37 + 1e-7 * width)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 200), k=st.sampled_from([1, 3, 300]), seed=st.integers(0, 5), weighted=st.booleans())
def test_sums_by_group_are_a_slow_loop(n: int, k: int, seed: int, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    group, rows = torch.randint(k, (n,), generator=generator), random(n, 4, seed=seed)
    weight = torch.rand(n, generator=generator) if weighted else None
    sums, count = np.zeros((k, 4)), np.zeros(k)
    for m, g in enumerate(group.tolist()):
        sums[g] += (1.0 if weight is None else float(weight[m])) * rows[m].double().numpy()
        count[g] += 1
    fast = GroupedRows.of(group.numpy(), np.arange(n), weight, k).sums(rows)
    np.testing.assert_allclose(fast, sums, atol=1e-4)
    if weight is None:
        counted, summed = sums_by_code(group, rows, k)
        np.testing.assert_array_equal(counted, count)
        np.testing.assert_allclose(summed, sums, atol=1e-4)


@pytest.mark.parametrize("rows", [0, 1, 7, CACHED_ROWS, 3 * CACHED_ROWS + 5])
def test_pieces_are_the_whole_in_order(rows: int) -> None:
    x = torch.arange(rows)[:, None]
    for components in (4, 10_000):
        parts = pieces(x, components)
        assert torch.equal(torch.cat(parts), x)
        assert len({len(part) for part in parts[:-1]}) <= 1


def test_a_parallel_map_is_a_map_by_several_threads_and_leaves_no_trace() -> None:
    def of(number: int) -> tuple[int, int, float]:
        return number**2, threading.get_ident(), float(torch.tensor(1e-39) * 1)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        results = list(parallel_map(of, iter(range(20)), CPU))
        few = list(parallel_map(of, iter(range(3)), CPU))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert [square for square, _, _ in results] == [n**2 for n in range(20)]
    assert threading.get_ident() not in {thread for _, thread, _ in results}
    assert {thread for _, thread, _ in few} == {threading.get_ident()}
    assert {tiny for _, _, tiny in [*results, *few]} == {0.0}  # no denormals inside
    assert float(torch.tensor(1e-39) * 1) > 0
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == before


def test_an_error_inside_a_parallel_map_is_raised() -> None:
    def fail(number: int) -> int:
        if number == 11:
            raise RuntimeError("eleven")
        return number

    with pytest.raises(RuntimeError, match="eleven"):
        list(parallel_map(fail, range(40), CPU))


def test_the_workspace_of_one_call_does_not_reach_into_another() -> None:
    """Larger, smaller, larger again, and of other threads."""
    weight = random(3, 6)
    inputs = [random(n, 6, seed=n) for n in (300, 7, 300, 1, 400)]
    expected = [(x * x) @ weight.T for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for result, plain in zip(
            pool.map(lambda x: weighted_squares(x, weight), inputs * 5), expected * 5, strict=True
        ):
            torch.testing.assert_close(result, plain, rtol=1e-4, atol=1e-5)


def test_infinities_are_seen_as_such() -> None:
    assert math.isnan(float(squared_norms(torch.tensor([[math.nan, 1.0]]))))
    assert argmax(torch.tensor([[0.0, math.inf, math.inf]])).tolist() == [1]
