"""DMQN: padding contributes nothing, interests need no candidate, and the layers are what slow loops say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.ctr.dmqn import DMQN, HSTU, DMQNShape

SHAPE = DMQNShape(tokens=30, items=20, levels=2, components=8, features=3, width=6, interest_codebooks=2, codewords=5)


def model() -> DMQN:
    torch.manual_seed(0)
    return DMQN(SHAPE).eval()


def inputs(n: int, length: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    history = torch.randint(0, 20, (n, length), generator=g)
    tokens = torch.randint(0, 30, (20, 3), generator=g)
    tokens[0] = 0
    item = torch.randint(1, 20, (n,), generator=g)
    return history, tokens[history], item, tokens[item], torch.randn(n, 3, generator=g)


@settings(max_examples=20, deadline=None)
@given(pad=st.integers(0, 7), left=st.booleans())
def test_padding_changes_nothing(pad: int, left: bool) -> None:
    dmqn, (history, history_tokens, item, tokens, features) = model(), inputs(4, 9)
    zeros, zero_tokens = torch.zeros(4, pad, dtype=torch.int64), torch.zeros(4, pad, 3, dtype=torch.int64)
    parts, token_parts = [zeros, history], [zero_tokens, history_tokens]
    padded = torch.cat(parts if left else parts[::-1], 1), torch.cat(token_parts if left else token_parts[::-1], 1)
    with torch.no_grad():
        torch.testing.assert_close(
            dmqn(*padded, item, tokens, features), dmqn(history, history_tokens, item, tokens, features)
        )


def test_order_of_behaviours_changes_nothing() -> None:
    dmqn, (history, history_tokens, *_) = model(), inputs(3, 9)
    order = torch.randperm(9)
    with torch.no_grad():
        torch.testing.assert_close(
            dmqn.user_interests(history[:, order], history_tokens[:, order]),
            dmqn.user_interests(history, history_tokens),
        )


def test_an_empty_history_is_scored() -> None:
    dmqn, (history, history_tokens, *rest) = model(), inputs(3, 4)
    with torch.no_grad():
        assert torch.isfinite(dmqn(torch.zeros_like(history), torch.zeros_like(history_tokens), *rest)).all()


def test_candidates_alone_and_together_agree() -> None:
    dmqn, (history, history_tokens, item, tokens, features) = model(), inputs(6, 5)
    with torch.no_grad():
        interests = dmqn.user_interests(history, history_tokens)
        together = dmqn.score(interests, item, tokens, features)
        alone = [
            dmqn.score(interests[n : n + 1], item[n : n + 1], tokens[n : n + 1], features[n : n + 1]) for n in range(6)
        ]
    torch.testing.assert_close(torch.cat(alone), together)


def test_scoring_has_no_noise_and_training_has() -> None:
    dmqn, arguments = model(), inputs(4, 6)
    with torch.no_grad():
        assert torch.equal(dmqn(*arguments), dmqn(*arguments))
        dmqn.quantize.train()
        assert not torch.equal(dmqn.user_interests(*arguments[:2]), dmqn.user_interests(*arguments[:2]))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def layer_norm(x: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5)


def test_hstu_is_the_slow_loop() -> None:
    torch.manual_seed(1)
    layer = HSTU(4, 3)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(3, 4)
    w1, w2, rab = (p.detach().numpy() for p in (layer.split.weight, layer.out.weight, layer.bias))
    parts = [silu(w1 @ layer_norm(row)) for row in x.numpy()]
    u, v, q, k = (np.stack([part[4 * n : 4 * n + 4] for part in parts]) for n in range(4))
    slow = []
    for i in range(3):
        mixed = sum(silu(q[i] @ k[j] + rab[i, j]) * v[j] for j in range(3)) / 3
        slow.append(x[i].numpy() + w2 @ (layer_norm(mixed) * u[i]))
    np.testing.assert_allclose(layer(x).detach(), np.stack(slow), rtol=1e-4, atol=1e-5)


def test_assignment_is_the_softmax_of_similarities() -> None:
    quantize = model().quantize
    x = torch.randn(1, 1, 6)
    projected, weight = quantize.assign(x)
    for j in range(2):
        h = x[0, 0].detach().numpy() @ quantize.project[j].detach().numpy()
        similarity = quantize.codewords[j].detach().numpy() @ h
        expected = np.exp(similarity - similarity.max())
        np.testing.assert_allclose(projected[0, j, 0].detach(), h, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(weight[0, j, 0].detach(), expected / expected.sum(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "part", ["quantize.codewords", "quantize.project", "interact.split.weight", "token.weight", "mlp.0.weight"]
)
def test_every_part_learns(part: str) -> None:
    dmqn = model().train()
    dmqn(*inputs(8, 6)).square().sum().backward()
    gradient = dict(dmqn.named_parameters())[part].grad
    assert gradient is not None
    assert float(gradient.abs().sum()) > 0
