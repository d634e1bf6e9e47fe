"""DMQN is what slow loops over each impression alone say; noise, order, empty histories and every part's gradient."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.train import FEATURES, ITEMS, TOKENS, DirectDMQN, generated
from jobs.ctr.batch import UserBatch
from jobs.ctr.dmqn import (
    DMQN,
    DMQNShape,
    InterestClusterInteraction,
    Interests,
    MultiClusterQuantization,
    unevenness,
)
from jobs.ctr.embedding import ItemEmbedding

SHAPE = DMQNShape(features=FEATURES, width=6, interest_codebooks=2, codewords=5)


def model(kind: type[DMQN] = DMQN, std: float = 0.5) -> DMQN:
    """With vectors large enough that clusters differ, and an interaction that has left its start."""
    torch.manual_seed(0)
    dmqn = kind(ItemEmbedding(ITEMS, TOKENS, SHAPE.width), SHAPE)
    for name, parameter in dmqn.named_parameters():
        if name.startswith(("embed", "interact", "quantize.decay")):
            torch.nn.init.normal_(parameter, std=std)
    return dmqn.eval()


def ragged(seed: int = 0) -> UserBatch:
    """Three users with 11, 0 and 30 behaviours and histories of any length, some of them shared."""
    batch, g = generated(3, 20, 11, seed=seed), torch.Generator().manual_seed(seed)
    length = torch.tensor([11, 0, 30])
    ends = (torch.rand(len(batch), 2, generator=g) * (1 + length[batch.user])[:, None]).long().sort(1).values
    ends[1], ends[25] = ends[0], ends[24]
    return replace(batch, length=length, first=ends[:, 0], last=ends[:, 1])


def vector(embed: ItemEmbedding, items: object, index: tuple[int, ...]) -> np.ndarray:
    item, tokens, weights = (getattr(items, name)[index].numpy() for name in ("item", "tokens", "weights"))
    table, token_table = (part.detach().double().numpy() for part in (embed.item, embed.token))
    return table[item] + (weights.astype(np.float64)[:, None] * token_table[tokens]).sum(0)


def slow_clusters(dmqn: DMQN, batch: UserBatch, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clusters (N, W, D), counts and ages (N, W) of one impression, behaviour by behaviour, before ICIM."""
    project, codewords = (part.detach().double().numpy() for part in (dmqn.quantize.project, dmqn.quantize.codewords))
    first, last = int(batch.first[n]), int(batch.last[n])
    sums, counts, youth = np.zeros_like(codewords), np.zeros(codewords.shape[:2]), np.zeros(codewords.shape[:2])
    for position in range(first, last):
        x = vector(dmqn.embed, batch.behaviours, (int(batch.user[n]), position))
        for j in range(len(project)):
            h = x @ project[j]
            cosine = codewords[j] @ h / np.linalg.norm(codewords[j], axis=1) / np.linalg.norm(h)
            weight = np.exp(cosine * float(dmqn.quantize.log_scale[j].exp()) / float(dmqn.quantize.temperature))
            weight /= weight.sum()
            sums[j] += weight[:, None] * h
            counts[j] += weight
            youth[j] += weight * (position - first) / (last - first)
    ages = 1 - youth / np.maximum(counts, 1e-6)
    decay = dmqn.quantize.decay.detach().double().numpy()[..., 0]
    return sums / np.maximum(counts, 1e-6)[..., None], counts * np.exp(-decay * ages), ages


def test_every_impression_alone_gives_the_same_logit() -> None:
    dmqn, batch = model(), ragged()
    with torch.no_grad():
        together = dmqn(batch)
        for n in range(len(batch)):
            parts = (torch.tensor(part, dtype=torch.float32)[:, None] for part in slow_clusters(dmqn, batch, n))
            clusters, count, age = parts
            interests = Interests(dmqn.interact(clusters, age), count)
            one, history = torch.tensor([n]), torch.tensor([0])
            alone = dmqn.score(interests, history, batch.candidates[one], batch.features[one])
            torch.testing.assert_close(together[n : n + 1], alone, rtol=1e-5, atol=1e-5)


