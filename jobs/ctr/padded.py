"""Training of the padded DMQN on tensors in memory. No Spark, no MLflow."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from jobs.config import TrainConfig
from jobs.ctr.metrics import auc, gauc, log_loss
from jobs.ctr.padded_dmqn import DMQN, DMQNShape
from tokenizer import item_tokens

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Examples:
    """One split as tensors. `history` (n, S) and `item` (n,) are item rows, 0 is padding; `user` numbers the users."""

    item: Tensor
    history: Tensor
    features: Tensor
    label: Tensor
    user: Tensor

    def __len__(self) -> int:
        return len(self.item)


@dataclass(frozen=True)
class Metrics:
    """NaN is undefined: an AUC needs clicks and non-clicks."""

    auc: float
    gauc: float
    gauc_users: int  # that have both, over which GAUC is the mean
    log_loss: float


@dataclass(frozen=True, eq=False)
class Trained:
    model: DMQN
    test: Metrics
    validation_auc: tuple[float, ...]  # by epoch
    scores: Array  # of the test examples


def shuffled_codes(codes: Tensor, seed: int) -> Tensor:
    """The control: the same codes, dealt to the items at random, so that sizes are equal and the meaning is gone."""
    known = (codes[:, 0] >= 0).nonzero()[:, 0]
    dealt = codes.clone()
    dealt[known] = codes[known[torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))]]
    return dealt


def train_dmqn(
    train: Examples, validation: Examples, test: Examples, codes: Tensor, components: int, config: TrainConfig,
    told: Callable[[int, float], None] | None = None,
) -> Trained:  # fmt: skip
    """Train with early stopping on the validation AUC; the best epoch's model is kept and judged on the test split."""
    torch.manual_seed(config.seed)
    tokens, table = item_tokens(codes, components)
    shape = DMQNShape(
        tokens=table, items=len(codes), levels=codes.shape[1], components=components, features=train.features.shape[1], width=config.width,
        interest_codebooks=config.interest_codebooks, codewords=config.codewords,
    )  # fmt: skip
    model = DMQN(shape)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    generator = torch.Generator().manual_seed(config.seed)
    best, aucs = copy.deepcopy(model), list[float]()
    for epoch in range(config.epochs):
        model.train()
        for rows in batches(train, config.batch_size, generator):
            loss = F.binary_cross_entropy_with_logits(_logits(model, train, rows, tokens), train.label[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        aucs.append(auc(validation.label.numpy(), predict(model, validation, tokens)))
        if told is not None:
            told(epoch + 1, aucs[-1])
        if epoch and not aucs[-1] > max(aucs[:-1]):  # nor where it is undefined
            break
        best = copy.deepcopy(model)
    scores = predict(best, test, tokens)
    return Trained(best, measure(test, scores), tuple(aucs), scores)


def batches(examples: Examples, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers in batches of like history length (little padding), in random order."""
    length = (examples.history > 0).sum(1).float()
    noise = torch.rand(len(examples), generator=generator)
    order = (length * (0.8 + 0.4 * noise) + noise).argsort()
    parts = list(order.split(size))
    for number in torch.randperm(len(parts), generator=generator).tolist():
        if len(parts[number]) > 1:  # batch normalisation needs two rows
            yield parts[number]


def predict(model: DMQN, examples: Examples, tokens: Tensor, size: int = 2048) -> Array:
    """Probability of a click, (n,)."""
    model.eval()
    order = (examples.history > 0).sum(1).argsort(stable=True)
    scores = torch.empty(len(examples))
    with torch.no_grad():
        for rows in order.split(size):
            scores[rows] = _logits(model, examples, rows, tokens).sigmoid()
    return scores.double().numpy()


def _logits(model: DMQN, examples: Examples, rows: Tensor, tokens: Tensor) -> Tensor:
    history = examples.history[rows].long()
    longest = max(1, int((history > 0).sum(1).max()))
    history = history[:, -longest:]  # right-aligned: padding is on the left
    item = examples.item[rows].long()
    logits: Tensor = model(history, tokens[history], item, tokens[item], examples.features[rows])
    return logits


def measure(examples: Examples, scores: Array) -> Metrics:
    label = examples.label.numpy()
    return Metrics(auc(label, scores), *gauc(examples.user.numpy(), label, scores), log_loss(label, scores))
