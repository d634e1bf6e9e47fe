"""Items as vectors: the sum of the item's own vector and of its weighted token vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.ctr.batch import Items

STD = 0.01  # of the tables at the start: what is never trained adds nearly nothing


class ItemEmbedding(nn.Module):
    """`item[row of the id] + sum_t weights[t] * token[rows[t]]`; row 0 of both tables is padding and stays zero.

    Args:
        item_rows, token_rows: Rows of the two tables, padding included.
        width: D.
    """

    def __init__(self, item_rows: int, token_rows: int, width: int) -> None:
        super().__init__()
        self.item, self.token = (nn.Parameter(torch.randn(rows, width) * STD) for rows in (item_rows, token_rows))
        with torch.no_grad():
            self.item[0] = self.token[0] = 0.0

    def forward(self, items: Items) -> Tensor:
        """Items of shape (...) -> (..., D)"""
        item = F.embedding(items.item, self.item, padding_idx=0)
        if not items.tokens.shape[-1]:
            return item
        rows, weights = items.tokens.flatten(0, -2), items.weights.flatten(0, -2)
        tokens = F.embedding_bag(rows, self.token, mode="sum", per_sample_weights=weights, padding_idx=0)
        return item + tokens.view_as(item)
