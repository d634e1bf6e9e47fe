"""A generated log of long sequences whose best possible AUC is known; retrieval by category sees half of the interests.

An item has a category and a style; its embedding shows both, the category more. A user likes some of each.
A click depends on how much of the whole history has the candidate's category, and on how much has its style, in
whatever category. Who retrieves the behaviours of one category loses most of the styles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from benchmarks.ctr.impressions import Impressions, Ints
from benchmarks.ctr.sources import Catalogue
from jobs.ctr.metrics import SortedScores

ITEMS, CATEGORIES, STYLES, DIM = 8000, 64, 48, 64
LIKED_CATEGORIES, LIKED_STYLES = 8, 8
IMPRESSIONS = 20  # of each user, over the second half of their sequence
STRENGTH = 1.3  # of category and style in the logit, each in its standard deviations

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Generated:
    """`probability` of a click of each impression; `category` and `style` (items + 1,), -1 for padding."""

    catalogue: Catalogue
    probability: Floats
    category: torch.Tensor
    style: torch.Tensor


def generate(users: int, length: int, levels: int, components: int, seed: int = 0) -> Generated:
    """`users` with histories of `length` / 10 to `length` behaviours."""
    generator = np.random.default_rng(seed)
    category, style = generator.integers(CATEGORIES, size=ITEMS), generator.integers(STYLES, size=ITEMS)
    directions = [scale * generator.normal(size=(size, DIM)) for size, scale in ((CATEGORIES, 1.0), (STYLES, 0.7))]
    x = directions[0][category] + directions[1][style] + 0.3 * generator.normal(size=(ITEMS, DIM))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    popularity = generator.lognormal(sigma=1.0, size=ITEMS)
    behaviours, parts = [], []
    for number in range(users):
        affinity = np.full(CATEGORIES, 0.02), np.full(STYLES, 0.05)
        for likes, count in zip(affinity, (LIKED_CATEGORIES, LIKED_STYLES), strict=True):
            likes[generator.choice(len(likes), count, replace=False)] = generator.gamma(1.0, size=count)
        taste = popularity * affinity[0][category] * affinity[1][style]
        size = int(length * 10 ** -generator.uniform(0, 1))
        behaviours.append(generator.choice(ITEMS, size, p=taste / taste.sum()))
        liked = generator.choice(ITEMS, IMPRESSIONS // 2, p=taste / taste.sum())
        anything = generator.choice(ITEMS, IMPRESSIONS - len(liked), p=popularity / popularity.sum())
        known = np.sort(generator.integers(size // 2, size + 1, size=IMPRESSIONS))
        parts.append((np.full(IMPRESSIONS, number), generator.permutation(np.concatenate([liked, anything])), known))
    start = np.concatenate([[0], np.cumsum([len(rows) for rows in behaviours])])
    user, item, known = (np.concatenate(column) for column in zip(*parts, strict=True))
    flat = np.concatenate(behaviours)
    shares = [_share(kind, flat, start, user, item, known) for kind in (category, style)]
    logit = sum(STRENGTH * (np.sqrt(share) - np.sqrt(share).mean()) / np.sqrt(share).std() for share in shares)
    probability = 1 / (1 + np.exp(-(np.asarray(logit) - 0.5)))
    split = np.tile(
        np.where(np.arange(IMPRESSIONS) >= 0.9 * IMPRESSIONS, 2, np.arange(IMPRESSIONS) >= 0.8 * IMPRESSIONS), users
    )
    shown = np.bincount(item[split == 0], minlength=ITEMS)[item]
    time = np.concatenate([np.arange(len(rows)) for rows in behaviours])
    log = Impressions(
        item_ids=pd.RangeIndex(ITEMS),
        behaviour_item=flat + 1,
        behaviour_time=time,
        start=start,
        user=user,
        item=item + 1,
        label=(generator.random(len(item)) < probability).astype(np.int64),
        time=known,
        known=known,
        split=split.astype(np.int64),
        shown=shown,
    )
    catalogue = Catalogue(log, torch.from_numpy(x).float(), torch.arange(1, ITEMS + 1), levels, components)
    kinds = (torch.from_numpy(np.concatenate([[-1], kind])) for kind in (category, style))
    return Generated(catalogue, probability, *kinds)


def expected_auc(probability: Floats, score: Floats) -> float:
    """The AUC of `score` that is expected of labels drawn with these probabilities: it has no noise of the labels."""
    rows, label = np.arange(2 * len(score)), np.repeat(np.array([1, 0], np.float32), len(score))
    both = SortedScores(label, np.concatenate([score, score]), rows)  # each impression as a click and as none
    return both.auc(np.concatenate([probability, 1 - probability]))


def _share(kind: Ints, flat: Ints, start: Ints, user: Ints, item: Ints, known: Ints) -> Floats:
    """(impressions,): of the known behaviours of each impression, the share of its candidate's kind."""
    shares = np.empty(len(user))
    for row, (who, what, until) in enumerate(zip(user, item, known, strict=True)):
        shares[row] = (kind[flat[start[who] : start[who] + until]] == kind[what]).mean()
    return shares
