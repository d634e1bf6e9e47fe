"""The end of a CTR model: its numeric features, and the network from all its vectors to a logit.

Two options. `DistributionEmbedding` (after DAES, arXiv 2602.03223) reads a numeric feature by its place among the
values seen so far. `DecoupledExperts` (after SD-MoE, arXiv 2602.12556) is a layer of experts that share its dominant
directions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SMALL = 1e-6
RESERVOIR = 1024  # values of a feature that are kept
KNOTS = 16  # vectors of a feature, evenly spaced over its distribution
NUMERIC_WIDTH = 4  # of a feature's vector


class RunningNorm(nn.Module):
    """(x - mean) / standard deviation of every row seen in training so far, so that one row can be normalised too."""

    count: Tensor
    mean: Tensor
    square: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.width = features  # of the result
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(features, dtype=torch.float64))
        self.register_buffer("square", torch.ones(features, dtype=torch.float64))  # mean of x^2

    def forward(self, x: Tensor) -> Tensor:
        """(n, F) -> (n, F)"""
        if self.training:
            rows = x.detach().double()
            self.count += len(rows)
            share = len(rows) / self.count
            self.mean.lerp_(rows.mean(0), share)
            self.square.lerp_(rows.square().mean(0), share)
        deviation = (self.square - self.mean.square()).clamp(min=SMALL).sqrt()
        return ((x - self.mean) / deviation).to(x.dtype)


class DistributionEmbedding(nn.Module):
    """Each numeric feature as a vector of its place in the distribution of the values seen in training.

        u_f = P(value < x_f) + P(value = x_f) / 2 of a uniform sample of the values seen so far,
        e_f = the vectors of the two knots next to u_f, interpolated,
        result_f = e_f * (1 + tanh(A_f u)), with A_f learned: the other features modulate a feature's vector.

    The sample is kept as in reservoir sampling, in ascending order. Ours: how the modulation is done; the paper has two
    forms of it.
    """

    sample: Tensor
    count: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.width = features * NUMERIC_WIDTH  # of the result
        self.register_buffer("sample", torch.full((features, RESERVOIR), torch.inf))  # inf: not filled yet
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        place = torch.linspace(-1, 1, KNOTS)[:, None]
        self.knots = nn.Parameter(place * torch.randn(features, 1, NUMERIC_WIDTH))  # starts linear in u
        self.modulate = nn.Parameter(torch.zeros(features, features, NUMERIC_WIDTH))  # A, starts without effect

    def forward(self, x: Tensor) -> Tensor:
        """(n, F) -> (n, F * NUMERIC_WIDTH)"""
        if self.training:
            self.add(x.detach())
        u = self.place(x)  # (n, F)
        low = (u * (KNOTS - 1)).long().clamp(max=KNOTS - 2)
        above = (u * (KNOTS - 1) - low)[..., None]
        feature = torch.arange(x.shape[1], device=x.device)
        vectors = torch.lerp(self.knots[feature, low], self.knots[feature, low + 1], above)  # (n, F, .)
        return (vectors * (1 + torch.einsum("ng,gfk->nfk", u, self.modulate).tanh())).flatten(1)

    def place(self, x: Tensor) -> Tensor:
        """u (n, F); 1/2 before anything was seen."""
        known = min(int(self.count), RESERVOIR)
        if not known:
            return torch.full_like(x, 0.5)
        sample, values = self.sample[:, :known].contiguous(), x.T.contiguous()
        below, through = (torch.searchsorted(sample, values, right=right) for right in (False, True))
        return (below + through).T.to(x.dtype) / (2 * known)

    def add(self, x: Tensor) -> None:
        """Each row seen so far, those of x (n, F) too, is in the sample with the same probability."""
        row = torch.arange(len(x), device=x.device)
        number = int(self.count) + row  # of each row among all, from 0
        slot = torch.where(number < RESERVOIR, number, (torch.rand(len(x), device=x.device) * (number + 1)).long())
        last = row.new_full((RESERVOIR,), -1)  # the last row of x that takes each slot
        last.scatter_reduce_(0, slot[slot < RESERVOIR], row[slot < RESERVOIR], "amax")
        self.sample[:, last >= 0] = x[last[last >= 0]].T
        self.sample.copy_(self.sample.sort(dim=1).values)
        self.count += len(x)


class DecoupledExperts(nn.Module):
    """A linear layer and experts that differ only outside its dominant directions.

        y = W x + b + sum_e softmax(G z)_e U_e z,  z = x - V V^T x,

    V: the `rank` dominant right singular vectors of W. What all inputs have in common lies in these directions, so that
    neither the gate nor the experts see it. Ours: V is computed from W at each step and has no gradient; all experts
    are mixed; the paper decouples the gradients too.
    """

    def __init__(self, width: int, out: int, experts: int, rank: int = 8) -> None:
        super().__init__()
        self.rank = min(rank, width, out)
        self.common = nn.Linear(width, out)  # W, b
        self.gate = nn.Linear(width, experts, bias=False)  # G
        self.experts = nn.Parameter(torch.randn(experts, width, out) * 0.1 / width**0.5)  # U

    def forward(self, x: Tensor) -> Tensor:
        """(n, width) -> (n, out)"""
        dominant = torch.linalg.svd(self.common.weight.detach(), full_matrices=False).Vh[: self.rank]  # V^T
        own = x - (x @ dominant.T) @ dominant
        weight = self.gate(own).softmax(dim=-1)  # (n, E)
        mixed: Tensor = self.common(x) + torch.einsum("ne,ni,eio->no", weight, own, self.experts)
        return mixed


def tower(width: int, experts: int = 0) -> nn.Sequential:
    """The network (n, width) -> (n, 1) that gives the logit; with `experts` its first layer has that many."""
    return nn.Sequential(
        DecoupledExperts(width, 64, experts) if experts else nn.Linear(width, 64),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(64, 32),
        nn.ReLU(),
        nn.Linear(32, 1),
    )
