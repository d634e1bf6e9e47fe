"""The gate of CTR models: against slow loops, and what passes and fails for certain."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from jobs.ctr.gate import CtrLimits, compare
from jobs.ctr.metrics import Scores, SortedScores

LIMITS = CtrLimits(max_auc_drop=0.002, max_log_loss_rise=0.002, max_calibration_drift=0.1)


def scored(noise: float, *, users: int = 200, each: int = 50, seed: int = 0, scale: float = 1.0) -> Scores:
    """Clicks of known probabilities, scored by these with `noise` in their logits; the clicks do not depend on it."""
    g = np.random.default_rng(seed)
    n = users * each
    logit = g.normal(size=n) - 0.5
    label = (g.random(n) < 1 / (1 + np.exp(-logit))).astype(np.float32)
    shown = g.integers(0, 20, size=n)
    seen = logit + noise * g.normal(size=n)
    return Scores(label, np.minimum(scale / (1 + np.exp(-seen)), 1.0), np.repeat(np.arange(users) * 7, each), shown)


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(0, 4)), min_size=2, max_size=40), st.data())
@settings(deadline=None)
def test_a_weighted_auc_is_that_of_repeated_rows(rows: list[tuple[int, bool, int]], data: st.DataObject) -> None:
    times = np.array(data.draw(st.lists(st.integers(0, 3), min_size=4, max_size=4)))
    user, label, score = (np.array(column) for column in zip(*rows, strict=True))
    repeated = np.repeat(np.arange(len(rows)), times[user])
    got = SortedScores(label.astype(np.float32), score.astype(np.float64), user).auc(times)
    if len(set(label[repeated])) == 2:
        assert got == pytest.approx(roc_auc_score(label[repeated], score[repeated]))
    else:
        assert np.isnan(got)


def test_the_same_model_passes_with_differences_of_zero() -> None:
    comparison = compare(scored(0.5), scored(0.5))
    assert comparison.reasons(LIMITS) == ()
    assert all(d.mean == d.low == d.high == 0 for d in comparison.differences.values())


def test_a_worse_model_fails_by_name_and_a_better_one_passes() -> None:
    good, bad = scored(0.2), scored(1.5)
    comparison = compare(bad, good)
    reasons = comparison.reasons(LIMITS)
    assert {reason.split()[0] for reason in reasons} >= {"auc", "gauc", "auc_cold", "log_loss"}
    assert "the limit is -0.002" in reasons[0]
    assert compare(good, bad).reasons(LIMITS) == ()
    mean = comparison.differences["auc"].mean
    assert mean == pytest.approx(roc_auc_score(bad.label, bad.score) - roc_auc_score(good.label, good.score))
    assert comparison.differences["auc"].low < mean < comparison.differences["auc"].high


def test_a_drop_that_may_be_chance_passes() -> None:
    few = {"users": 8, "each": 10}
    comparison = compare(scored(0.6, **few), scored(0.2, **few))
    assert comparison.differences["auc"].mean < -LIMITS.max_auc_drop
    assert comparison.reasons(LIMITS) == ()


def test_predictions_that_are_too_high_fail_though_they_rank_alike() -> None:
    comparison = compare(scored(0.2, scale=1.3), scored(0.2))
    assert comparison.differences["auc"].mean == pytest.approx(0, abs=0.01)
    reasons = comparison.reasons(LIMITS)
    assert any(reason.startswith("calibration (mean prediction / click rate) is 1.3") for reason in reasons)


@pytest.mark.parametrize(("cold", "judged"), [(0, False), (19, False), (20, True)])
def test_only_a_cold_slice_with_enough_of_both_classes_can_fail(cold: int, judged: bool) -> None:
    """`cold` clicks and as many non-clicks of one user, which the candidate ranks wrong and the champion right."""
    scores = scored(0.0)
    label = np.array([1] * cold + [0] * cold, np.float32)
    user, shown = np.full(2 * cold, -1), np.zeros(2 * cold, np.int64)

    def model(score: npt.NDArray[np.float64]) -> Scores:
        warm = (scores.label, scores.score, scores.user, np.full(len(scores), 9))
        return Scores(*(np.concatenate(parts) for parts in zip(warm, (label, score, user, shown), strict=True)))

    comparison = compare(model(0.5 - 0.1 * label), model(0.5 + 0.1 * label))
    assert ("auc_cold" in comparison.differences) == judged
    assert [reason for reason in comparison.reasons(LIMITS) if reason.startswith("auc_cold")] == (
        ["auc_cold -1.0000 (-1.0000 to -1.0000) against the champion, the limit is -0.002"] if judged else []
    )


def test_other_impressions_are_refused() -> None:
    with pytest.raises(ValueError, match="different impressions"):
        compare(scored(0.5), scored(0.5, seed=1))
