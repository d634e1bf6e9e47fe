"""DMQN (arXiv 2508.20865): a user's long behaviour sequence as N x W interest clusters, and the candidate's attention.

    behaviours -> MCQM -> N x W clusters -> ICIM -> interacted clusters -> CTAM with the candidate -> N interests -> MLP

Shapes: M behaviours of all users of a batch, Q histories, n impressions, N interest codebooks of W codewords, width D.

What needs no candidate, MCQM and ICIM, is `user_interests`, so that it can be computed once for a user and cached.

Ours, not the paper's: running sums. A behaviour is projected and assigned once, whatever the number of histories it is
part of: a cluster of a history is the difference of two running sums (`window_sums`). Impressions with the same history
share it. Whatever else differs from the paper is marked "ours" where it stands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.ctr.batch import Items, UserBatch
from jobs.ctr.head import DistributionEmbedding, RunningNorm, tower
from jobs.ctr.windows import window_sums

SMALL = 1e-6
SHARPNESS = 10.0  # scale of the cosine at the start


@dataclass(frozen=True)
class DMQNShape:
    """Sizes and settings of a model.

    Attributes:
        features: F, numeric features of an impression.
        width: D.
        interest_codebooks: N.
        codewords: W of each; N x W is about 100 in the paper.
        assignment: "soft": a behaviour belongs to each cluster in part; "straight-through": to one cluster, with the
            gradient of the soft assignment.
        hottest, coldest, halving: The temperature of the Gumbel-Softmax falls from hottest to coldest and halves every
            `halving` steps of training. By default it is cold from the start, which was better than cooling from 1.
        usage: Weight of the usage regulariser.
        noise: Whether assignments are noisy in training.
        by_distribution: Whether numeric features are read by their place in their distribution.
        experts: Of the first layer of the MLP; 0 is a plain layer.
    """

    features: int
    width: int = 32
    interest_codebooks: int = 2
    codewords: int = 50
    assignment: Literal["soft", "straight-through"] = "soft"
    hottest: float = 0.3
    coldest: float = 0.3
    halving: int = 500
    usage: float = 0.01
    noise: bool = True
    by_distribution: bool = False
    experts: int = 0


@dataclass(frozen=True, eq=False)
class Interests:
    """Of Q histories.

    Attributes:
        clusters: (N, Q, W, D), after ICIM.
        count: (N, Q, W), behaviours in each cluster, each counted for less the older its cluster is.
    """

    clusters: Tensor
    count: Tensor


class MultiClusterQuantization(nn.Module):
    """MCQM: behaviours -> W clusters of each of N interest codebooks. Over the behaviours m of a history [first, last),

        h = x W_j,  a = softmax((scale_j cos(h, c_j) + g) / T),
        cluster_w = sum_m a_mw h_m / sum_m a_mw,
        age_w = sum_m a_mw age_m / sum_m a_mw,  where age_m = (last - m) / (last - first) is 1 for the oldest behaviour,
        count_w = exp(-decay_j age_w) sum_m a_mw.

    Sums of assignments that are divided by are at least SMALL; the age of a cluster that is emptier goes to 1.
    Ours: age and decay; time is counted in behaviours, so that a log has it that knows only their order. Ours: a cosine
    with a learned scale: inner products are small as long as the vectors of items are, and the Gumbel noise g decides.
    Ours: W_j starts orthogonal, so that behaviours are as far apart as before; a Gaussian matrix loses directions.
    """

    temperature: Tensor

    def __init__(self, shape: DMQNShape) -> None:
        super().__init__()
        n, w, d = shape.interest_codebooks, shape.codewords, shape.width
        self.shape = shape
        self.project = nn.Parameter(torch.stack([nn.init.orthogonal_(torch.empty(d, d)) for _ in range(n)]))  # W_j
        self.codewords = nn.Parameter(torch.randn(n, w, d))  # c_j
        self.log_scale = nn.Parameter(torch.full((n, 1, 1), SHARPNESS).log())
        self.decay = nn.Parameter(torch.zeros(n, 1, 1))
        self.register_buffer("temperature", torch.tensor(shape.hottest))
        self.penalty = torch.zeros(())

    def forward(self, behaviours: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Behaviours (M, D), Q histories [first, last) of them -> clusters (N, Q, W, D), counts and ages (N, Q, W)."""
        projected = behaviours @ self.project  # (N, M, D)
        similarity = self.similarity(projected)
        if self.training:
            self.penalty = self.shape.usage * unevenness(similarity)
            self.cool()
        start = run_starts(first, last)
        position = from_start(torch.arange(len(behaviours), device=first.device), start).to(projected.dtype)
        columns = torch.stack([torch.ones_like(position), position], dim=-1).expand(len(projected), -1, -1)
        pooled = torch.cat([projected, columns], dim=-1)  # (N, M, D + 2)
        sums = window_sums(self.assign(similarity), pooled, first, last)  # (N, Q, W, D + 2)
        count = sums[..., -2]
        at_least = count.clamp(min=SMALL)
        means = sums[..., :-2] / at_least[..., None]
        begin, length = (part[:, None] for part in (from_start(first, start), (last - first).clamp(min=1)))
        # Counted from the history's own begin: from any other, a nearly empty cluster's age would depend on the batch.
        age = (1 - (sums[..., -1] - begin * count) / (at_least * length)).clamp(0, 1)
        return means, count * (-self.decay * age).exp(), age

    def similarity(self, projected: Tensor) -> Tensor:
        """Of projected behaviours (N, M, D) to the codewords, (N, M, W)."""
        cosine = F.normalize(projected, dim=-1) @ F.normalize(self.codewords, dim=-1).mT
        return self.log_scale.exp() * cosine

    def assign(self, similarity: Tensor) -> Tensor:
        """Similarity to the codewords (N, M, W) -> assignment (N, M, W), which adds to 1 over the codewords.

        The Gumbel noise g is drawn while training only, so that scoring is deterministic.
        """
        if self.training and self.shape.noise:
            uniform = torch.rand_like(similarity).clamp(SMALL, 1 - SMALL)
            similarity = similarity - torch.log(-torch.log(uniform))
        soft = (similarity / self.temperature).softmax(dim=-1)
        if self.shape.assignment == "soft":
            return soft
        hard = torch.zeros_like(soft).scatter(-1, soft.argmax(dim=-1, keepdim=True), 1.0)
        return hard + soft - soft.detach()

    def cool(self) -> None:
        """One step of the temperature's schedule."""
        self.temperature.mul_(0.5 ** (1 / self.shape.halving)).clamp_(min=self.shape.coldest)


