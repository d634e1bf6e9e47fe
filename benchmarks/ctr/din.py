"""DIN (arXiv 1706.06978) over the full sequence: each candidate attends to every behaviour by a small network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.ctr.embedding import Head, Inputs, ItemVectors
from jobs.ctr.batch import UserBatch

HIDDEN = 16  # of the attention network


class TargetAttention(nn.Module):
    """The attention network reads behaviour, candidate and their product, each by a linear layer. That is one linear
    layer of the behaviour, with weights that depend on the candidate, so that no product of a pair is ever written.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.of_behaviour, self.of_product = (nn.Parameter(torch.randn(width, HIDDEN) / width**0.5) for _ in range(2))
        self.of_candidate = nn.Linear(width, HIDDEN)
        self.weight = nn.Linear(HIDDEN, 1)

    def forward(self, candidate: Tensor, behaviours: Tensor, mask: Tensor) -> Tensor:
        """(n, D), (n, S, D), mask (n, S) -> (n, D): mean of behaviours by softmax of weights; zeros without any."""
        return torch.bmm(self.weights(candidate, behaviours, mask)[:, None], behaviours)[:, 0]

    def weights(self, candidate: Tensor, behaviours: Tensor, mask: Tensor) -> Tensor:
        """Of each behaviour (n, S)."""
        transform = self.of_behaviour + candidate[:, :, None] * self.of_product  # (n, D, H)
        hidden = torch.baddbmm(self.of_candidate(candidate)[:, None], behaviours, transform).relu()  # (n, S, H)
        score = self.weight(hidden)[..., 0].masked_fill(~mask, torch.finfo(hidden.dtype).min)
        weight: Tensor = score.softmax(dim=1) * mask
        return weight


class DIN(nn.Module):
    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.item = ItemVectors(inputs)
        self.attention = TargetAttention(inputs.width)
        self.head = Head(inputs, 3 * inputs.width)

    def forward(self, batch: UserBatch) -> Tensor:
        behaviours, candidate = self.item(batch.behaviours), self.item(batch.candidates)  # (B, S, D), (n, D)
        interest = self.attention(candidate, behaviours[batch.user], history(batch))
        logits: Tensor = self.head(batch, candidate, interest, candidate * interest)
        return logits


def history(batch: UserBatch) -> Tensor:
    """(n, S) bool: which behaviours of its user are the history of an impression."""
    position = torch.arange(batch.behaviour_time.shape[1], device=batch.user.device)
    return (position >= batch.first[:, None]) & (position < batch.last[:, None])