def test_the_padded_twin_gives_the_same_logits_and_gradients() -> None:
    batch, gradients, logits = generated(2, 40, 7), [], []
    for kind in (DMQN, DirectDMQN):
        dmqn = model(kind)
        logits.append(dmqn(batch))
        logits[-1].square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in dmqn.named_parameters()})
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-4)


def test_a_score_from_kept_interests_is_the_whole_forward() -> None:
    """What a cache does: interests of one user by themselves, then many candidates."""
    dmqn, batch = model(), ragged()
    with torch.no_grad():
        expected = dmqn(batch)
        for n in range(len(batch)):
            user, first, last = (int(part[n]) for part in (batch.user, batch.first, batch.last))
            history = batch.behaviours[torch.tensor(user), torch.arange(first, last)]
            kept = dmqn.user_interests(history, torch.tensor([0]), torch.tensor([last - first]))
            of_user = batch.user == user
            of_history = of_user & (batch.first == first) & (batch.last == last)
            zero = torch.zeros(int(of_user.sum()), dtype=torch.int64)
            scores = dmqn.score(kept, zero, batch.candidates[of_user], batch.features[of_user])
            torch.testing.assert_close(scores[of_history[of_user]], expected[of_history], rtol=1e-5, atol=1e-5)


def test_ten_thousand_behaviours_lose_no_precision() -> None:
    dmqn, batch = model(), generated(1, 10_000, 3)
    with torch.no_grad():
        precise = model().double()
        wide = replace(batch, features=batch.features.double())
        for part in ("behaviours", "candidates"):
            items = getattr(wide, part)
            wide = replace(wide, **{part: replace(items, weights=items.weights.double())})
        torch.testing.assert_close(dmqn(batch).double(), precise(wide), rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing_and_the_order_of_a_history_only_what_is_learned_of_age() -> None:
    dmqn, batch = model(), generated(1, 30, 1)

    def reordered(order: torch.Tensor) -> torch.Tensor:
        order = torch.cat([order, torch.randint(0, 30, (5,))])[None]  # five positions of padding
        behaviours = batch.behaviours[torch.zeros_like(order), order]
        with torch.no_grad():
            logits: torch.Tensor = dmqn(
                replace(batch, behaviours=behaviours, behaviour_time=torch.zeros(1, 35, dtype=torch.int64))
            )
        return logits

    torch.testing.assert_close(reordered(torch.arange(30)), dmqn(batch).detach())
    assert not torch.allclose(reordered(torch.arange(29, -1, -1)), dmqn(batch))
    with torch.no_grad():
        dmqn.quantize.decay.zero_()
        dmqn.interact.pace.zero_()
    torch.testing.assert_close(reordered(torch.randperm(30)), dmqn(batch).detach())


def test_scoring_has_no_noise_and_training_has() -> None:
    dmqn, batch = model(), ragged()
    with torch.no_grad():
        assert torch.equal(dmqn(batch), dmqn(batch))
        dmqn.quantize.train()
        assert not torch.equal(dmqn(batch), dmqn(batch))


@pytest.mark.parametrize("noise", [True, False])
def test_noise_is_a_choice(noise: bool) -> None:
    quantize, similarity = model().quantize, torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    quantize.shape = replace(SHAPE, noise=noise)
    scoring, training = quantize.assign(similarity), quantize.train().assign(similarity)
    assert torch.equal(scoring, training) != noise


def test_behaviours_are_as_far_apart_after_the_first_projection() -> None:
    project = MultiClusterQuantization(SHAPE).project.detach()
    torch.testing.assert_close(project @ project.mT, torch.eye(SHAPE.width).expand_as(project))


def test_uneven_use_of_codewords_is_penalised() -> None:
    one = torch.zeros(2, 50, 5)
    one[..., 3] = 100  # all behaviours in one cluster
    assert float(unevenness(one)) == pytest.approx(np.log(5), rel=1e-4)
    assert float(unevenness(torch.eye(5).repeat(2, 10, 1) * 100)) == pytest.approx(0, abs=1e-4)  # as many in each
    dmqn = model().train()
    dmqn(ragged())
    assert 0 < float(dmqn.penalty().detach()) < SHAPE.usage * np.log(5)


def test_the_temperature_falls_with_each_step_of_training_to_the_coldest() -> None:
    shape = replace(SHAPE, hottest=1.0, coldest=0.3)
    dmqn, batch = DMQN(ItemEmbedding(ITEMS, TOKENS, shape.width), shape).eval(), ragged()
    dmqn(batch)
    assert float(dmqn.quantize.temperature) == shape.hottest
    dmqn.train()(batch)
    assert float(dmqn.quantize.temperature) == pytest.approx(shape.hottest * 0.5 ** (1 / shape.halving))
    for _ in range(2 * shape.halving):
        dmqn.quantize.cool()
    assert float(dmqn.quantize.temperature) == pytest.approx(shape.coldest)


def test_straight_through_assigns_to_one_codeword_with_the_gradient_of_the_soft_assignment() -> None:
    similarity = torch.randn(2, 20, 5, generator=torch.Generator().manual_seed(0))
    gradients = []
    for kind in ("soft", "straight-through"):
        leaf = similarity.clone().requires_grad_()
        assignment = MultiClusterQuantization(replace(SHAPE, assignment=kind)).eval().assign(leaf)
        (assignment * torch.arange(5)).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(assignment, torch.nn.functional.one_hot(similarity.argmax(-1), 5).float())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    "part",
    [
        "quantize.codewords",
        "quantize.project",
        "interact.split",
        "interact.out",
        "interact.pair",
        "interact.pace",
        "quantize.decay",
        "quantize.log_scale",
        "attend.log_scale",
        "embed.token",
        "embed.item",
    ],
)
def test_every_part_learns(part: str) -> None:
    dmqn = model().train()
    dmqn(ragged()).square().sum().backward()
    gradient = dict(dmqn.named_parameters())[part].grad
    assert gradient is not None
    assert float(gradient.abs().sum()) > 0


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def layer_norm(x: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5)


