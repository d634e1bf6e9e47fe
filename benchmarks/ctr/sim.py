"""SIM with hard search (arXiv 2006.05639): the latest behaviours of the candidate's category, then attention to them.

The category is the code of level 1 (`sim-code`) or a column of the items (`sim-category`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.ctr.din import TargetAttention
from benchmarks.ctr.embedding import Head, Inputs, ItemVectors
from jobs.ctr.batch import UserBatch

RETRIEVED = 50  # behaviours, at most


class SIM(nn.Module):
    def __init__(self, inputs: Inputs, category: Tensor) -> None:
        """`category` (items + 1,), -1 where there is none: such a candidate retrieves nothing."""
        super().__init__()
        self.item = ItemVectors(inputs)
        self.category: Tensor
        self.register_buffer("category", category, persistent=False)
        self.attention = TargetAttention(inputs.width)
        self.head = Head(inputs, 3 * inputs.width)

    def forward(self, batch: UserBatch) -> Tensor:
        latest = self.latest(batch)  # (n, R)
        retrieved = self.item(batch.behaviours)[batch.user[:, None], (latest - 1).clamp_min(0)]  # (n, R, D)
        candidate = self.item(batch.candidates)
        interest = self.attention(candidate, retrieved, latest > 0)
        logits: Tensor = self.head(batch, candidate, interest, candidate * interest)
        return logits

    def latest(self, batch: UserBatch) -> Tensor:
        """(n, R) int64: the latest positions of the candidate's category in each history, counted from 1; 0 is none."""
        wanted = self.category[batch.candidates.item]  # (n,)
        alike = (self.category[batch.behaviours.item][batch.user] == wanted[:, None]) & (wanted >= 0)[:, None]  # (n, S)
        position = torch.arange(alike.shape[1], device=alike.device)
        alike &= (position >= batch.first[:, None]) & (position < batch.last[:, None])
        return (alike * (position + 1)).topk(min(RETRIEVED, alike.shape[1]), dim=1).values
