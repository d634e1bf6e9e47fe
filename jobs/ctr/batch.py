"""What a CTR model sees at a time: some users with their behaviours, and the impressions to score."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Items:
    """Items by the rows of the embedding tables they are the sum of; `...` is (B, S) for behaviours, (n,) for
    candidates.

    Attributes:
        item: (...) int64, row of the item table, 0 is padding.
        tokens: (..., T) int64, rows of the token table, 0 is padding.
        weights: (..., T) float32, the weight of each token; 0 for padding.
    """

    item: Tensor
    tokens: Tensor
    weights: Tensor

    def __getitem__(self, index: Tensor | tuple[Tensor, ...]) -> Items:
        """The items at `index` of the leading dimensions."""
        return Items(self.item[index], self.tokens[index], self.weights[index])

    def to(self, device: torch.device) -> Items:
        return Items(self.item.to(device), self.tokens.to(device), self.weights.to(device))


@dataclass(frozen=True, eq=False)
class UserBatch:
    """B users with up to S behaviours each, and n impressions of these users.

    Behaviours stand in order of time from position 0; `length` of each user's S positions are used, the rest is
    padding. The history of an impression is the positions [first, last) of its user: what happened strictly before it,
    cut to the latest `train.history`.

    Attributes:
        behaviours: Items of shape (B, S).
        behaviour_time: (B, S) int64, microseconds since 1970, or the position of a log with `order`; 0 for padding.
        length: (B,) int64.
        candidates: Items of shape (n,).
        user: (n,) int64, row of the impression's user in the batch.
        first: (n,) int64, first position of the history.
        last: (n,) int64, position after the last one.
        time: (n,) int64, as `behaviour_time`.
        features: (n, F) float32.
        label: (n,) float32, 1 is a click.
        shown: (n,) int64, times the item was shown in the training split.
        user_number: (n,) int64, a number of the user that is the same in every batch.
    """

    behaviours: Items
    behaviour_time: Tensor
    length: Tensor
    candidates: Items
    user: Tensor
    first: Tensor
    last: Tensor
    time: Tensor
    features: Tensor
    label: Tensor
    shown: Tensor
    user_number: Tensor

    def __len__(self) -> int:
        return len(self.label)

    def to(self, device: torch.device) -> UserBatch:
        return UserBatch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})