def test_interaction_is_the_slow_loop() -> None:
    torch.manual_seed(1)
    layer = InterestClusterInteraction(DMQNShape(features=0, width=4, interest_codebooks=2, codewords=3))
    for parameter in (layer.pair, layer.pace, layer.out):
        torch.nn.init.normal_(parameter)
    x, age = torch.randn(2, 1, 3, 4), torch.rand(2, 1, 3)
    fast = layer(x, age).detach()
    for n in range(2):
        w1, w2, pair, pace = (part[n, 0].detach().numpy() for part in (layer.split, layer.out, layer.pair, layer.pace))
        parts = [silu(layer_norm(row) @ w1) for row in x[n, 0].numpy()]
        u, v, q, k = (np.stack([part[4 * i : 4 * i + 4] for part in parts]) for i in range(4))
        for i in range(3):
            apart = np.abs(age[n, 0, i].numpy() - age[n, 0].numpy())
            bias = pair[i] - pace[0, 0] * apart
            mixed = sum(silu(q[i] @ k[j] + bias[j]) * v[j] for j in range(3)) / 3
            expected = x[n, 0, i].numpy() + (layer_norm(mixed) * u[i]) @ w2
            np.testing.assert_allclose(fast[n, 0, i], expected, rtol=1e-4, atol=1e-5)


def test_attention_to_clusters_of_equal_behaviours_is_full_attention_to_the_behaviours() -> None:
    attend = model().attend
    g = torch.Generator().manual_seed(0)
    query, clusters = torch.randn(2, 1, 3, 6, generator=g), torch.randn(2, 1, 5, 6, generator=g)
    count = torch.tensor([3.0, 1, 0, 7, 2]).expand(2, 1, 5)
    interest, share = attend(query, clusters, count)
    behaviours = clusters[:, 0].repeat_interleave(count[0, 0].long(), dim=1)  # (N, 13, D)
    for candidate in range(3):
        score = (behaviours @ query[:, 0, candidate, :, None])[..., 0] / 6**0.5
        expected = (score.softmax(1)[..., None] * behaviours).sum(1)
        torch.testing.assert_close(interest[:, 0, candidate], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(share[:, 0, candidate], score.exp().mean(1).log(), rtol=1e-4, atol=1e-5)
