"""What every model of the comparison knows of an item: its own vector, those of its tokens, its embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.ctr.impressions import ItemTokens
from jobs.ctr.batch import Items

WIDTH = 16  # of every vector
INIT_STD = 0.01  # of tables: what is never trained is nearly nothing


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a model is built of.

    Attributes:
        users, items: numbers of them; item row 0 is padding.
        tokens: of the items.
        item_ids: items have vectors of their own.
        vectors: (items + 1, D) embeddings of the items, zeros for padding, as a further input; None without.
    """

    users: int
    items: int
    tokens: ItemTokens
    item_ids: bool
    vectors: Tensor | None


class ItemEmbedding(nn.Module):
    """Items as F fields (..., F, WIDTH), or as the sum of these: the item id, each field of its tokens, its embedding."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.fields = inputs.tokens.fields
        self.item = table(inputs.items + 1) if inputs.item_ids else None
        self.token = table(inputs.tokens.table_rows) if self.fields else None
        self.vectors: Tensor | None
        self.register_buffer("vectors", inputs.vectors, persistent=False)
        self.project = None if inputs.vectors is None else nn.Linear(inputs.vectors.shape[1], WIDTH, bias=False)
        self.count = len(self.fields) + (self.item is not None) + (self.project is not None)

    def separate(self, items: Items) -> Tensor:
        """(..., F, WIDTH)"""
        shape = items.item.shape
        parts = [] if self.item is None else [self.item(items.item)]
        if self.token is not None:
            rows, weights = (part.flatten(0, -2) for part in (items.tokens, items.weights))
            first = 0
            for size in self.fields:
                own = slice(first, first := first + size)
                field = F.embedding_bag(rows[:, own], self.token.weight, mode="sum", per_sample_weights=weights[:, own])
                parts.append(field.view(*shape, WIDTH))
        if self.project is not None:
            assert self.vectors is not None
            parts.append(F.embedding(items.item, self.project(self.vectors)))  # the whole catalogue once: it is small
        if not parts:  # the item is unknown: a field less
            return torch.zeros(*shape, 0, WIDTH, device=items.item.device)
        return torch.stack(parts, dim=-2)

    def forward(self, items: Items) -> Tensor:
        """(..., WIDTH)"""
        return self.separate(items).sum(dim=-2)


def table(rows: int) -> nn.Embedding:
    """Row 0 is padding and stays zero."""
    embedding = nn.Embedding(rows, WIDTH, padding_idx=0)
    with torch.no_grad():
        embedding.weight[1:].normal_(std=INIT_STD)
    return embedding


def mlp(inputs: int) -> nn.Sequential:
    """The head of every model: (n, inputs) -> (n, 1)."""
    return nn.Sequential(
        nn.Linear(inputs, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1)
    )
