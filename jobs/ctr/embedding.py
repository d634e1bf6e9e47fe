"""Items as vectors: the sum of the item's own vector and of its weighted token vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.ctr.batch import Items

COARSEST_STD = 0.6
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

    @torch.no_grad()
    def spread(self, level_rows: Sequence[slice | Tensor], sums: tuple[Tensor, Tensor] | None = None) -> None:
        """Start coarse to fine (ours): the tokens of level 1 far apart, those of each further level a third as far.

        From the first step, items that share coarse codes then fall into the same interest clusters, and others do not.
        With all vectors near zero every item has the same assignment, and gradients hardly tell them apart. A token of
        several codes starts as the sum of theirs, so that items start alike whatever the segmentation of their codes.

        Args:
            level_rows: Of each level, the rows of its codes' tokens; as slices or as row numbers.
            sums: Rows (P,) of tokens of several codes, and the rows (P, L) of these, padded with 0.
        """
        for level, rows in enumerate(level_rows):
            self.token[rows] = torch.randn_like(self.token[rows]) * (COARSEST_STD / 3**level)
        if sums is not None:
            rows, parts = sums
            self.token[rows] = self.token[parts].sum(1)

    def forward(self, items: Items) -> Tensor:
        """Items of shape (...) -> (..., D)"""
        item = F.embedding(items.item, self.item, padding_idx=0)
        return item + self.sum_tokens(items.tokens, items.weights) if items.tokens.shape[-1] else item

    def fields(self, items: Items, sizes: Sequence[int]) -> Tensor:
        """Items of shape (...) -> (..., 1 + F, D): the terms of `forward`, the item and each field of tokens.

        Args:
            sizes: (F,) tokens of each field, which stand side by side; they add to T.
        """
        parts = [F.embedding(items.item, self.item, padding_idx=0)]
        tokens, weights = (torch.split(part, list(sizes), dim=-1) for part in (items.tokens, items.weights))
        parts += [self.sum_tokens(*field) for field in zip(tokens, weights, strict=True)]
        return torch.stack(parts, dim=-2)

    def sum_tokens(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Rows (..., T) and weights (..., T) of tokens -> (..., D)"""
        flat = F.embedding_bag(
            rows.flatten(0, -2), self.token, mode="sum", per_sample_weights=weights.flatten(0, -2), padding_idx=0
        )
        return flat.view(*rows.shape[:-1], flat.shape[1])
