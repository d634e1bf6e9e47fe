"""IPNN (arXiv 1611.00144): FNN that also sees the inner products of all pairs of fields."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.ctr.embedding import WIDTH, Inputs, ItemEmbedding, mlp, table
from jobs.ctr.batch import UserBatch


class IPNN(nn.Module):
    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.user, self.item = table(inputs.users + 1), ItemEmbedding(inputs)
        fields = 1 + self.item.count
        self.first, self.second = torch.triu_indices(fields, fields, offset=1)
        self.head = mlp(fields * WIDTH + fields * (fields - 1) // 2)

    def forward(self, batch: UserBatch) -> Tensor:
        fields = torch.cat([self.user(batch.user_number + 1)[:, None], self.item.separate(batch.candidates)], dim=1)
        products = (fields @ fields.transpose(1, 2))[:, self.first, self.second]
        logits: Tensor = self.head(torch.cat([fields.flatten(1), products], dim=1))[:, 0]
        return logits
