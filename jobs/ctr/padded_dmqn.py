"""DMQN (arXiv 2508.20865), each impression by itself: a user's long behaviour sequence as N x W interest clusters, and the candidate's attention to them.

Shapes: B examples, S behaviours, N interest codebooks, W codewords each, D width. What does not depend on the candidate
(`user_interests`: MCQM and ICIM) is a method of its own, so that it can be computed once per user and cached.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class DMQNShape:
    """Sizes of a model; `tokens` rows of the semantic-ID table and `items` of the item table, padding row included."""

    tokens: int
    items: int
    levels: int
    components: int
    features: int
    width: int
    interest_codebooks: int
    codewords: int
    temperature: float = 1.0  # of the Gumbel-Softmax


class HSTU(nn.Module):
    """One HSTU layer over W vectors (arXiv 2402.17152, section 3): pointwise SiLU attention, gated, no softmax."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.split = nn.Linear(width, 4 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.bias = nn.Parameter(torch.zeros(length, length))  # rab: one weight per pair of codewords

    def forward(self, x: Tensor) -> Tensor:
        """(..., W, D) -> (..., W, D)"""
        u, v, q, k = F.silu(self.split(self.norm_in(x))).chunk(4, dim=-1)  # (..., W, D) each
        attention = F.silu(q @ k.transpose(-1, -2) + self.bias) / x.shape[-2]  # (..., W, W)
        gated: Tensor = self.out(self.norm_out(attention @ v) * u)
        return x + gated


class MultiClusterQuantization(nn.Module):
    """MCQM: behaviours -> W cluster vectors for each of N interest codebooks."""

    def __init__(self, shape: DMQNShape) -> None:
        super().__init__()
        n, w, d = shape.interest_codebooks, shape.codewords, shape.width
        self.project = nn.Parameter(torch.randn(n, d, d) / d**0.5)  # W_j
        # Spread wide, so that behaviours fall into different clusters from the first step, as in locality-sensitive hashing.
        self.codewords = nn.Parameter(torch.randn(n, w, d))  # c_j
        self.mass = nn.Parameter(
            torch.randn(n, 1, d) / d**0.5
        )  # how a cluster vector shows the number of its behaviours
        self.temperature = shape.temperature

    def assign(self, behaviours: Tensor) -> tuple[Tensor, Tensor]:
        """Projected behaviours (B, N, S, D) and their soft assignment to codewords (B, N, S, W); the candidate's likewise.

        Gumbel noise is added while training only, so that scoring is deterministic.
        """
        projected = torch.einsum("bsd,nde->bnse", behaviours, self.project)
        logits = torch.einsum("bnsd,nwd->bnsw", projected, self.codewords)
        if self.training:
            uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
            logits = logits - torch.log(-torch.log(uniform))
        return projected, (logits / self.temperature).softmax(dim=-1)

    def forward(self, behaviours: Tensor, mask: Tensor) -> Tensor:
        """(B, S, D), mask (B, S) -> clusters (B, N, W, D): codeword, mean of its behaviours, and their number."""
        projected, assignment = self.assign(behaviours)
        assignment = assignment * mask[:, None, :, None]
        mass = assignment.sum(dim=2)[..., None]  # (B, N, W, 1)
        pooled = torch.einsum("bnsw,bnsd->bnwd", assignment, projected) / (mass + 1e-6)
        filled = mass / (1 + mass)  # an empty cluster is its codeword alone
        return self.codewords + filled * pooled + torch.log1p(mass) * self.mass


class DMQN(nn.Module):
    """Logit of a click from history, candidate and numeric features."""

    def __init__(self, shape: DMQNShape) -> None:
        super().__init__()
        self.shape = shape
        d, n = shape.width, shape.interest_codebooks
        self.token = nn.Embedding(shape.tokens, d, padding_idx=0)
        self.item = nn.Embedding(shape.items, d, padding_idx=0)
        # What many items share comes first: level 1 is wide, each further level a third, the rest has to be learned.
        nn.init.normal_(self.token.weight, std=0.01)
        nn.init.normal_(self.item.weight, std=0.01)
        for level in range(shape.levels):
            rows = slice(1 + level * shape.components, 1 + (level + 1) * shape.components)
            nn.init.normal_(self.token.weight[rows], std=0.6 / 3**level)
        with torch.no_grad():
            self.token.weight[0] = self.item.weight[0] = 0.0
        self.quantize = MultiClusterQuantization(shape)
        self.interact = HSTU(d, shape.codewords)
        self.normalize = nn.BatchNorm1d(shape.features)
        self.mlp = nn.Sequential(
            nn.Linear((n + 1) * d + 2 * n + shape.features, 64),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(64, 32),
            nn.ReLU(),
            nn.Linear(32, 1),
        )

    def embed(self, items: Tensor, tokens: Tensor) -> Tensor:
        """Item rows (...,) and token rows (..., T) -> (..., D): the sum of their vectors; padding adds nothing."""
        total: Tensor = self.item(items) + self.token(tokens).sum(dim=-2)
        return total

    def user_interests(self, items: Tensor, tokens: Tensor) -> Tensor:
        """History items (B, S), tokens (B, S, T) -> interest clusters (B, N, W, D). Needs no candidate; item 0 is padding."""
        clusters = self.quantize(self.embed(items, tokens), (items > 0).float())
        interacted: Tensor = self.interact(clusters)
        return interacted

    def score(self, interests: Tensor, items: Tensor, tokens: Tensor, features: Tensor) -> Tensor:
        """CTAM and MLP: interests (B, N, W, D), candidate (B,), (B, T), features (B, F) -> logits (B,)."""
        candidate = self.embed(items, tokens)  # (B, D)
        # Query and keys are the candidate and the codewords, as for a behaviour: it reads the clusters it would fall into.
        query, weight = (part[:, :, 0] for part in self.quantize.assign(candidate[:, None]))  # (B, N, D), (B, N, W)
        interest = torch.einsum("bnw,bnwd->bnd", weight, interests)  # (B, N, D)
        match = (query * interest).mean(-1)  # (B, N)
        tally = (interest * self.quantize.mass[:, 0]).mean(-1)  # (B, N)  how many behaviours the read clusters hold
        inputs = torch.cat([candidate, interest.flatten(1), match, tally, self.normalize(features)], dim=1)
        logits: Tensor = self.mlp(inputs)[:, 0]
        return logits

    def forward(
        self, history_items: Tensor, history_tokens: Tensor, items: Tensor, tokens: Tensor, features: Tensor
    ) -> Tensor:
        return self.score(self.user_interests(history_items, history_tokens), items, tokens, features)
