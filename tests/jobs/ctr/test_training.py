"""Examples without leaks against a slow loop; metrics against scikit-learn; a planted signal is found."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score

from jobs.config import TrainConfig
from jobs.ctr.examples import user_examples, with_negatives
from jobs.ctr.training import Examples, auc, gauc, item_tokens, log_loss, shuffled_codes, train_dmqn

EVENTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4), st.integers(0, 1)), min_size=1, max_size=14)


def user_of(events: list[tuple[int, int, int]]) -> pd.DataFrame:
    return pd.DataFrame(
        {"user_id": "u", "item_id": [f"i{i}" for _, i, _ in events], "label": [y for *_, y in events], "ts": [t for t, *_ in events], "item_shown": 0, "item_clicked": 0}
    )  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(events=EVENTS, keep=st.integers(1, 5))
def test_history_is_what_was_clicked_strictly_before(events: list[tuple[int, int, int]], keep: int) -> None:
    found = user_examples(user_of(events), keep, 3.0, 5.0)
    assert len(found) == len(events)
    for row in found.itertuples():
        before = sorted((t, f"i{i}") for t, i, y in events if y == 1 and t < row.ts)
        assert sorted(row.history) == sorted(item for _, item in before[-keep:])
        shown = sum(t < row.ts for t, *_ in events)
        np.testing.assert_allclose(
            row.features[:2], [np.log1p(len(before)), (len(before) + 1) / (shown + 4)], rtol=1e-5
        )
        assert row.split == ("test" if row.ts >= 5 else "validation" if row.ts >= 3 else "train")


@settings(max_examples=40, deadline=None)
@given(events=EVENTS)
def test_the_future_changes_nothing_before_it(events: list[tuple[int, int, int]]) -> None:
    whole = user_examples(user_of(events), 5, 3.0, 5.0)
    past = [event for event in events if event[0] < 4]
    if past:
        early = user_examples(user_of(past), 5, 3.0, 5.0)
        assert early["history"].tolist() == whole[whole["ts"] < 4]["history"].tolist()


def test_each_user_without_a_clock_gives_his_last_moments_to_the_test() -> None:
    found = user_examples(user_of([(t, t % 5, 1) for t in range(20)]), 5, None, None)
    assert found["split"].tolist() == ["train"] * 16 + ["validation"] * 2 + ["test"] * 2


def test_negatives_are_never_the_users_positives_and_always_the_same() -> None:
    user = user_of([(t, t, 1) for t in range(4)])
    catalogue = np.array([f"i{n}" for n in range(30)])
    sampled = with_negatives(user, catalogue, 3, seed=0)
    negatives = sampled[sampled["label"] == 0]
    assert len(negatives) == 12
    assert not set(negatives["item_id"]) & set(user["item_id"])
    assert negatives["ts"].value_counts().to_dict() == {0: 3, 1: 3, 2: 3, 3: 3}
    pd.testing.assert_frame_equal(sampled, with_negatives(user.sample(frac=1, random_state=1), catalogue, 3, seed=0))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 9)), min_size=2, max_size=60))
def test_auc_and_log_loss_are_those_of_scikit_learn(rows: list[tuple[int, int]]) -> None:
    label, score = np.array([y for y, _ in rows], np.float32), np.array([(s + 1) / 12 for _, s in rows])
    if 0 < label.sum() < len(label):
        assert auc(label, score) == pytest.approx(roc_auc_score(label, score))
        assert log_loss(label, score) == pytest.approx(sklearn_log_loss(label, score))
    else:
        assert auc(label, score) == 0.5


def test_gauc_weighs_users_by_impressions() -> None:
    user, label = np.array([0, 0, 1, 1, 1, 1, 2]), np.array([0, 1, 1, 1, 0, 0, 1], np.float32)
    score = np.array([0.1, 0.9, 0.1, 0.2, 0.8, 0.9, 0.5])
    assert gauc(user, label, score) == pytest.approx((2 * 1.0 + 4 * 0.0) / 6)


def test_tokens_of_unknown_items_are_padding() -> None:
    codes = torch.tensor([[-1, -1], [0, 1], [0, 2], [-1, -1], [0, 1]])
    tokens, size = item_tokens(codes, 4)
    assert tokens[0].tolist() == tokens[3].tolist() == [0, 0, 0]
    assert tokens[1].tolist() == tokens[4].tolist()
    assert tokens[1, :2].tolist() == [1, 6]
    assert tokens[1, 2] != tokens[2, 2]
    assert int(tokens.max()) < size


def test_the_control_has_the_same_codes_in_other_hands() -> None:
    codes = torch.cat([torch.full((1, 2), -1), torch.arange(100).reshape(50, 2)])
    dealt = shuffled_codes(codes, 0)
    assert torch.equal(dealt.sort(dim=0).values, codes.sort(dim=0).values)
    assert (dealt != codes).any()
    assert torch.equal(shuffled_codes(codes, 0), dealt)


def test_a_planted_taste_is_found_through_codes_and_not_without() -> None:
    """Users like one group of items; every item is rare, so only the code tells its group."""
    g = np.random.default_rng(0)
    n, items, groups, length = 6000, 2000, 8, 12
    group = np.concatenate([[0], np.arange(items) % groups])
    taste = g.integers(groups, size=n)
    liked = [np.flatnonzero(group[1:] == k) + 1 for k in range(groups)]
    history = np.stack([g.choice(liked[k], size=length) for k in taste]).astype(np.int32)
    item = g.integers(1, items + 1, size=n).astype(np.int32)
    item[: n // 2] = [g.choice(liked[k]) for k in taste[: n // 2]]
    label = (g.random(n) < np.where(group[item] == taste, 0.8, 0.1)).astype(np.float32)
    order = g.permutation(n)
    features = np.zeros((n, 1), np.float32)
    whole = [a[order] for a in (item, history, features, label, np.arange(n))]
    train, validation, test = (
        Examples(*(torch.from_numpy(a[s]) for a in whole)) for s in (slice(0, 4000), slice(4000, 5000), slice(5000, n))
    )
    codes = torch.from_numpy(np.stack([group, group], 1)).long()
    codes[0] = -1
    config = TrainConfig(epochs=4, width=16, codewords=10, batch_size=64)
    ours = train_dmqn(train, validation, test, codes, groups, config)
    control = train_dmqn(train, validation, test, shuffled_codes(codes, 0), groups, config)
    assert ours.test.auc > 0.75
    assert control.test.auc < 0.65
