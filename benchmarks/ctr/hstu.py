"""HSTU (arXiv 2402.17152) over the full sequence: causal layers of pointwise attention, then target attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.ctr.din import history
from benchmarks.ctr.embedding import Head, Inputs, ItemVectors
from jobs.ctr.batch import UserBatch

LAYERS = 2
DISTANCES = 32  # buckets of the learned bias by distance, each twice as wide as the one before


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.split, self.out = nn.Linear(width, 4 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.zeros(DISTANCES))

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D); a position sees itself and those before it."""
        u, v, q, k = F.silu(self.split(self.norm_in(x))).chunk(4, dim=-1)
        position = torch.arange(x.shape[1], device=x.device)
        distance = position[:, None] - position
        bias = self.bias[(distance.clamp_min(0) + 1).float().log2().long()]
        causal = (distance >= 0) / (position + 1)[:, None]
        attention = F.silu(q @ k.transpose(1, 2) + bias) * causal
        gated: Tensor = self.out(self.norm_out(attention @ v) * u)
        return x + gated


class HSTU(nn.Module):
    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.item = ItemVectors(inputs)
        self.layers = nn.Sequential(*(Layer(inputs.width) for _ in range(LAYERS)))
        self.query, self.key = (nn.Linear(inputs.width, inputs.width) for _ in range(2))
        self.head = Head(inputs, 3 * inputs.width)

    def forward(self, batch: UserBatch) -> Tensor:
        states, candidate = self.layers(self.item(batch.behaviours)), self.item(batch.candidates)
        own = states[batch.user]  # (n, S, D)
        mask = history(batch)
        score = (
            torch.einsum("nd,nsd->ns", self.query(candidate), self.key(states)[batch.user]) / candidate.shape[1] ** 0.5
        )
        weight = score.masked_fill(~mask, torch.finfo(score.dtype).min).softmax(dim=1) * mask
        interest = torch.bmm(weight[:, None], own)[:, 0]
        logits: Tensor = self.head(batch, candidate, interest, candidate * interest)
        return logits
