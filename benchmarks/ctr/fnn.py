"""FNN (arXiv 1601.02376): the vectors of user and item fields, side by side, through an MLP. It sees no behaviours."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.ctr.embedding import Head, Inputs, ItemVectors, user_table
from jobs.ctr.batch import UserBatch


class FNN(nn.Module):
    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.user, self.item = user_table(inputs), ItemVectors(inputs)
        self.head = Head(inputs, (1 + self.item.count) * inputs.width)

    def forward(self, batch: UserBatch) -> Tensor:
        fields = torch.cat([self.user(batch.user_number + 1)[:, None], self.item.fields(batch.candidates)], dim=1)
        logits: Tensor = self.head(batch, fields.flatten(1))
        return logits
