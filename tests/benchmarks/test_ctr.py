"""The harness of `sid bench ctr`: what an impression knows, sampled negatives, histories as models read them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from benchmarks.ctr import harness
from benchmarks.ctr.embedding import Inputs
from benchmarks.ctr.fnn import FNN
from benchmarks.ctr.generated import expected_auc, generate
from benchmarks.ctr.harness import makers
from benchmarks.ctr.impressions import Batches, Impressions, ItemTokens, impressions, with_negatives
from benchmarks.ctr.pooling import window_sums
from benchmarks.ctr.sources import Catalogue
from benchmarks.opponents import QUANTIZERS, rq_kmeans, softened_rq_kmeans
from jobs.ctr.metrics import SortedScores, auc
from jobs.ctr.pieces import learn


@pytest.fixture(scope="module")
def log() -> Impressions:
    generator = np.random.default_rng(0)
    rows = pd.DataFrame(
        {
            "user": np.sort(generator.integers(9, size=300)),
            "time": generator.integers(40, size=300),  # many at the same moment
            "item": generator.integers(1, 30, size=300),
            "label": generator.integers(2, size=300),
        }
    ).sort_values(["user", "time"], ignore_index=True)
    rows["split"] = np.searchsorted([25, 33], rows["time"], side="right")
    return impressions(rows, rows[rows["label"] == 1], pd.RangeIndex(1, 30))


TOKENS = ItemTokens(torch.zeros(30, 0, dtype=torch.int64), torch.zeros(30, 0), 1, ())


@pytest.mark.parametrize("history", [3, 1000])
def test_a_batch_holds_what_happened_strictly_before_each_impression(log: Impressions, history: int) -> None:
    batches = Batches(log, log.of("train"), TOKENS, size=50, history=history, together=7, seed=1)
    seen = []
    for own in batches.groups():
        batch = batches.batch(own)
        sums = window_sums(batch.behaviours.item[..., None].float(), batch)[:, 0]
        for row, number in enumerate(own):
            past = slice(log.start[log.user[number]], log.start[log.user[number] + 1])
            before = log.behaviour_item[past][log.behaviour_time[past] < log.time[number]][-history:]
            window = batch.behaviours.item[batch.user[row], batch.first[row] : batch.last[row]]
            assert window.tolist() == before.tolist()
            assert float(sums[row]) == before.sum()
        seen += own.tolist()
    assert sorted(seen) == log.of("train").tolist()


@pytest.mark.parametrize("name", ["dmqn", "fnn", "ipnn", "mean-pooling", "din", "sim-code", "hstu", "linear-attention"])
def test_a_model_scores_an_impression_alike_alone_and_beside_others(log: Impressions, name: str) -> None:
    """Padding, other users and what came after an impression are not read."""
    g = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(29, 8, generator=g))
    catalogue = Catalogue(log, x, torch.arange(1, 30), levels=1, components=4)
    tokens = ItemTokens(torch.randint(20, (30, 4), generator=g), torch.rand(30, 4, generator=g), 20, (3, 1))
    torch.manual_seed(0)
    model = makers(catalogue, None)[name](Inputs(9, 29, tokens, item_ids=True, vectors=catalogue.vectors())).eval()
    for table in (part for key, part in model.named_parameters() if key.startswith(("item.", "embed."))):
        torch.nn.init.normal_(table)  # large, so that a difference shows
    batches = Batches(log, log.of("test"), tokens, size=1000)
    (own,) = batches.groups()
    one_by_one = [model(batches.batch(own[row : row + 1])).item() for row in range(len(own))]
    np.testing.assert_allclose(model(batches.batch(own)).detach(), one_by_one, rtol=1e-4, atol=1e-5)


def test_popularity_tells_nothing_of_sampled_negatives() -> None:
    generator = np.random.default_rng(0)
    popular = generator.choice(200, size=8000, p=np.arange(1, 201) / np.arange(1, 201).sum()) + 1
    clicks = pd.DataFrame(
        {"user": np.repeat(np.arange(800), 10), "time": np.tile(np.arange(10), 800), "item": popular, "label": 1}
    )
    clicks["split"] = np.repeat([0, 1, 2], [6, 2, 2])[clicks["time"]]
    rows = with_negatives(clicks, seed=0)
    chosen = set(zip(clicks["user"], clicks["item"], strict=True))
    for split in range(3):
        own = rows[rows["split"] == split]
        count = own[own["label"] == 1]["item"].value_counts()
        assert abs(roc_auc_score(own["label"], own["item"].map(count).fillna(0)) - 0.5) < 0.03
    last = rows[(rows["split"] == 2) & (rows["label"] == 0)]
    assert not chosen & set(zip(last["user"], last["item"], strict=True))


def test_a_taste_that_popularity_does_not_show_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clicks depend on whether user and item are of the same group: no item and no user has more of them than others.
    Without a preference in sight training starts at a saddle point, and must not end there.
    """
    monkeypatch.setattr(harness, "BATCH", 64)
    generator = np.random.default_rng(0)
    user, item = np.repeat(np.arange(100), 40), generator.integers(1, 41, size=4000)
    click = generator.random(4000) < np.where(user % 2 == item % 2, 0.8, 0.2)
    rows = pd.DataFrame({"user": user, "time": np.tile(np.arange(40), 100), "item": item, "label": click.astype(int)})
    rows["split"] = np.searchsorted([32, 36], rows["time"], side="right")
    log = impressions(rows, rows[rows["label"] == 1], pd.RangeIndex(1, 41))
    tokens = ItemTokens(torch.zeros(41, 0, dtype=torch.int64), torch.zeros(41, 0), 1, ())
    inputs = Inputs(log.users, log.items, tokens, item_ids=True, vectors=None)
    run = harness.trained(FNN, "fnn", inputs, log, 3e-3, seed=0, history=1)
    test = harness.scored(run.model, harness.batches_of("fnn", inputs, log, "test", 1, 0))
    assert auc(test.label, test.score) > 0.7  # 0.8 at best
    assert np.array_equal(test.user, log.user[log.of("test")])