def run_starts(first: Tensor, last: Tensor) -> Tensor:
    """(R,), sorted: where each run of overlapping histories [first, last) starts; no run is of two users."""
    order = first.argsort()
    covered = torch.cat([last.new_zeros(1), last[order].cummax(0).values[:-1]])
    return first[order][first[order] >= covered]


def from_start(position: Tensor, start: Tensor) -> Tensor:
    """Positions counted from the start of their run: neither they nor their rounding errors grow with the batch."""
    return position - start[torch.searchsorted(start, position.contiguous(), right=True) - 1]


def unevenness(similarity: Tensor) -> Tensor:
    """Usage regulariser: KL divergence of each codebook's mean assignment from the uniform one, mean over codebooks."""
    mean = similarity.softmax(dim=-1).mean(dim=1)  # (N, W)
    return (mean * (mean * mean.shape[-1] + SMALL).log()).sum(-1).mean()


class InterestClusterInteraction(nn.Module):
    """ICIM: one HSTU layer (arXiv 2402.17152) over the W clusters of each codebook: gated attention without softmax.

        U, V, Q, K = split(SiLU(norm(x) W1)),  y = x + (norm(SiLU(Q K^T + bias) V / W) * U) W2

    with `bias[v, w] = pair[v, w] - pace |age_v - age_w|`: learned for each pair of codewords, and by the time between
    their behaviours. Each codebook has weights of its own. Ours: W2 starts at zero: the layer starts as the identity.
    """

    def __init__(self, shape: DMQNShape) -> None:
        super().__init__()
        n, w, d = shape.interest_codebooks, shape.codewords, shape.width
        self.norm_in, self.norm_out = nn.LayerNorm(d), nn.LayerNorm(d)
        self.split = nn.Parameter(torch.randn(n, 1, d, 4 * d) / d**0.5)  # W1
        self.out = nn.Parameter(torch.zeros(n, 1, d, d))  # W2
        self.pair = nn.Parameter(torch.zeros(n, 1, w, w))
        self.pace = nn.Parameter(torch.zeros(n, 1, 1, 1))

    def forward(self, x: Tensor, age: Tensor) -> Tensor:
        """Clusters (N, Q, W, D) and their ages (N, Q, W) -> (N, Q, W, D)"""
        u, v, q, k = F.silu(self.norm_in(x) @ self.split).chunk(4, dim=-1)
        bias = self.pair - self.pace * (age[..., :, None] - age[..., None, :]).abs()
        attention = F.silu(q @ k.mT + bias) / x.shape[-2]  # (N, Q, W, W)
        mixed: Tensor = x + (self.norm_out(attention @ v) * u) @ self.out
        return mixed


