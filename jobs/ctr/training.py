"""Training of a CTR model on batches of users: early stopping, checkpoints, one process or several.

A model is any `nn.Module` whose `forward(batch)` gives the logits (n,) of the batch's impressions. If it has a method
`penalty()`, what that returns after a forward pass is added to the loss.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.config import ConfigError
from jobs.ctr.batch import UserBatch
from jobs.ctr.metrics import Scores, auc
from jobs.ctr.training_state import TrainingCheckpoint, TrainingState
from jobs.errors import SchemaError
from tokenizer.collectives import distributed, gather_rows, total, total_rows, totals

REPORT_SECONDS = 5.0
TABLE_ROWS = 1024  # a parameter with as many rows is a table, of which a step uses few


class TrainingDiverged(ConfigError):
    """The loss or a prediction is no number."""


@dataclass(frozen=True)
class Progress:
    """Where training is. `validation_auc` is of the epoch that has just ended, None within one."""

    epoch: int  # from 1; 0 before the first step
    examples: int  # of this epoch, all processes
    examples_per_second: float
    loss: float  # mean of this epoch
    validation_auc: float | None = None

    def __str__(self) -> str:
        if not self.epoch:
            return f"at the start, validation AUC {self.validation_auc:.4f}"
        text = (
            f"epoch {self.epoch}, {self.examples:,} examples, {self.examples_per_second:,.0f} a second, "
            f"loss {self.loss:.4f}"
        )
        return text if self.validation_auc is None else f"{text}, validation AUC {self.validation_auc:.4f}"


@dataclass(frozen=True, eq=False)
class Trained:
    """The model as it was after its best epoch.

    Attributes:
        model: In eval mode.
        validation_auc: Of each epoch; before these that of the start, if the model was trained before.
        examples_per_second: Of training alone, since the last start.
    """

    model: nn.Module
    validation_auc: tuple[float, ...]
    examples_per_second: float


def train(
    model: nn.Module,
    batches: Callable[[int], Iterable[UserBatch]],
    validation: Iterable[UserBatch],
    *,
    epochs: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    patience: int = 1,
    seed: int = 0,
    trained_before: bool = False,
    checkpoint: TrainingCheckpoint | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Trained:
    """Train with Adam until `patience` epochs in a row have no validation AUC above the best so far, at most `epochs`;
    keep the best.

    Random numbers of a step depend on seed, process, epoch and number of the batch only, so a run that is killed and
    goes on from its checkpoint does the same steps as one that is not. Where torch.distributed is initialized, each
    process gives its own share of `batches` and `validation`; a step uses the mean gradient over the examples of all
    processes.

    Args:
        batches: The training batches of an epoch (from 0); the same for the same epoch.
        validation: Re-iterable.
        trained_before: The model as it is given counts as one of the epochs of which the best is kept.

    Raises:
        TrainingDiverged: the loss is no number.
        SchemaError: no batch to train on.
    """
    with torch.random.fork_rng():
        run = _Run(model, learning_rate, weight_decay, patience, seed, checkpoint, progress)
        if trained_before and not (run.epoch or run.batch):
            run.count_start(auc_of(predict(model, validation)))
        while run.epoch < epochs and not run.stopped:
            run.train_epoch(batches(run.epoch))
            run.end_epoch(auc_of(predict(model, validation)))
    model.load_state_dict(run.best)
    model.eval()
    return Trained(model, tuple(run.validation_auc), run.examples_per_second)


class _Run:
    """The state of one training; what of it survives a kill is `TrainingState`."""

    def __init__(
        self,
        model: nn.Module,
        learning_rate: float,
        weight_decay: float,
        patience: int,
        seed: int,
        checkpoint: TrainingCheckpoint | None,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.model, self.seed, self.checkpoint, self.progress = model, seed, checkpoint, progress
        self.optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, weight_decay=weight_decay, fused=True)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.tables = [parameter for parameter in parameters if _is_table(parameter)]
        self.others = [parameter for parameter in parameters if not _is_table(parameter)]
        self.patience = patience
        self.device = next(model.parameters()).device
        self.distributed = distributed()
        self.rank = dist.get_rank() if self.distributed else 0
        self.learning_rate = learning_rate
        self.epoch = self.batch = self.examples = 0
        self.loss = 0.0  # sum over the examples of this epoch
        self.validation_auc: list[float] = []
        self.best = copy.deepcopy(model.state_dict())
        self.seconds, self.seen = 0.0, 0
        state = checkpoint.load() if checkpoint else None
        if state is not None:
            state.restore(model, self.optimizer)
            self.epoch, self.batch, self.examples, self.loss = state.epoch, state.batch, state.examples, state.loss
            self.validation_auc, self.best = list(state.validation_auc), state.best

    @property
    def since_best(self) -> int:
        """Epochs since the best one; the first of equals is the best."""
        best = self.validation_auc.index(max(self.validation_auc)) if self.validation_auc else 0
        return len(self.validation_auc) - 1 - best

    @property
    def stopped(self) -> bool:
        return self.since_best >= self.patience

    @property
    def examples_per_second(self) -> float:
        return self.seen / self.seconds if self.seconds else 0.0

    def train_epoch(self, batches: Iterable[UserBatch]) -> None:
        self.model.train()
        own = iter(batches)
        for _ in range(self.batch):  # done before the checkpoint
            next(own, None)
        reported = began = time.monotonic()
        while examples := self.step(next(own, None)):
            self.batch += 1
            self.examples += examples
            self.seen += examples
            now = time.monotonic()
            self.seconds, began = self.seconds + now - began, now
            if now - reported > REPORT_SECONDS:
                self.report(None)
                reported = now
            if self.checkpoint and self.batch % self.checkpoint.every == 0:
                self.save()
        if not self.examples:
            raise SchemaError("the training split has no examples; expected at least one batch to train on")

    def step(self, batch: UserBatch | None) -> int:
        """One step of all processes, of which this one may have no batch left; the number of examples, 0 for none."""
        torch.manual_seed(_seed(self.seed, self.rank, self.epoch, self.batch))
        self.optimizer.zero_grad()
        own = everyone = len(batch) if batch is not None else 0
        loss = torch.zeros((), device=self.device)
        if batch is not None:
            batch = batch.to(self.device)
            loss = F.binary_cross_entropy_with_logits(self.model(batch), batch.label)
            penalty = getattr(self.model, "penalty", None)
            (loss if penalty is None else loss + penalty()).backward()
        value = float(loss.detach()) * own
        if self.distributed:
            everyone, value = self.average_gradients(own, value)
        if everyone:
            if not math.isfinite(value):
                raise TrainingDiverged(
                    f"training diverged: with train.learning_rate = {self.learning_rate:g} the loss is "
                    f"{value / everyone} in epoch {self.epoch + 1}; expected a number. Lower it"
                )
            self.optimizer.step()
            self.loss += value
        return everyone

    def average_gradients(self, own: int, loss: float) -> tuple[int, float]:
        """Gradients become the mean over the examples of all processes; the number of examples and the sum of
        losses.
        """
        everyone, loss = total(torch.tensor([own, loss], dtype=torch.float64)).tolist()
        if everyone:
            share = own / everyone
            for table in self.tables:
                table.grad = total_rows(_gradient(table) * share).to(self.device)
            means = totals([_gradient(parameter) * share for parameter in self.others])
            for parameter, mean in zip(self.others, means, strict=True):
                parameter.grad = mean.to(self.device)
        return int(everyone), loss

    def end_epoch(self, validation_auc: float) -> None:
        self.validation_auc.append(validation_auc)
        if not self.since_best:
            self.best = copy.deepcopy(self.model.state_dict())
        self.report(validation_auc)
        self.epoch, self.batch, self.examples, self.loss = self.epoch + 1, 0, 0, 0.0
        if self.checkpoint:
            self.save()

    def count_start(self, validation_auc: float) -> None:
        self.validation_auc = [validation_auc]
        if self.progress is not None and self.rank == 0:
            self.progress(Progress(0, 0, 0.0, math.nan, validation_auc))

    def report(self, validation_auc: float | None) -> None:
        if self.progress is not None and self.rank == 0:
            mean = self.loss / self.examples
            self.progress(Progress(self.epoch + 1, self.examples, self.examples_per_second, mean, validation_auc))

    def save(self) -> None:
        if self.distributed:
            _average_buffers(self.model)  # all processes go on from what this one stores, so they have the same
        if self.checkpoint and self.rank == 0:
            at = (self.epoch, self.batch, self.examples, self.loss, tuple(self.validation_auc))
            self.checkpoint.save(TrainingState.of(self.model, self.optimizer, self.best, *at))


def predict(model: nn.Module, batches: Iterable[UserBatch]) -> Scores:
    """The model's probabilities, of all processes' batches in the order of ranks."""
    device = next(model.parameters()).device
    if distributed():
        _average_buffers(model)
    model.eval()
    columns: list[tuple[Tensor, ...]] = []
    with torch.no_grad():
        for batch in batches:
            scores = model(batch.to(device)).double().sigmoid().cpu()
            columns.append((batch.label.cpu(), scores, batch.user_number.cpu(), batch.shown.cpu()))
    empty = (
        torch.empty(0),
        torch.empty(0, dtype=torch.float64),
        *(torch.empty(0, dtype=torch.int64) for _ in range(2)),
    )
    label, score, user, shown = (gather_rows(torch.cat(parts)).numpy() for parts in zip(empty, *columns, strict=True))
    return Scores(label, score, user, shown)


def auc_of(scores: Scores) -> float:
    return auc(scores.label, scores.score)


def _is_table(parameter: nn.Parameter) -> bool:
    return parameter.ndim == 2 and len(parameter) >= TABLE_ROWS


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _average_buffers(model: nn.Module) -> None:
    """What models count while training, such as the mean of a feature, is each process's own until here."""
    for buffer in model.buffers():
        buffer.copy_(total(buffer.double() / dist.get_world_size()))


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
