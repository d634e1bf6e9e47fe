"""The end of a CTR model: features by their distribution against slow loops, what experts see, and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.ctr.head import KNOTS, RESERVOIR, DecoupledExperts, DistributionEmbedding, RunningNorm, tower


def test_running_norm_is_that_of_all_rows_seen() -> None:
    norm, x = RunningNorm(2), 5 + 3 * torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    for part in x.split(17):
        norm(part)
    expected = (x - x.mean(0)) / x.std(0, correction=0)
    torch.testing.assert_close(norm.eval()(x), expected)
    torch.testing.assert_close(norm(x[:1]), expected[:1])


@settings(max_examples=30, deadline=None)
@given(
    seen=st.lists(st.integers(-3, 3), min_size=1, max_size=40),
    asked=st.lists(st.integers(-4, 4), min_size=1, max_size=5),
)
def test_a_value_s_place_is_that_of_a_slow_loop(seen: list[int], asked: list[int]) -> None:
    embedding = DistributionEmbedding(1)
    embedding.add(torch.tensor(seen, dtype=torch.float32)[:, None])
    expected = [(sum(v < x for v in seen) + sum(v <= x for v in seen)) / 2 / len(seen) for x in asked]
    place = embedding.place(torch.tensor(asked, dtype=torch.float32)[:, None])
    assert place[:, 0].tolist() == pytest.approx(expected)


def test_the_sample_is_uniform_over_all_rows_whatever_the_batches() -> None:
    """Rows 0, 1, 2, ... of ten times the sample: its mean is theirs, within five standard errors."""
    torch.manual_seed(0)
    rows = 10 * RESERVOIR
    for batch in (7, 1000, rows):
        embedding = DistributionEmbedding(1)
        for part in torch.arange(float(rows))[:, None].split(batch):
            embedding(part)
        sample = embedding.sample[0]
        assert torch.equal(sample, sample.unique())  # distinct and in order: rows of the log, each once
        assert abs(float(sample.mean()) / rows - 0.5) < 5 * (1 / 12 / RESERVOIR) ** 0.5
        before = sample.clone()
        embedding.eval()(torch.ones(5, 1))
        assert torch.equal(embedding.sample[0], before)


def test_vectors_are_interpolated_between_knots_and_do_not_depend_on_units() -> None:
    """An increasing function of the values changes nothing."""
    torch.manual_seed(0)
    plain, scaled = DistributionEmbedding(2), DistributionEmbedding(2)
    scaled.load_state_dict(plain.state_dict())
    x = torch.randn(500, 2)
    torch.testing.assert_close(plain(x), scaled(x.exp()))
    u = torch.tensor([0.0, 0.5 / (KNOTS - 1), 1.0])
    plain.place = lambda x: u[:, None].expand(-1, 2)  # type: ignore[method-assign]
    vectors = plain.eval()(torch.zeros(3, 2)).view(3, 2, -1)
    knots = plain.knots.detach()
    torch.testing.assert_close(vectors[0], knots[:, 0])
    torch.testing.assert_close(vectors[1], (knots[:, 0] + knots[:, 1]) / 2)
    torch.testing.assert_close(vectors[2], knots[:, -1])


def test_experts_and_gate_do_not_see_the_dominant_directions() -> None:
    torch.manual_seed(0)
    layer, x = DecoupledExperts(20, 12, experts=3, rank=4), torch.randn(7, 20)
    dominant = torch.linalg.svd(layer.common.weight.detach()).Vh[:4]
    moved = x + torch.randn(7, 4) @ dominant
    torch.testing.assert_close(layer(moved) - layer(x), layer.common(moved) - layer.common(x), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(layer(x), layer.common(x))


def test_every_part_has_a_gradient() -> None:
    torch.manual_seed(0)
    numeric = DistributionEmbedding(3)
    network = tower(10 + numeric.width, experts=3)
    for _ in range(2):
        x = torch.cat([torch.randn(50, 10), numeric(torch.randn(50, 3))], dim=1)
        network(x).square().mean().backward()
    for parameter in (*numeric.parameters(), *network.parameters()):
        assert parameter.grad is not None
        assert bool((parameter.grad != 0).any())
