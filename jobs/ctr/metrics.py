"""What a CTR model is worth on impressions whose clicks are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]

COLD = 5  # an item shown fewer times in the training split is cold
LEAST_COLD = 20  # clicks, and non-clicks: by chance alone, the AUC of 20 of each has a standard error of 0.09


@dataclass(frozen=True, eq=False)
class Scores:
    """Impressions with the model's probability of a click; arrays of shape (n,).

    Attributes:
        label: 1 is a click.
        score: Probability of a click.
        user: A number of the user.
        shown: Times the item was shown in the training split.
    """

    label: Labels
    score: Array
    user: Numbers
    shown: Numbers

    def __len__(self) -> int:
        return len(self.label)


@dataclass(frozen=True)
class Metrics:
    """NaN is undefined: an AUC needs clicks and non-clicks."""

    auc: float
    gauc: float
    gauc_users: int  # with clicks and non-clicks, over which GAUC is the mean
    log_loss: float
    calibration: float  # mean prediction / click rate
    auc_cold: float  # of items shown fewer than COLD times in training; NaN with fewer than LEAST_COLD of a class
    cold_impressions: int  # of such items
    cold_clicks: int


def measure(scores: Scores) -> Metrics:
    """All metrics of one model on one set of impressions."""
    label, score = scores.label, scores.score
    cold, every_cold = cold_slice(scores), scores.shown < COLD
    return Metrics(
        auc(label, score),
        *gauc(scores.user, label, score),
        log_loss(label, score),
        calibration(label, score),
        auc(label[cold], score[cold]),
        int(every_cold.sum()),
        int(label[every_cold].sum()),
    )


def cold_slice(scores: Scores) -> npt.NDArray[np.bool_]:
    """(n,): which impressions are of cold items; none where they are too few to measure an AUC."""
    cold = scores.shown < COLD
    clicks = scores.label[cold].sum()
    return cold if min(clicks, cold.sum() - clicks) >= LEAST_COLD else np.zeros_like(cold)


def auc(label: Labels, score: Array) -> float:
    """Area under the ROC curve from ranks, ties shared; NaN where only one class is present or a score is no number."""
    positives = float(label.sum())
    negatives = len(label) - positives
    if positives == 0 or negatives == 0 or np.isnan(score).any():
        return float("nan")
    _, inverse, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[inverse]
    return float((rank[label > 0].sum() - positives * (positives + 1) / 2) / (positives * negatives))


class SortedScores:
    """Impressions sorted by score once, so that each AUC with other weights takes one pass."""

    def __init__(self, label: Labels, score: Array, user: Numbers) -> None:
        order = np.argsort(score, kind="stable")
        score = score[order]
        self.label, self.user = label[order] > 0, user[order]
        self.tie = np.cumsum(np.concatenate([[0], score[1:] != score[:-1]])) if len(score) else np.zeros(0, np.int64)

    def auc(self, times: npt.NDArray[np.generic]) -> float:
        """AUC where each user's impressions count `times[user]` times; NaN where one class is absent."""
        weight = times[self.user].astype(np.float64)
        positive = np.bincount(self.tie, weight * self.label)
        negative = np.bincount(self.tie, weight * ~self.label)
        total = positive.sum() * negative.sum()
        below = np.cumsum(negative) - negative
        return float((positive * (below + negative / 2)).sum() / total) if total else float("nan")


def gauc(user: Numbers, label: Labels, score: Array) -> tuple[float, int]:
    """AUC per user, weighted by the user's impressions, and the number of users it is over: those with clicks and
    non-clicks. NaN where there are none or a score is no number."""
    if not len(user) or np.isnan(score).any():
        return float("nan"), 0
    _, number = np.unique(user, return_inverse=True)
    aucs, shown = user_aucs(number, label, score), np.bincount(number)
    both = ~np.isnan(aucs)
    return (float(np.average(aucs[both], weights=shown[both])) if both.any() else float("nan")), int(both.sum())


def user_aucs(user: Numbers, label: Labels, score: Array) -> Array:
    """AUC of each user, shape (users,); users are numbered from 0. NaN without both clicks and non-clicks."""
    order = np.lexsort((score, user))
    user, label, score = user[order], label[order].astype(np.float64), score[order]
    new_user = np.concatenate([[True], user[1:] != user[:-1]])
    new_tie = new_user | np.concatenate([[True], score[1:] != score[:-1]])
    first, tie = np.flatnonzero(new_user), np.cumsum(new_tie) - 1
    size = np.diff(np.append(np.flatnonzero(new_tie), len(user)))
    # From 1 among the user's impressions; ties share the mean of their ranks.
    rank = (np.flatnonzero(new_tie) + (size + 1) / 2)[tie] - first[user]
    shown, clicks = np.bincount(user).astype(np.float64), np.bincount(user, label)
    above = np.bincount(user, rank * label) - clicks * (clicks + 1) / 2
    pairs = clicks * (shown - clicks)
    aucs: Array = np.divide(above, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)
    return aucs


def log_loss(label: Labels, score: Array) -> float:
    """Mean negative log-likelihood of the labels, in nats; NaN without any."""
    return float(losses(label, score).mean()) if len(label) else float("nan")


def losses(label: Labels, score: Array) -> Array:
    """(n,): negative log-likelihood of each label, in nats."""
    p = np.clip(score, 1e-7, 1 - 1e-7)
    return np.asarray(-(label * np.log(p) + (1 - label) * np.log(1 - p)), np.float64)


def calibration(label: Labels, score: Array) -> float:
    """Mean prediction / click rate; 1 is right, NaN without clicks."""
    return float(score.mean() / label.mean()) if label.any() else float("nan")


def auc_by_rarity(test: Mapping[str, Scores]) -> tuple[list[str], dict[str, list[float]]]:
    """AUC of each model by how often the item was shown in training: the ranges, and the AUCs by model."""
    first = next(iter(test.values()))
    shown = first.shown
    bounds = [-1, 0]
    if (shown > 0).any():
        bounds += np.unique(np.quantile(shown[shown > 0], [0.25, 0.5, 0.75]).astype(int)).tolist()
    names: list[str] = []
    aucs: dict[str, list[float]] = {name: [] for name in test}
    for low, high in zip(bounds, [*bounds[1:], int(shown.max())], strict=True):
        rows = (shown > low) & (shown <= high)
        if rows.sum() >= 50 and 0 < first.label[rows].sum() < rows.sum():
            names.append("0" if high == 0 else f"{low + 1}-{high}")
            for name, scores in test.items():
                aucs[name].append(auc(scores.label[rows], scores.score[rows]))
    return names, aucs
