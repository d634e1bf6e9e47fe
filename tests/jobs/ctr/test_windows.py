"""Sums over windows against a slow loop, and their precision over long sequences."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.ctr.windows import window_sums


def slow_sums(weights: torch.Tensor, values: torch.Tensor, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """The definition, in float64."""
    windows = [
        torch.einsum("nmw,nmv->nwv", weights[:, a:b].double(), values[:, a:b].double())
        for a, b in zip(first.tolist(), last.tolist(), strict=True)
    ]
    return torch.stack(windows, dim=1)


@settings(max_examples=60, deadline=None)
@given(length=st.integers(0, 40), windows=st.integers(1, 12), seed=st.integers(0, 999))
def test_sums_are_those_of_the_slow_loop(length: int, windows: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    ends = torch.randint(0, length + 1, (windows, 2), generator=g).sort(dim=1).values
    weights, values = torch.rand(2, length, 3, generator=g), torch.randn(2, length, 4, generator=g)
    sums = window_sums(weights, values, ends[:, 0], ends[:, 1])
    torch.testing.assert_close(sums.double(), slow_sums(weights, values, ends[:, 0], ends[:, 1]), rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_slow_loop() -> None:
    g = torch.Generator().manual_seed(0)
    weights, values = torch.rand(2, 30, 3, generator=g), torch.randn(2, 30, 4, generator=g)
    first, last = torch.tensor([0, 4, 4, 20, 9]), torch.tensor([30, 5, 25, 20, 29])
    probe = torch.randn(2, 5, 3, 4, generator=g)
    gradients = []
    for sums in (window_sums, slow_sums):
        inputs = [weights.clone().requires_grad_(), values.clone().requires_grad_()]
        gradients.append(torch.autograd.grad((sums(*inputs, first, last) * probe).sum(), inputs))
    for fast, slow in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, slow)


def test_a_short_window_late_in_a_long_sequence_is_as_precise_as_a_sum_of_its_own() -> None:
    """10,000 large values before it cost a float32 running sum three digits."""
    g = torch.Generator().manual_seed(0)
    weights, values = torch.rand(1, 10_000, 2, generator=g), 100 + torch.randn(1, 10_000, 3, generator=g)
    first = torch.tensor([0, 1, 9_000, 9_998])
    last = torch.tensor([10_000, 9_998, 9_010, 9_999])
    sums = window_sums(weights, values, first, last).double()
    torch.testing.assert_close(sums, slow_sums(weights, values, first, last), rtol=3e-6, atol=0)
