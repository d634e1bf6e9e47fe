"""Training through TorchDistributor: two processes are equal in kind to one, one that is lost changes nothing, and a
failure is one sentence.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ctr_data import ALTERNATES, COMPONENTS, LEVELS, Event, events_batch
from lost_workers import kill_worker_when, mark_workers
from pyspark.sql import SparkSession

from jobs.config import ConfigError
from jobs.ctr.dmqn import DMQNShape
from jobs.ctr.examples import FEATURES, user_rows
from jobs.ctr.metrics import auc
from jobs.ctr.stream import ExampleRowGroup, row_groups
from jobs.ctr.tokens import TokenScheme
from jobs.ctr.training_state import TrainingCheckpoint
from jobs.ctr.user_table import ModelInputs
from jobs.ctr.warm_start import random_start
from jobs.errors import SchemaError
from jobs.failures import failure
from jobs.read_config import load_config
from jobs.train_model import TrainedModel, train_model
from jobs.workers import WorkersFailed

# TorchDistributor leaves the pipe to its workers open.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

INPUTS = ModelInputs(TokenScheme("soft", LEVELS, COMPONENTS, ALTERNATES, 100), item_rows=50, history=4)

SMALL_STEPS = ("train.workers=2", "train.batch_positions=60", "train.learning_rate=0.001")  # some 100 an epoch


def write_examples(path: Path, moments: range) -> tuple[ExampleRowGroup, ...]:
    """One row group of 400 users, so that two processes share its users; odd items are clicked nine times as often."""
    g = np.random.default_rng(0)
    events = []
    for user in range(400):
        for ts in moments:
            item = int(g.integers(40))
            events.append(Event(user, ts, item, int(g.random() < (0.9 if item % 2 else 0.1))))
    pq.write_table(pa.Table.from_batches([user_rows(events_batch(events), INPUTS.history)]), path)
    return row_groups([str(path)])


def checkpoint_in(folder: Path) -> TrainingCheckpoint:
    return TrainingCheckpoint(f"{folder}/model", "key", every=5)


def trained(groups: tuple[ExampleRowGroup, ...], folder: Path, *settings: str) -> tuple[TrainedModel, list[str]]:
    own = ("train.width=8", "train.epochs=3", "train.batch_positions=600", "train.learning_rate=0.01")
    config = load_config(overrides=[*own, *settings]).train
    start = random_start(INPUTS, DMQNShape(len(FEATURES), config.width, 2, 4), seed=0)
    reports: list[str] = []
    checkpoint = checkpoint_in(folder)
    return train_model(config, groups, start, checkpoint, reports.append), reports


def test_two_processes_train_a_model_as_good_as_one(spark: SparkSession, tmp_path: Path) -> None:
    """The best possible AUC is 0.9, and both reach it to three standard errors of an AUC of 800 impressions."""
    groups = write_examples(tmp_path / "0.parquet", range(10))
    one, _ = trained(groups, tmp_path / "one")
    two, reports = trained(groups, tmp_path / "two", "train.workers=2")
    assert np.array_equal(one.test.label, two.test.label)
    for model in (one, two):
        assert auc(model.test.label, model.test.score) == pytest.approx(0.9, abs=0.03)
    assert not np.array_equal(one.test.score, two.test.score)
    assert "validation AUC" in reports[-1]
    state = two.checkpoint.load()
    assert state is not None
    assert state.validation_auc == two.validation_auc


def test_an_error_of_the_data_is_said_as_by_one_process(spark: SparkSession, tmp_path: Path) -> None:
    groups = write_examples(tmp_path / "0.parquet", range(6, 10))
    for number in ("1", "2"):
        with pytest.raises(SchemaError, match=r"^the training split has no examples"):
            trained(groups, tmp_path / number, f"train.workers={number}")


def test_more_workers_than_slots_is_a_sentence(spark: SparkSession, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.workers is 64 and Spark has 2 slots"):
        trained((), tmp_path, "train.workers=64")


@pytest.fixture(scope="module")
def undisturbed(
    spark: SparkSession, tmp_path_factory: pytest.TempPathFactory
) -> tuple[tuple[ExampleRowGroup, ...], TrainedModel]:
    """Row groups, and what two processes train on them."""
    folder = tmp_path_factory.mktemp("undisturbed")
    groups = write_examples(folder / "0.parquet", range(10))
    return groups, trained(groups, folder, *SMALL_STEPS)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("restarts", "in_tasks"), [(1, False), (0, False), (1, True)])
def test_a_training_that_loses_a_worker_goes_on_from_its_checkpoint_to_the_same_model(
    undisturbed: tuple[tuple[ExampleRowGroup, ...], TrainedModel],
    spark: SparkSession,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    restarts: int,
    in_tasks: bool,
) -> None:
    """All workers start again, or, after too many losses, the command ends with a sentence and the next one goes on.

    `in_tasks`: as on a cluster, where each worker is started by a task of Spark.
    """
    groups, whole = undisturbed

    def within_an_epoch() -> bool:
        state = checkpoint_in(tmp_path).load()
        return state is not None and state.batch > 0

    monkeypatch.setattr("jobs.workers.RESTARTS", restarts)
    if in_tasks:
        monkeypatch.setattr("jobs.workers.one_machine", lambda master: False)
        monkeypatch.setattr("jobs.workers.REPLACE_SECONDS", 0)
    mark_workers(monkeypatch, spark, tmp_path)
    kill_worker_when(within_an_epoch, tmp_path)
    if restarts:
        resumed, reports = trained(groups, tmp_path, *SMALL_STEPS)
        lost = [text for text in reports if "a worker was lost" in text]
        assert len(lost) == 1
        assert re.fullmatch(r"a worker was lost; going on from epoch [1-3] after [1-9][\d,]* examples", lost[0])
    else:
        with pytest.raises(WorkersFailed, match=r"^the training lost a worker 1 times") as raised:
            trained(groups, tmp_path, *SMALL_STEPS)
        shown = failure(raised.value)
        assert shown.code == 5
        assert "The same command again goes on from what is finished" in shown.sentence
        assert within_an_epoch()
        resumed, reports = trained(groups, tmp_path, *SMALL_STEPS)
        assert not any("lost" in text for text in reports)
    assert resumed.validation_auc == whole.validation_auc
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