def test_softened_k_means_is_k_means() -> None:
    x = torch.nn.functional.normalize(torch.randn(300, 8, generator=torch.Generator().manual_seed(0)))
    soft = softened_rq_kmeans(x, 2, 8, seed=0)
    codes = soft.encode(x)
    assert torch.equal(codes, rq_kmeans(x, 2, 8, seed=0).encode(x))
    largest = soft.alternates(x, codes, 8).weights.max(dim=2).values.float() / 255
    assert 0.2 < float(largest.mean()) < 0.98


def test_pieces_are_learned_of_the_training_split_only(log: Impressions) -> None:
    """And the rows of the table are those of the pieces; items without an embedding have none."""
    x = torch.nn.functional.normalize(torch.randn(20, 6, generator=torch.Generator().manual_seed(0)))
    catalogue = Catalogue(log, x, torch.arange(1, 21), levels=2, components=4)
    tokens = catalogue.tokens("rq-gmm-pieces", seed=0)
    assert tokens.pieces is not None
    codes = QUANTIZERS["rq-gmm"](x, 2, 4, 0).encode(x)
    shown = torch.from_numpy(log.item[log.of("train")])
    shown = shown[shown <= 20]
    assert tokens.pieces.pieces == learn(codes[shown - 1], torch.ones(len(shown), dtype=torch.int64), 4, 16)
    assert tokens.table_rows == 1 + len(tokens.pieces.pieces)
    assert (tokens.rows[1:21] > 0).any(1).all()
    assert not tokens.rows[21:].any()
    assert (tokens.level_rows()[0], tokens.fields) == (slice(1, 5), (1, 1))


def test_a_weighted_auc_is_scikit_learn_s() -> None:
    generator = np.random.default_rng(0)
    label, score = generator.integers(2, size=500).astype(np.float32), generator.integers(20, size=500).astype(float)
    weight = generator.integers(0, 4, size=500).astype(float)
    assert SortedScores(label, score, np.arange(len(label))).auc(weight) == pytest.approx(
        roc_auc_score(label, score, sample_weight=weight)
    )


def test_clicks_of_the_generated_log_follow_their_probabilities() -> None:
    made = generate(users=150, length=60, levels=2, components=16)
    label = made.catalogue.log.label
    assert abs(label.mean() - made.probability.mean()) < 0.03
    assert roc_auc_score(label, made.probability) > 0.75
    score = made.probability + 0.1 * np.random.default_rng(0).normal(size=len(label))
    assert expected_auc(made.probability, score) == pytest.approx(roc_auc_score(label, score), abs=0.02)
    assert expected_auc(label.astype(float), score) == pytest.approx(roc_auc_score(label, score))
