"""train on a model that was trained before: limits and champions that changed, and kills. Without Spark."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from delta_rows import registry_at, version_of

from jobs import train
from jobs.ctr.champion import ctr_champion, last_champion
from jobs.ctr.gate import CtrLimits, Difference
from jobs.ctr.log import Log
from jobs.ctr.log_columns import plan_reading
from jobs.ctr.train_result import TrainResult
from jobs.files.sources import open_source
from jobs.models.registry import CHAMPION, CTR_MODEL, Registry, register_lost
from jobs.models.versions import LOST_TAG, ctr_tags, verdict_tags
from jobs.read_config import load_config
from jobs.warehouse.tables import SEMANTIC_IDS

DAY = date(2026, 1, 1)
CODEBOOK = version_of("c" * 64)
VERSIONS = {SEMANTIC_IDS.name: 1}
LOOSE = "ctr_gate.max_auc_drop=0.02"
STRICT = "ctr_gate.max_auc_drop=0"
WORSE = TrainResult(  # than version 1, by 0.010 of AUC
    auc=0.69,
    calibration=1.01,
    rows_in=4,
    rows_used=4,
    champion=1,
    champion_calibration=0.99,
    differences={
        "auc": Difference(-0.01, -0.012, -0.008),
        "gauc": Difference(0.0, -0.001, 0.001),
        "auc_cold": Difference(0.0, -0.001, 0.001),
        "log_loss": Difference(0.0, -0.001, 0.001),
    },
)


@dataclass(frozen=True)
class Models:
    """A registry whose CTR models have no files, and the stage without tables: a training would end with an error."""

    registry: Registry
    log: Log

    def run(self, *settings: str) -> TrainResult:
        nothing: Any = None
        arguments = (load_config(overrides=settings), nothing, self.registry, CODEBOOK, VERSIONS, DAY, nothing)
        return train.run(*arguments, lambda _: None, self.log)

    def add(self, result: TrainResult, *settings: str) -> int:
        """Register the model that a training with these settings would give."""
        config = load_config(overrides=settings)
        inputs = train.input_settings(config, CODEBOOK)
        nothing: Any = None
        stage = train._Stage(config, nothing, self.registry, CODEBOOK, VERSIONS, print, self.log, inputs)
        tags = ctr_tags(
            codebook=CODEBOOK,
            train_key=stage.train_key,
            passed=result.passed,
            table_versions=VERSIONS,
            run_date=DAY,
            result=asdict(result),
        )
        with self.registry.run("train", config, {}):
            version = register_lost(self.registry, CTR_MODEL, tags)
        self.registry.client.delete_model_version_tag(version.name, str(version.number), LOST_TAG)
        return version.number

    def serving(self) -> tuple[int | None, int | None]:
        """Number of the champion, by the verdicts and by the alias."""
        champion = ctr_champion(self.registry, CODEBOOK.hash)
        return champion.number if champion else None, self.registry.ctr_models.alias(CHAMPION)

    def stages(self) -> list[str]:
        """Of the runs in MLflow, the last one first."""
        runs = self.registry.client.search_runs([self.registry.experiment_id])
        return [run.data.tags["stage"] for run in runs]


@pytest.fixture
def models(tmp_path: Path) -> Models:
    """Version 1 is champion; version 2, of the default settings, was refused against it."""
    path = tmp_path / "log.parquet"
    columns = {"user_id": [1, 1, 2, 2], "item_id": [1, 2, 1, 2], "timestamp": [1, 2, 3, 4], "label": [0, 1, 0, 1]}
    pq.write_table(pa.table(columns), path)
    source = open_source(str(path))
    log = Log(source, plan_reading(source.schema, load_config().train), 4, 4, {}, "")
    models = Models(registry_at(tmp_path / "warehouse"), log)
    assert models.add(TrainResult(auc=0.7), "train.seed=1") == 1
    assert models.add(WORSE.judged(CtrLimits(0.002, 0.002, 0.1))) == 2
    models.registry.ctr_models.set_alias(CHAMPION, 1)
    return models


def test_the_same_limits_leave_everything_as_it_is(models: Models) -> None:
    before = models.registry.ctr_models.registered()
    result = models.run()
    assert (result.version, result.passed, result.nothing_to_do) == (2, False, True)
    assert result.refusal is not None
    assert (
        "auc -0.0100 (-0.0120 to -0.0080) against the champion, the limit is -0.002. Version 1 stays" in result.refusal
    )
    assert models.serving() == (1, 1)
    assert models.registry.ctr_models.registered() == before


def test_looser_limits_make_the_refused_model_champion_without_training(models: Models) -> None:
    result = models.run(LOOSE)
    assert (result.version, result.passed, result.nothing_to_do) == (2, True, False)
    assert result.refusal is None
    assert (result.auc, result.differences) == (WORSE.auc, WORSE.differences)
    assert models.serving() == (2, 2)
    assert list(models.registry.ctr_models.versions()) == [1, 2]
    assert models.stages() == ["judge", "train", "train"]
    again = models.run(LOOSE)
    assert (again.version, again.passed, again.nothing_to_do) == (2, True, True)
    assert models.stages() == ["judge", "train", "train"]


def test_limits_that_refuse_it_still_are_the_ones_it_names(models: Models) -> None:
    for _ in range(2):
        result = models.run("ctr_gate.max_auc_drop=0.005")
        assert not result.passed
        assert "the limit is -0.005" in result.reasons[0]
        assert models.serving() == (1, 1)
    assert result.nothing_to_do
    assert models.stages() == ["judge", "train", "train"]


def test_tighter_limits_take_no_champion_out_of_service(models: Models) -> None:
    models.run(LOOSE)
    result = models.run(STRICT)
    assert (result.version, result.passed, result.nothing_to_do) == (2, True, True)
    assert models.serving() == (2, 2)


@pytest.mark.parametrize("written", range(4))
def test_a_verdict_that_was_killed_is_repaired_by_the_next_run(models: Models, written: int) -> None:
    """After `written` tags of three, or before the alias; until the last tag is there the earlier champion serves."""
    passed = WORSE.judged(CtrLimits(0.02, 0.002, 0.1))
    tags = list(verdict_tags(passed=True, result=asdict(passed)).items())
    models.registry.ctr_models.set_tags(2, dict(tags[:written]))
    assert models.serving() == (1 if written < len(tags) else 2, 1)
    result = models.run(LOOSE)
    assert (result.version, result.passed) == (2, True)
    assert models.serving() == (2, 2)
    assert TrainResult.of(ctr_champion(models.registry, CODEBOOK.hash)).passed  # type: ignore[arg-type]


def test_the_champion_is_the_model_that_passed_last(models: Models) -> None:
    """Not the one with the highest number: a model that is judged again may be older than the champion."""
    assert models.add(TrainResult(auc=0.7), "train.seed=3") == 3
    assert models.serving()[0] == 3
    models.registry.ctr_models.set_tags(2, verdict_tags(passed=True, result={}))
    assert models.serving()[0] == 2
    other = last_champion(models.registry, "d" * 64)
    assert other is not None
    assert other.number == 2


@pytest.mark.parametrize(
    ("trained", "asked", "found"),
    [
        ((), ("train.control=true",), False),
        (("train.control=true",), (), True),
        ((), ("train.workers=2", "train.threads=2"), True),
        ((), ("train.batch_positions=7",), False),
        ((), ("train.seed=7",), False),
    ],
)
def test_which_settings_ask_for_another_model(
    models: Models, trained: tuple[str, ...], asked: tuple[str, ...], found: bool
) -> None:
    """A model with a control also does where none is asked for. A training fails here, for lack of tables."""
    number = models.add(TrainResult(auc=0.71), "train.epochs=5", *trained)
    if found:
        assert models.run("train.epochs=5", *asked).version == number
    else:
        with pytest.raises(AttributeError, match="read"):
            models.run("train.epochs=5", *asked)