class ClusterTargetAttention(nn.Module):
    """CTAM: the candidate q attends to the W clusters z of each codebook as full attention would to their behaviours.

        s_w = q . z_w / sqrt(D) + log (count_w / sum_v count_v),
        interest = sum_w softmax(s)_w z_w,  share = log sum_w exp(s_w)

    Ours: by the logarithm a cluster weighs as much as its behaviours together; the share, how much of the history is
    about the candidate, goes to the MLP beside the interest.
    """

    def __init__(self, shape: DMQNShape) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(shape.interest_codebooks, 1, 1))

    def forward(self, query: Tensor, clusters: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """C candidates of each of Q histories (N, Q, C, D), clusters (N, Q, W, D), counts (N, Q, W) -> interest
        (N, Q, C, D) and share (N, Q, C), both zero without a history.
        """
        score, known = self.scores(query, clusters, count)
        log_weight = score.log_softmax(dim=-1)
        share = score[..., 0] - log_weight[..., 0]  # the same for each w, and in half the time of logsumexp
        return (log_weight.exp() @ clusters) * known[..., None], torch.where(known, share, 0.0)

    def scores(self, query: Tensor, clusters: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """s of each cluster (N, Q, C, W), and which histories are not empty (N, Q, 1)."""
        similarity = query @ clusters.mT * (self.log_scale.exp() / query.shape[-1] ** 0.5)[..., None]
        total = count.sum(-1, keepdim=True)
        return similarity + (count / total.clamp(min=SMALL) + SMALL).log()[..., None, :], total > 0


class DMQN(nn.Module):
    """Logit of a click from a user's history, the candidate and numeric features.

    Ours: the MLP reads the mean of the N interests and that of their products with the query, not all of them side by
    side: with fewer weights it overfits less.

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
        self.normalize = DistributionEmbedding(shape.features) if shape.by_distribution else RunningNorm(shape.features)
        self.mlp = tower(3 * d + n + self.normalize.width, shape.experts)

    def forward(self, batch: UserBatch) -> Tensor:
        """Logits (n,)"""
        return self.score(*self.interests(batch), batch.candidates, batch.features)

    def interests(self, batch: UserBatch) -> tuple[Interests, Tensor]:
        """The interests of the Q different histories in a batch, and the history (n,) of each impression."""
        used = torch.arange(batch.behaviour_time.shape[1], device=batch.length.device) < batch.length[:, None]
        start = (batch.length.cumsum(0) - batch.length)[batch.user]
        windows = torch.stack([start + batch.first, start + batch.last], dim=1)
        histories, history = torch.unique(windows, dim=0, return_inverse=True)
        return self.user_interests(batch.behaviours[used], histories[:, 0], histories[:, 1]), history

    def user_interests(self, behaviours: Items, first: Tensor, last: Tensor) -> Interests:
        """MCQM and ICIM of Q histories [first, last) of the behaviours (M,) of some users."""
        clusters, count, age = self.quantize(self.embed(behaviours), first, last)
        return Interests(self.interact(clusters, age), count)

    def score(self, interests: Interests, history: Tensor, candidates: Items, features: Tensor) -> Tensor:
        """CTAM and MLP: candidates (n,), each with its `history` (n,) of the Q, features (n, F) -> logits (n,)."""
        candidate = self.embed(candidates)  # (n, D)
        query = candidate @ self.quantize.project  # (N, n, D), as a behaviour's
        if interests.count.shape[1] == 1:  # a request with one user: their clusters are not copied for each candidate
            attended = self.attend(query[:, None], interests.clusters, interests.count)
        else:
            attended = self.attend(query[:, :, None], interests.clusters[:, history], interests.count[:, history])
        interest, share = (part.flatten(1, 2) for part in attended)
        inputs = [candidate, interest.mean(0), (query * interest).mean(0), share.T, self.normalize(features)]
        logits: Tensor = self.mlp(torch.cat(inputs, dim=1))[:, 0]
        return logits

    def penalty(self) -> Tensor:
        """The usage regulariser of the last forward pass in training."""
        return self.quantize.penalty
