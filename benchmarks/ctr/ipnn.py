"""IPNN (arXiv 1611.00144): FNN that also sees the inner products of all pairs of fields."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.ctr.embedding import Head, Inputs, ItemVectors, user_table
from jobs.ctr.batch import UserBatch


class IPNN(nn.Module):
    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.user, self.item = user_table(inputs), ItemVectors(inputs)
        fields = 1 + self.item.count
        self.first, self.second = torch.triu_indices(fields, fields, offset=1)
        self.head = Head(inputs, fields * inputs.width + fields * (fields - 1) // 2)

    def forward(self, batch: UserBatch) -> Tensor:
        fields = torch.cat([self.user(batch.user_number + 1)[:, None], self.item.fields(batch.candidates)], dim=1)
        products = (fields @ fields.transpose(1, 2))[:, self.first, self.second]
        logits: Tensor = self.head(batch, fields.flatten(1), products)
        return logits
