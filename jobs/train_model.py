"""One model of the stage `train`: trained on the files of `ctr_examples`, by this process or by several.

Of several processes, which TorchDistributor starts on Spark's executors, each reads its share of the row groups. A step
uses the mean gradient over the batches of all, which together are as large as those of one process, so that the result
is equal in kind. Driver and workers exchange the model through the checkpoint of the training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from jobs.config import TrainConfig
from jobs.ctr.artefact import new_model
from jobs.ctr.dmqn import DMQN, DMQNShape
from jobs.ctr.metrics import Scores
from jobs.ctr.stream import ExampleRowGroup, ExampleStream
from jobs.ctr.training import Progress, Trained, predict, train
from jobs.ctr.training_state import TrainingCheckpoint, TrainingState
from jobs.ctr.user_table import ModelInputs
from jobs.ctr.warm_start import Start
from jobs.workers import WorkerFiles, Workers, local_device, worker
from tokenizer.kernels import without_denormals


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A model after its best epoch, and what it is worth.

    Attributes:
        started_from: Version of the model whose parameters it started from.
        validation_auc: Of each epoch; before these that of the start, if it was trained before.
        test: Scores of the test split.
        checkpoint: To delete when the model is registered.
    """

    model: DMQN
    inputs: ModelInputs
    started_from: int | None
    validation_auc: tuple[float, ...]
    test: Scores
    checkpoint: TrainingCheckpoint


@dataclass(frozen=True)
class Training:
    """What a process needs to train a model.

    Attributes:
        groups: Row groups of `ctr_examples`.
        trained_before: See `jobs.ctr.training.train`.
    """

    config: TrainConfig
    groups: tuple[ExampleRowGroup, ...]
    inputs: ModelInputs
    trained_before: bool
    checkpoint: TrainingCheckpoint

    def stream(self, split: str, rank: int, world: int) -> ExampleStream:
        positions, shuffle, seed = max(1, self.config.batch_positions // world), split == "train", self.config.seed
        return ExampleStream(
            self.groups, split, self.inputs, positions, shuffle=shuffle, seed=seed, rank=rank, world=world
        )

    def train(self, model: DMQN, progress: Callable[[Progress], None], rank: int = 0, world: int = 1) -> Trained:
        """Train from the checkpoint, or `model` as it is where there is none."""
        with compute_threads(self.config.threads), without_denormals():
            return train(
                model,
                self.stream("train", rank, world).at,
                self.stream("validation", rank, world),
                epochs=self.config.epochs,
                learning_rate=self.config.learning_rate,
                seed=self.config.seed,
                trained_before=self.trained_before,
                checkpoint=self.checkpoint,
                progress=progress,
            )


def train_model(
    config: TrainConfig,
    groups: tuple[ExampleRowGroup, ...],
    start: Start,
    checkpoint: TrainingCheckpoint,
    report: Callable[[str], None],
) -> TrainedModel:
    """Train on row groups of `ctr_examples`; a training that was killed goes on from its checkpoint.

    Raises:
        ConfigError: see `train`, and `Workers.run`.
        SchemaError, WorkersFailed: see `Workers.run`.
    """
    training = Training(config, groups, start.inputs, start.version is not None, checkpoint)
    model = start.model.to(local_device())
    if config.workers > 1:
        _train_on_workers(training, model, report)
    trained = training.train(model, lambda progress: report(str(progress)))  # after workers there is nothing left to do
    test = scored(model, training.stream("test", 0, 1), config.threads)
    return TrainedModel(model, start.inputs, start.version, trained.validation_auc, test, checkpoint)


def scored(model: DMQN, stream: ExampleStream, threads: int) -> Scores:
    with compute_threads(threads), without_denormals():
        return predict(model, stream)


@contextmanager
def compute_threads(count: int) -> Iterator[None]:
    """Operations by `count` threads for the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train_on_workers(training: Training, model: DMQN, report: Callable[[str], None]) -> None:
    """Leave the trained model in the checkpoint."""
    checkpoint = training.checkpoint
    if checkpoint.load() is None:
        checkpoint.save(TrainingState.before(model))

    def forward(step: dict[str, Any]) -> None:
        report(str(Progress(**step)))

    def lost() -> None:
        state = checkpoint.load()
        assert state is not None
        report(f"a worker was lost; going on from epoch {state.epoch + 1} after {state.examples:,} examples")

    files = WorkerFiles(f"{checkpoint.uri}-workers")
    workers = Workers(training.config.workers, "train.workers", "training", files)
    workers.run(_train_worker, training, model.shape, files, progress=forward, lost=lost)
    files.clear()


def _train_worker(training: Training, shape: DMQNShape, files: WorkerFiles) -> None:
    """One process of the training. Rank 0 stores checkpoint and progress."""
    with worker(files) as (rank, world):
        model = new_model(training.inputs, shape).to(local_device())
        training.train(model, lambda progress: files.save_progress(asdict(progress)), rank, world)
