"""fit through TorchDistributor: as many workers as wanted, the same codebook."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data import topics
from lost_workers import kill_worker_when, mark_workers
from pyspark import SparkContext
from pyspark.sql import SparkSession

from jobs import fit
from jobs.config import ConfigError, FitConfig
from jobs.embeddings.batches import EmbeddingFiles
from jobs.embeddings.packed import pack
from jobs.models.checkpoint import Checkpoint
from jobs.workers import WorkersFailed
from tokenizer import FIT_BLOCK, RQGMM, Iteration, Method

# TorchDistributor leaves the pipe to its workers open.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingFiles:
    """Three blocks of a fit, the last one not full, in two files with the packed vectors of `item_embeddings`."""
    folder = tmp_path_factory.mktemp("vectors")
    x = topics(2 * FIT_BLOCK + 500, 6, groups=12)
    for number, part in enumerate((x[:9000], x[9000:])):
        pq.write_table(pa.table({"embedding": pack(part, "float32")}), folder / f"{number}.parquet")
    return EmbeddingFiles(tuple(f"{folder.as_uri()}/{number}.parquet" for number in range(2)), 6, batch_rows=5000)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingFiles:
    """One block of 600 rows."""
    path = tmp_path_factory.mktemp("few") / "0.parquet"
    pq.write_table(pa.table({"embedding": pack(topics(600, 6, groups=12), "float32")}), path)
    return EmbeddingFiles((path.as_uri(),), 6, batch_rows=200, in_memory=True)


def checkpoint(folder: Path) -> Checkpoint:
    result = Checkpoint(str(folder), "key")
    result.open()
    return result


def same(a: RQGMM, b: RQGMM) -> bool:
    return all(torch.equal(p.means, q.means) for p, q in zip(a.levels, b.levels, strict=True))


# On the two slots that the tests give Spark: TorchDistributor's local mode starts more processes than slots.
@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_workers_of_spark_fit_what_one_process_fits(
    tmp_path: Path, rows: EmbeddingFiles, spark: SparkSession, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SparkContext, "defaultParallelism", 3)
    alone = fit.fit_table(FitConfig(components=8), rows, checkpoint(tmp_path / "one"))
    together = fit.fit_table(FitConfig(components=8, workers=workers), rows, checkpoint(tmp_path / "workers"))
    assert same(alone.rqgmm, together.rqgmm)
    assert alone.trace == together.trace


@pytest.mark.parametrize("method", ["annealed", "em", "kmeans"])
def test_the_method_is_a_setting(tmp_path: Path, few: EmbeddingFiles, method: Method) -> None:
    fitted = fit.fit_table(FitConfig(components=8, method=method), few, checkpoint(tmp_path))
    temperatures = {step.temperature for step in fitted.trace}
    assert {"annealed": len(temperatures) > 2, "em": temperatures == {1.0}, "kmeans": temperatures == {0.0}}[method]
    own_variances = fitted.rqgmm.levels[0].variance is None
    assert own_variances == (method == "em")


@pytest.mark.parametrize(("killed_at", "repeated"), [(3, {3, 0}), (0, {0})])
def test_a_fit_goes_on_from_its_last_level(
    tmp_path: Path, few: EmbeddingFiles, killed_at: int, repeated: set[int]
) -> None:
    config = FitConfig(components=8, levels=3)
    whole = fit.fit_table(config, few, checkpoint(tmp_path / "whole"))

    class Killed(BaseException):
        pass

    def killed(step: Iteration) -> None:
        if step.level == killed_at:
            raise Killed

    with pytest.raises(Killed):
        fit.fit_table(config, few, checkpoint(tmp_path / "killed"), killed)
    steps: list[Iteration] = []
    resumed = fit.fit_table(config, few, checkpoint(tmp_path / "killed"), steps.append)
    assert {step.level for step in steps} == repeated
    assert same(whole.rqgmm, resumed.rqgmm)
    assert whole.trace == resumed.trace


@pytest.mark.slow
def test_a_lost_worker_restarts_the_fit_from_its_last_level(
    tmp_path: Path, rows: EmbeddingFiles, spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = checkpoint(tmp_path / "lost")
    mark_workers(monkeypatch, spark, tmp_path)
    kill_worker_when(lambda: (done := saved.latest()) is not None and done.rqgmm.n_levels >= 2, tmp_path)
    notes: list[str] = []
    config = FitConfig(components=8, levels=12)
    fitted = fit.fit_table(config.model_copy(update={"workers": 2}), rows, saved, report=notes.append)
    assert len(notes) == 1
    assert re.fullmatch(r"a worker was lost; going on from level ([3-9]|1\d)", notes[0])
    assert same(fitted.rqgmm, fit.fit_table(config, rows, checkpoint(tmp_path / "one")).rqgmm)


@pytest.mark.slow
def test_the_error_of_a_worker_reaches_the_user(tmp_path: Path, spark: SparkSession) -> None:
    missing = EmbeddingFiles((f"file://{tmp_path}/gone.parquet",), 6, 50)
    with pytest.raises(WorkersFailed, match=r"worker \d of the fit failed(.|\n)*gone\.parquet"):
        fit.fit_table(FitConfig(components=8, workers=2), missing, checkpoint(tmp_path))


def test_more_workers_than_slots_is_a_sentence(tmp_path: Path, few: EmbeddingFiles, spark: SparkSession) -> None:
    with pytest.raises(ConfigError, match=r"fit\.workers is 64 and Spark has 2 slots"):
        fit.fit_table(FitConfig(components=8, workers=64), few, checkpoint(tmp_path))
