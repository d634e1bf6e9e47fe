"""Metrics against scikit-learn; a planted signal is found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score

from jobs.config import TrainConfig
from jobs.ctr.training import Examples, auc, gauc, item_tokens, log_loss, shuffled_codes, train_dmqn


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 9)), min_size=2, max_size=60))
def test_auc_and_log_loss_are_those_of_scikit_learn(rows: list[tuple[int, int]]) -> None:
    label, score = np.array([y for y, _ in rows], np.float32), np.array([(s + 1) / 12 for _, s in rows])
    if 0 < label.sum() < len(label):
        assert auc(label, score) == pytest.approx(roc_auc_score(label, score))
        assert log_loss(label, score) == pytest.approx(sklearn_log_loss(label, score))
    else:
        assert np.isnan(auc(label, score))


def test_gauc_weighs_users_by_impressions() -> None:
    user, label = np.array([0, 0, 1, 1, 1, 1, 2]), np.array([0, 1, 1, 1, 0, 0, 1], np.float32)
    score = np.array([0.1, 0.9, 0.1, 0.2, 0.8, 0.9, 0.5])
    assert gauc(user, label, score) == (pytest.approx((2 * 1.0 + 4 * 0.0) / 6), 2)  # the third user has clicks only


def test_metrics_of_one_class_or_of_no_numbers_are_undefined() -> None:
    ones, score = np.ones(3, np.float32), np.array([0.1, 0.2, 0.3])
    value, users = gauc(np.array([0, 0, 1]), ones, score)
    assert np.isnan(value)
    assert users == 0
    assert np.isnan(auc(np.array([0, 1, 1], np.float32), np.array([0.1, np.nan, 0.3])))


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
