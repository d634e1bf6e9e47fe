"""DMQN (arXiv 2508.20865): a user's long behaviour sequence as N x W interest clusters, and the candidate's attention to them.

    behaviours -> MCQM -> N x W clusters -> ICIM -> interacted clusters -> CTAM with the candidate -> N interests -> MLP -> logit

Shapes: M behaviours of all users of a batch, Q histories, n impressions, N interest codebooks, W codewords each, D width.
Impressions with the same history share it. A behaviour is projected and assigned once, whatever the number of histories it
is part of: a cluster of a history is the difference of two running sums (`window_sums`).

What needs no candidate, MCQM and ICIM, is `user_interests`, so that it can be computed once for a user and cached.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.ctr.batch import Items, UserBatch
from jobs.ctr.windows import window_sums

SMALL = 1e-6


@dataclass(frozen=True)
class DMQNShape:
    """Sizes and settings of a model.

    Attributes:
        features: F, numeric features of an impression.
        width: D.
        interest_codebooks: N.
        codewords: W of each; N x W is about 100 in the paper.
        hottest, coldest, halving: The temperature of the Gumbel-Softmax falls from hottest to coldest and halves every
            `halving` steps of training.
        usage: Weight of the usage regulariser.
    """

    features: int
    width: int = 32
    interest_codebooks: int = 4
    codewords: int = 25
    hottest: float = 1.0
    coldest: float = 0.3
    halving: int = 500
    usage: float = 0.01


@dataclass(frozen=True, eq=False)
class Interests:
    """Of Q histories.

    Attributes:
        clusters: (N, Q, W, D), after ICIM.
        count: (N, Q, W), behaviours in each cluster; they sum to the length of the history.
    """

    clusters: Tensor
    count: Tensor


class MultiClusterQuantization(nn.Module):
    """MCQM: behaviours -> W cluster vectors for each of N interest codebooks."""

    temperature: Tensor

    def __init__(self, shape: DMQNShape) -> None:
        super().__init__()
        n, w, d = shape.interest_codebooks, shape.codewords, shape.width
        self.shape = shape
        self.project = nn.Parameter(torch.randn(n, d, d) / d**0.5)  # W_j
        self.codewords = nn.Parameter(torch.randn(n, w, d))  # c_j
        self.register_buffer("temperature", torch.tensor(shape.hottest))
        self.penalty = torch.zeros(())

    def assign(self, projected: Tensor) -> Tensor:
        """Projected behaviours (N, M, D) -> their assignment (N, M, W): `a = softmax((h c^T + g) / T)`.

        The Gumbel noise g is drawn while training only, so that scoring is deterministic.
        """
        logits = projected @ self.codewords.mT
        if self.training:
            self._count_usage(logits)
            uniform = torch.rand_like(logits).clamp(SMALL, 1 - SMALL)
            logits = logits - torch.log(-torch.log(uniform))
        return (logits / self.temperature).softmax(dim=-1)

    def _count_usage(self, logits: Tensor) -> None:
        """Usage regulariser: KL divergence of each codebook's mean assignment from the uniform one, mean over codebooks."""
        mean = logits.softmax(dim=-1).mean(dim=1)  # (N, W)
        self.penalty = self.shape.usage * (mean * (mean * mean.shape[-1] + SMALL).log()).sum(-1).mean()
        self.temperature.mul_(0.5 ** (1 / self.shape.halving)).clamp_(min=self.shape.coldest)

    def forward(self, behaviours: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Behaviours (M, D) and Q histories [first, last) of them -> clusters (N, Q, W, D) and counts (N, Q, W).

        With `h = x W_j`, the cluster of codeword w is `c_jw + sum_m a_jmw h_jm / sum_m a_jmw` over the history, or the codeword
        alone where it has no behaviour.
        """
        projected = behaviours @ self.project  # (N, M, D)
        counted = torch.cat([projected, torch.ones_like(projected[..., :1])], dim=-1)
        sums, count = window_sums(self.assign(projected), counted, first, last).split([projected.shape[-1], 1], dim=-1)
        return self.codewords[:, None] + sums / count.clamp(min=SMALL), count[..., 0]


class InterestClusterInteraction(nn.Module):
    """ICIM: one HSTU layer over the W clusters of each codebook (arXiv 2402.17152): gated pointwise attention, no softmax.

    `U, V, Q, K = split(SiLU(norm(x) W1))`, `y = x + (norm(SiLU(Q K^T + bias) V / W) * U) W2`; weights of its own for each codebook.
    """

    def __init__(self, shape: DMQNShape) -> None:
        super().__init__()
        n, w, d = shape.interest_codebooks, shape.codewords, shape.width
        self.norm_in, self.norm_out = nn.LayerNorm(d), nn.LayerNorm(d)
        self.split = nn.Parameter(torch.randn(n, 1, d, 4 * d) / d**0.5)  # W1
        self.out = nn.Parameter(torch.zeros(n, 1, d, d))  # W2: the layer starts as the identity (ours)
        self.bias = nn.Parameter(torch.zeros(n, 1, w, w))  # one for each pair of codewords

    def forward(self, x: Tensor) -> Tensor:
        """(N, Q, W, D) -> (N, Q, W, D)"""
        u, v, q, k = F.silu(self.norm_in(x) @ self.split).chunk(4, dim=-1)
        attention = F.silu(q @ k.mT + self.bias) / x.shape[-2]  # (N, Q, W, W)
        mixed: Tensor = x + (self.norm_out(attention @ v) * u) @ self.out
        return mixed


class ClusterTargetAttention(nn.Module):
    """CTAM: the candidate attends to the W clusters of each codebook as full attention would to their behaviours.

    `s_w = q . z_w / sqrt(D) + log count_w`, so that a cluster weighs as much as its behaviours together. The interest is
    `sum_w softmax(s)_w z_w`; `log sum_w exp(s_w)`, how much of the history is about the candidate, goes to the MLP beside it (ours).
    """

    def __init__(self, shape: DMQNShape) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(shape.interest_codebooks, 1, 1))

    def forward(self, query: Tensor, clusters: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """(N, n, D), (N, n, W, D), (N, n, W) -> interest (N, n, D), zero without a history, and amount (N, n)."""
        similarity = (clusters @ query[..., None])[..., 0] * self.log_scale.exp() / query.shape[-1] ** 0.5
        score = similarity + (count + SMALL).log()
        known = count.sum(-1) > 0.5
        interest = ((score.softmax(dim=-1) * known[..., None])[..., None, :] @ clusters)[..., 0, :]
        return interest, torch.where(known, score.logsumexp(dim=-1), 0.0)


class DMQN(nn.Module):
    """Logit of a click from a user's history, the candidate and numeric features.

    Args:
        embed: Items of shape (...) -> (..., D).
    """

    def __init__(self, embed: nn.Module, shape: DMQNShape) -> None:
        super().__init__()
        d, n = shape.width, shape.interest_codebooks
        self.shape = shape
        self.embed = embed
        self.quantize = MultiClusterQuantization(shape)
        self.interact = InterestClusterInteraction(shape)
        self.attend = ClusterTargetAttention(shape)
        self.normalize = RunningNorm(shape.features)
        self.mlp = nn.Sequential(
            nn.Linear(d + n * (2 * d + 1) + shape.features, 64),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(64, 32),
            nn.ReLU(),
            nn.Linear(32, 1),
        )

    def forward(self, batch: UserBatch) -> Tensor:
        """Logits (n,)"""
        used = torch.arange(batch.behaviour_time.shape[1], device=batch.length.device) < batch.length[:, None]
        start = (batch.length.cumsum(0) - batch.length)[batch.user]
        windows = torch.stack([start + batch.first, start + batch.last], dim=1)
        histories, history = torch.unique(windows, dim=0, return_inverse=True)
        interests = self.user_interests(batch.behaviours[used], histories[:, 0], histories[:, 1])
        return self.score(interests, history, batch.candidates, batch.features)

    def user_interests(self, behaviours: Items, first: Tensor, last: Tensor) -> Interests:
        """MCQM and ICIM of Q histories [first, last) of the behaviours (M,) of some users."""
        clusters, count = self.quantize(self.embed(behaviours), first, last)
        return Interests(self.interact(clusters), count)

    def score(self, interests: Interests, history: Tensor, candidates: Items, features: Tensor) -> Tensor:
        """CTAM and MLP: candidates (n,), each with its `history` (n,) of the Q, features (n, F) -> logits (n,)."""
        candidate = self.embed(candidates)  # (n, D)
        query = candidate @ self.quantize.project  # (N, n, D), as a behaviour is
        interest, amount = self.attend(query, interests.clusters[:, history], interests.count[:, history])
        inputs = [candidate, *interest, *(query * interest), amount.T, self.normalize(features)]
        logits: Tensor = self.mlp(torch.cat(inputs, dim=1))[:, 0]
        return logits

    def penalty(self) -> Tensor:
        """The usage regulariser of the last forward pass in training."""
        return self.quantize.penalty


class RunningNorm(nn.Module):
    """(x - mean) / standard deviation of every row seen in training so far, so that one row can be normalised too."""

    count: Tensor
    mean: Tensor
    square: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
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
