"""How sure a difference of two AUCs is: a paired bootstrap over users and seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jobs.ctr.metrics import auc

COLD = 5  # an item shown fewer times in training is cold
BOOTSTRAPS = 1000

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Scored:
    """Of some impressions, in their order: label, score, user and how often the item was shown in training."""

    label: npt.NDArray[np.float32]
    score: Floats
    user: npt.NDArray[np.int64]
    shown: npt.NDArray[np.int64]

    @property
    def auc(self) -> float:
        return auc(self.label, self.score)


def difference(
    own: Sequence[Scored], reference: Sequence[Scored], *, cold: bool = False, seed: int = 0
) -> tuple[float, float, float]:
    """AUC of `own` less that of `reference`, the mean over seeds, and its 95 % interval.

    A paired bootstrap: users are drawn with replacement, the same ones for both, and a seed for each draw.
    """
    pairs = []
    for mine, theirs in zip(own, reference, strict=True):
        kept = mine.shown < COLD if cold else np.ones(len(mine.label), bool)
        pairs.append((mine.label[kept], mine.score[kept], theirs.score[kept], mine.user[kept]))
    generator = np.random.default_rng(seed)
    users = np.unique(pairs[0][3])
    drawn = []
    for _ in range(BOOTSTRAPS):
        count = np.bincount(generator.integers(len(users), size=len(users)), minlength=len(users))
        which = generator.integers(len(pairs), size=len(pairs))
        drawn.append(np.mean([_weighted_difference(pairs[number], users, count) for number in which]))
    exact = float(np.mean([auc(label, mine) - auc(label, theirs) for label, mine, theirs, _ in pairs]))
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return exact, float(low), float(high)


def _weighted_difference(pair: tuple[npt.NDArray[np.float32], Floats, Floats, Ints], users: Ints, count: Ints) -> float:
    label, mine, theirs, user = pair
    weight = count[np.searchsorted(users, user)].astype(np.float64)
    return weighted_auc(label, mine, weight) - weighted_auc(label, theirs, weight)


def weighted_auc(label: npt.NDArray[np.float32], score: Floats, weight: Floats) -> float:
    """AUC of rows that count `weight` times each."""
    order = np.argsort(score, kind="stable")
    label, weight, score = label[order], weight[order], score[order]
    group = np.cumsum(np.concatenate([[0], score[1:] != score[:-1]]))
    positive = np.bincount(group, weight * (label > 0))
    negative = np.bincount(group, weight * (label == 0))
    total = positive.sum() * negative.sum()
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / total) if total else math.nan
