"""Training through TorchDistributor: two processes are equal in kind to one, and a failure is one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ctr_data import ALTERNATES, COMPONENTS, LEVELS, Event, events_batch
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
from jobs.read_config import load_config
from jobs.train_model import TrainedModel, train_model

# TorchDistributor leaves the pipe to its workers open.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

INPUTS = ModelInputs(TokenScheme("soft", LEVELS, COMPONENTS, ALTERNATES, 100), item_rows=50, history=4)


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


def trained(groups: tuple[ExampleRowGroup, ...], folder: Path, *settings: str) -> tuple[TrainedModel, list[str]]:
    own = ("train.width=8", "train.epochs=3", "train.batch_positions=600", "train.learning_rate=0.01")
    config = load_config(overrides=[*own, *settings]).train
    start = random_start(INPUTS, DMQNShape(len(FEATURES), config.width, 2, 4), seed=0)
    reports: list[str] = []
    checkpoint = TrainingCheckpoint(f"{folder}/model", "key")
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
