"""fit through TorchDistributor: as many workers as wanted, the same codebook."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest
import torch
from data import topics, write_vectors
from pyspark import SparkContext
from pyspark.sql import SparkSession

from jobs import fit, load
from jobs.config import Config, ConfigError, FitConfig
from jobs.distributed_fit import FitFailed
from jobs.embeddings.batches import EmbeddingFiles
from jobs.models.checkpoint import Checkpoint
from jobs.models.registry import open_registry
from jobs.warehouse.delta_spark import Warehouse
from jobs.warehouse.tables import ITEM_EMBEDDINGS
from tokenizer import FIT_BLOCK, RQGMM, Fusion, Iteration, Method

# TorchDistributor leaves the pipe to its workers open.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
DAY = date(2026, 1, 1)


def loaded(tmp_path: Path, warehouse: Warehouse, config: Config) -> EmbeddingFiles:
    load.run(config, warehouse, DAY)
    fusion = Fusion.from_json(warehouse.property(ITEM_EMBEDDINGS, "sid.fusion") or "")
    files = warehouse.files(ITEM_EMBEDDINGS, warehouse.version(ITEM_EMBEDDINGS))
    return EmbeddingFiles(tuple(files), fusion.dim, batch_rows=1000)


def test_a_warehouse_may_have_any_name(tmp_path: Path, spark: SparkSession, settings: Callable[..., Config]) -> None:
    """Spaces and percent signs mean something in a URI."""
    path = write_vectors(tmp_path / "v.parquet", list(range(40)), text_embedding=topics(40, 6))
    odd = Warehouse(spark, str(tmp_path / "my tables %20 #1"))
    assert sum(map(len, loaded(tmp_path, odd, settings(f"load.source={path}")))) == 40


def checkpoint(folder: Path) -> Checkpoint:
    opened = Checkpoint(str(folder), "key")
    opened.open()
    return opened


@pytest.fixture
def many(tmp_path: Path, warehouse: Warehouse, settings: Callable[..., Config]) -> EmbeddingFiles:
    rows = 2 * FIT_BLOCK + 500
    path = write_vectors(tmp_path / "v.parquet", list(range(rows)), text_embedding=topics(rows, 6, groups=12))
    data = loaded(tmp_path, warehouse, settings(f"load.source={path}"))
    assert sum(map(len, data)) == rows
    return data


def same(a: RQGMM, b: RQGMM) -> bool:
    return all(torch.equal(p.means, q.means) for p, q in zip(a.levels, b.levels, strict=True))


# Three workers for three blocks, on the two slots that the tests give Spark: TorchDistributor's local mode does not
# mind.
@pytest.mark.parametrize("workers", [2, 3])
def test_workers_of_spark_fit_what_one_process_fits(
    tmp_path: Path, many: EmbeddingFiles, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SparkContext, "defaultParallelism", 3)
    alone = fit.fit_table(FitConfig(components=8), many, checkpoint(tmp_path / "one"))
    together = fit.fit_table(FitConfig(components=8, workers=workers), many, checkpoint(tmp_path / "many"))
    assert same(alone.rqgmm, together.rqgmm)
    assert alone.trace == together.trace


@pytest.mark.parametrize("method", ["annealed", "em", "kmeans"])
def test_the_method_is_a_setting(tmp_path: Path, many: EmbeddingFiles, method: Method) -> None:
    fitted = fit.fit_table(FitConfig(components=8, method=method), many, checkpoint(tmp_path))
    temperatures = {step.temperature for step in fitted.trace}
    assert {"annealed": len(temperatures) > 2, "em": temperatures == {1.0}, "kmeans": temperatures == {0.0}}[method]
    own_variances = fitted.rqgmm.levels[0].variance is None
    assert own_variances == (method == "em")


@pytest.mark.parametrize(("killed_at", "repeated"), [(3, {3, 0}), (0, {0})])
def test_a_fit_goes_on_from_its_last_level(
    tmp_path: Path, many: EmbeddingFiles, killed_at: int, repeated: set[int]
) -> None:
    config = FitConfig(components=8, levels=3)
    whole = fit.fit_table(config, many, checkpoint(tmp_path / "whole"))

    class Killed(BaseException):
        pass

    def killed(step: Iteration) -> None:
        if step.level == killed_at:
            raise Killed

    with pytest.raises(Killed):
        fit.fit_table(config, many, checkpoint(tmp_path / "killed"), killed)
    steps: list[Iteration] = []
    resumed = fit.fit_table(config, many, checkpoint(tmp_path / "killed"), steps.append)
    assert {step.level for step in steps} == repeated
    assert same(whole.rqgmm, resumed.rqgmm)
    assert whole.trace == resumed.trace


def test_a_lost_worker_restarts_the_fit_from_its_last_level(
    tmp_path: Path, many: EmbeddingFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = f"SID_TEST={tmp_path}"
    monkeypatch.setenv(*mark.split("=", 1))
    place = checkpoint(tmp_path / "lost")

    def lose_one() -> None:
        while (done := place.latest()) is None or done.rqgmm.n_levels < 2:
            time.sleep(0.01)
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environment = (process / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:  # it has gone, or is not ours
                continue
            if mark in environment and "RANK=1" in environment:
                os.kill(int(process.name), signal.SIGKILL)

    loser = threading.Thread(target=lose_one, daemon=True)
    loser.start()
    notes: list[str] = []
    config = FitConfig(components=8, levels=12)
    fitted = fit.fit_table(config.model_copy(update={"workers": 2}), many, place, report=notes.append)
    assert len(notes) == 1
    assert re.fullmatch(r"a worker was lost; going on from level ([3-9]|1\d)", notes[0])
    assert same(fitted.rqgmm, fit.fit_table(config, many, checkpoint(tmp_path / "one")).rqgmm)


def test_a_worker_s_own_words_reach_the_user(tmp_path: Path, warehouse: Warehouse) -> None:
    missing = EmbeddingFiles((f"file://{tmp_path}/gone.parquet",), 6, 50)
    with pytest.raises(FitFailed, match=r"worker \d of the fit failed(.|\n)*gone\.parquet"):
        fit.fit_table(FitConfig(components=8, workers=2), missing, checkpoint(tmp_path))


def test_more_workers_than_slots_is_a_sentence(
    tmp_path: Path, warehouse: Warehouse, settings: Callable[..., Config]
) -> None:
    path = write_vectors(tmp_path / "v.parquet", list(range(60)), text_embedding=topics(60, 6))
    config = settings(f"load.source={path}", "fit.components=8", "fit.workers=64")
    load.run(config, warehouse, DAY)
    with pytest.raises(ConfigError, match=r"fit\.workers is 64 and Spark has 2 slots"):
        fit.run(config, warehouse, open_registry(config, warehouse.root), DAY, tmp_path / "pictures")
