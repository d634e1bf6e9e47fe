"""Mean pooling: a user is the mean of all their behaviours, whatever the candidate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.ctr.embedding import Head, Inputs, ItemVectors
from jobs.ctr.batch import UserBatch


class MeanPooling(nn.Module):
    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.item = ItemVectors(inputs)
        self.head = Head(inputs, 3 * inputs.width)

    def forward(self, batch: UserBatch) -> Tensor:
        behaviours, candidate = self.item(batch.behaviours), self.item(batch.candidates)  # (B, S, D), (n, D)
        length = (batch.last - batch.first).clamp_min(1)[:, None]
        mean = window_sums(behaviours, batch) / length
        logits: Tensor = self.head(batch, candidate, mean, candidate * mean)
        return logits


def window_sums(behaviours: Tensor, batch: UserBatch) -> Tensor:
    """(n, ...): sums of behaviours (B, S, ...) over each impression's history, as differences of two running sums."""
    total = torch.cat([torch.zeros_like(behaviours[:, :1]), behaviours], dim=1).cumsum(1)
    return total[batch.user, batch.last] - total[batch.user, batch.first]
