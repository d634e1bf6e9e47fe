"""FNN (arXiv 1601.02376): the vectors of user and item fields, side by side, through an MLP. It sees no behaviours."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.ctr.embedding import WIDTH, Inputs, ItemEmbedding, mlp, table
from jobs.ctr.batch import UserBatch


class FNN(nn.Module):
    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.user, self.item = table(inputs.users + 1), ItemEmbedding(inputs)
        self.head = mlp((1 + self.item.count) * WIDTH)

    def forward(self, batch: UserBatch) -> Tensor:
        fields = torch.cat([self.user(batch.user_number + 1)[:, None], self.item.separate(batch.candidates)], dim=1)
        logits: Tensor = self.head(fields.flatten(1))[:, 0]
        return logits
