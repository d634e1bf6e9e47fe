"""Linear attention (arXiv 2006.16236): a product of positive features replaces softmax, so histories are running sums.

The cost of an impression does not depend on the length of its history.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.ctr.embedding import Head, Inputs, ItemVectors
from benchmarks.ctr.pooling import window_sums
from jobs.ctr.batch import UserBatch


class LinearAttention(nn.Module):
    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.item = ItemVectors(inputs)
        self.query, self.key = (nn.Linear(inputs.width, inputs.width) for _ in range(2))
        self.head = Head(inputs, 3 * inputs.width)

    def forward(self, batch: UserBatch) -> Tensor:
        behaviours, candidate = self.item(batch.behaviours), self.item(batch.candidates)  # (B, S, D), (n, D)
        used = (batch.behaviours.item > 0)[..., None]
        key, query = (F.elu(self.key(behaviours)) + 1) * used, F.elu(self.query(candidate)) + 1
        extended = torch.cat(
            [behaviours, torch.ones_like(behaviours[..., :1])], dim=2
        )  # the last column sums the weights
        sums = window_sums(key[..., :, None] * extended[..., None, :], batch)  # (n, D, D + 1)
        read = torch.bmm(query[:, None], sums)[:, 0]
        interest = read[:, :-1] / read[:, -1:].clamp_min(1e-6)
        logits: Tensor = self.head(batch, candidate, interest, candidate * interest)
        return logits
