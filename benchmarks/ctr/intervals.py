"""How sure a difference of two AUCs is: a paired bootstrap over users and seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from jobs.ctr.metrics import Scores, SortedScores, auc, cold_slice

BOOTSTRAPS = 1000


def difference(
    own: Sequence[Scores], reference: Sequence[Scores], *, cold: bool = False, seed: int = 0
) -> tuple[float, float, float]:
    """AUC of `own` less that of `reference`, the mean over seeds, and its 95 % interval; NaN without enough cold items.

    Both have scores of the same impressions in the same order, of each seed. A paired bootstrap: users are drawn with
    replacement, the same ones for both, and a seed for each draw.
    """
    first = own[0]
    kept = cold_slice(first) if cold else np.ones(len(first), bool)
    if not kept.any():
        return math.nan, math.nan, math.nan
    users, user = np.unique(first.user[kept], return_inverse=True)
    pairs = [
        tuple(SortedScores(scores.label[kept], scores.score[kept], user) for scores in pair)
        for pair in zip(own, reference, strict=True)
    ]
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(BOOTSTRAPS):
        times = np.bincount(generator.integers(len(users), size=len(users)), minlength=len(users))
        which = generator.integers(len(pairs), size=len(pairs))
        drawn.append(np.mean([pairs[number][0].auc(times) - pairs[number][1].auc(times) for number in which]))
    exact = [_auc(mine, kept) - _auc(theirs, kept) for mine, theirs in zip(own, reference, strict=True)]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return float(np.mean(exact)), float(low), float(high)


def _auc(scores: Scores, kept: npt.NDArray[np.bool_]) -> float:
    return auc(scores.label[kept], scores.score[kept])
