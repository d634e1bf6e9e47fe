"""The gate of CTR models: a candidate against the champion, on the same impressions of the test split.

A difference counts only if it is certain: the users are drawn with replacement DRAWS times (a paired bootstrap), and a
metric fails where the whole 95 % interval of the difference is worse than its limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jobs.ctr.metrics import Scores, SortedScores, calibration, cold_slice, losses, user_aucs

DRAWS = 200


@dataclass(frozen=True)
class CtrLimits:
    """By how much a candidate may be worse than the champion.

    Attributes:
        max_auc_drop: Of AUC, GAUC, and AUC of the cold slice.
        max_log_loss_rise: In nats.
        max_calibration_drift: Of the absolute logarithm of mean prediction / click rate.
    """

    max_auc_drop: float
    max_log_loss_rise: float
    max_calibration_drift: float


@dataclass(frozen=True)
class Difference:
    """Candidate less champion, with the ends of the 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ({self.low:+.4f} to {self.high:+.4f})"


@dataclass(frozen=True)
class Comparison:
    """A candidate against the champion. The verdict follows from it under any limits.

    Attributes:
        differences: By metric: log_loss, and of auc, gauc and auc_cold those that are defined.
        calibration, champion_calibration: Mean prediction / click rate of either.
    """

    differences: Mapping[str, Difference]
    calibration: float
    champion_calibration: float

    def reasons(self, limits: CtrLimits) -> tuple[str, ...]:
        """Why the candidate may not replace the champion; none if it may."""
        reasons = [
            f"{name} {self.differences[name]} against the champion, the limit is {-limits.max_auc_drop:+g}"
            for name in ("auc", "gauc", "auc_cold")
            if name in self.differences and self.differences[name].high < -limits.max_auc_drop
        ]
        loss = self.differences["log_loss"]
        if loss.low > limits.max_log_loss_rise:
            reasons.append(f"log_loss {loss} against the champion, the limit is {limits.max_log_loss_rise:+g}")
        ours, theirs = self.calibration, self.champion_calibration
        if abs(np.log(ours)) > abs(np.log(theirs)) + limits.max_calibration_drift:
            reasons.append(
                f"calibration (mean prediction / click rate) is {ours:.3f}, the champion's {theirs:.3f}; expected at "
                f"most {limits.max_calibration_drift:g} further from 1"
            )
        return tuple(reasons)


def compare(candidate: Scores, champion: Scores, seed: int = 0) -> Comparison:
    """The comparison of two models from their scores of the same impressions.

    Their order may differ: no metric here tells impressions of one user with equal label and count apart.

    Raises:
        ValueError: the impressions differ.
    """
    candidate, champion = (_in_order(scores) for scores in (candidate, champion))
    if not all(
        np.array_equal(getattr(candidate, name), getattr(champion, name)) for name in ("user", "label", "shown")
    ):
        raise ValueError("candidate and champion have scores of different impressions; expected the same")
    return Comparison(
        _differences(candidate, champion, np.random.default_rng(seed)),
        *(calibration(scores.label, scores.score) for scores in (candidate, champion)),
    )


def _in_order(scores: Scores) -> Scores:
    order = np.lexsort((scores.shown, scores.label, scores.user))
    return Scores(scores.label[order], scores.score[order], scores.user[order], scores.shown[order])


def _differences(candidate: Scores, champion: Scores, random: np.random.Generator) -> dict[str, Difference]:
    _, user = np.unique(candidate.user, return_inverse=True)
    users = int(user.max()) + 1
    label, cold = candidate.label, cold_slice(candidate)
    both = (candidate, champion)
    whole = [SortedScores(scores.label, scores.score, user) for scores in both]
    slice_ = [SortedScores(label[cold], scores.score[cold], user[cold]) for scores in both]
    per_user = [user_aucs(user, label, scores.score) for scores in both]  # NaN for users of one class
    shown = np.bincount(user, minlength=users).astype(np.float64)
    loss = np.bincount(user, losses(label, candidate.score) - losses(label, champion.score), minlength=users)
    drawn: dict[str, list[float]] = {name: [] for name in ("auc", "gauc", "auc_cold", "log_loss")}
    exact = np.ones(users)
    for number in range(DRAWS + 1):
        times = np.bincount(random.integers(users, size=users), minlength=users) if number else exact
        drawn["auc"].append(whole[0].auc(times) - whole[1].auc(times))
        drawn["auc_cold"].append(slice_[0].auc(times) - slice_[1].auc(times))
        difference = per_user[0] - per_user[1]
        weight = np.where(np.isnan(difference), 0.0, times * shown)
        total = weight.sum()
        drawn["gauc"].append(float((np.nan_to_num(difference) * weight).sum() / total) if total else float("nan"))
        drawn["log_loss"].append(float((times * loss).sum() / (times * shown).sum()))
    return {name: _interval(values) for name, values in drawn.items() if not np.isnan(values[0])}


def _interval(values: list[float]) -> Difference:
    """The first value is of the users as they are, the others of draws."""
    low, high = np.nanquantile(values[1:], [0.025, 0.975])
    return Difference(values[0], float(low), float(high))
