"""What every model of the comparison is built of: the vectors of an item, and the MLP that ends in a logit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.ctr.impressions import ItemTokens
from jobs.ctr.batch import Items, UserBatch
from jobs.ctr.embedding import ItemEmbedding
from jobs.ctr.head import RunningNorm, tower

WIDTH = 16  # of every vector in the comparison
USER_STD = 0.1  # of user vectors at the start; nearer to zero what differs between users is found many epochs later


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a model is built of.

    Attributes:
        users, items: numbers of them; item row 0 is padding.
        tokens: of the items.
        item_ids: items have vectors of their own.
        vectors: (items + 1, .) embeddings of the items, zeros for padding, as a further input; None without.
        features: numeric features of an impression.
        width: D.
    """

    users: int
    items: int
    tokens: ItemTokens
    item_ids: bool
    vectors: Tensor | None
    features: int = 0
    width: int = WIDTH


class ItemVectors(nn.Module):
    """Items as F fields (..., F, D), or as the sum of these: the item id, each field of its tokens, its embedding.

    Ids and tokens are those of the job's `ItemEmbedding`, and start as they do there; the embedding, projected to D, is
    for the comparison only.
    """

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.item_ids, self.sizes = inputs.item_ids, inputs.tokens.fields
        self.tables = ItemEmbedding(1 + inputs.items * inputs.item_ids, inputs.tokens.table_rows, inputs.width)
        self.tables.spread(inputs.tokens.level_rows(), inputs.tokens.sums)
        self.vectors: Tensor | None
        self.register_buffer("vectors", inputs.vectors, persistent=False)
        self.project = None if inputs.vectors is None else nn.Linear(inputs.vectors.shape[1], inputs.width, bias=False)
        self.count = inputs.item_ids + len(self.sizes) + (self.project is not None)

    def fields(self, items: Items) -> Tensor:
        """(..., F, D)"""
        fields = self.tables.fields(self._known(items), self.sizes)
        if not self.item_ids:
            fields = fields[..., 1:, :]
        return torch.cat([fields, self._embedding(items)[..., None, :]], dim=-2) if self.project else fields

    def forward(self, items: Items) -> Tensor:
        """(..., D)"""
        vector: Tensor = self.tables(self._known(items))
        return vector + self._embedding(items) if self.project else vector

    def _known(self, items: Items) -> Items:
        """Without ids every item is row 0."""
        return items if self.item_ids else Items(torch.zeros_like(items.item), items.tokens, items.weights)

    def _embedding(self, items: Items) -> Tensor:
        assert self.project is not None
        assert self.vectors is not None
        rows, row = torch.unique(items.item, return_inverse=True)  # each item is projected once
        return F.embedding(row, self.project(self.vectors[rows]))


class Head(nn.Module):
    """What every model ends in: vectors side by side and the numeric features -> MLP -> logit.

    Args:
        width: of the vectors together.
    """

    def __init__(self, inputs: Inputs, width: int) -> None:
        super().__init__()
        self.normalize = RunningNorm(inputs.features)
        self.mlp = tower(width + inputs.features)

    def forward(self, batch: UserBatch, *vectors: Tensor) -> Tensor:
        """Vectors (n, .) -> logits (n,)"""
        logits: Tensor = self.mlp(torch.cat([*vectors, self.normalize(batch.features)], dim=1))[:, 0]
        return logits


def user_table(inputs: Inputs) -> nn.Embedding:
    """A vector for each user; row 0 is padding and stays zero."""
    embedding = nn.Embedding(inputs.users + 1, inputs.width, padding_idx=0)
    with torch.no_grad():
        embedding.weight[1:].normal_(std=USER_STD)
    return embedding
