"""fit: `item_embeddings` at one version -> a codebook, registered as `candidate`.

Batches are read from the table's files by pyarrow, so neither the driver nor a worker ever holds the whole table.
One process by default; with `fit.workers` > 1 TorchDistributor starts that many on Spark's executors and each reads
its share of the files' rows.
"""

from __future__ import annotations

import json
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from pyarrow import fs

from jobs.config import Config, ConfigError
from jobs.load import Fusion
from jobs.packed import unpack
from jobs.pictures import draw_convergence
from jobs.registry import CANDIDATE, CODEBOOK_MODEL, ModelVersion, Registry, pinned, register
from jobs.session import one_machine
from jobs.tables import ITEM_EMBEDDINGS, SchemaError, Warehouse
from tokenizer import FIT_BLOCK, RQGMM, Iteration, RQGMMFit, fit_rqgmm, load_codebook, save_codebook

Progress = Callable[[Iteration], None]


@dataclass(frozen=True)
class FitResult:
    model: ModelVersion
    codebook_hash: str
    picture: Path | None
    seconds: float = 0.0
    nothing_to_do: bool = False


class FitFailed(RuntimeError):
    """A worker of a distributed fit failed; the message is the worker's own."""


@dataclass(frozen=True)
class EmbeddingFiles:
    """A table version as a re-iterable of float32 batches (n, dim): the rows of `files` that fall to `rank` of `world`.

    Every `step`-th row counts. Ranks take consecutive stretches of them that begin at a block of the fit, so that the
    blocks, and with them the codebook, are the same for any number of workers. Only row groups with own rows are read.
    """

    files: tuple[str, ...]
    dim: int
    batch_rows: int
    rank: int = 0
    world: int = 1
    step: int = 1

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Batches, the next of which is read while the caller works on this one."""
        batches = self._batches()
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(next, batches, None)
            while (batch := ahead.result()) is not None:
                ahead = reader.submit(next, batches, None)
                yield batch

    def _batches(self) -> Iterator[torch.Tensor]:
        groups = []  # (file, row group, number of its first row in the table)
        rows = 0
        for uri in self.files:
            filesystem, path = fs.FileSystem.from_uri(uri)
            file = pq.ParquetFile(path, filesystem=filesystem)
            for group in range(file.num_row_groups):
                groups.append((file, group, rows))
                rows += file.metadata.row_group(group).num_rows
        blocks = -(-rows // (FIT_BLOCK * self.step))
        begin, end = (FIT_BLOCK * self.step * (blocks * rank // self.world) for rank in (self.rank, self.rank + 1))
        for file, group, first in groups:
            if first >= end or first + file.metadata.row_group(group).num_rows <= begin:
                continue
            for batch in file.iter_batches(self.batch_rows, row_groups=[group], columns=["embedding"]):
                own = batch.slice(max(0, begin - first), max(0, end - max(first, begin)))
                skipped = -max(first, begin) % self.step
                first += len(batch)
                if len(own):
                    yield torch.tensor(unpack(own.column(0), self.dim)[skipped :: self.step])


def run(
    config: Config, warehouse: Warehouse, registry: Registry, run_date: date, pictures: Path,
    champion: ModelVersion | None = None, progress: Progress | None = None,
) -> FitResult:  # fmt: skip
    """Fit on the newest `item_embeddings`, from the champion if there is one (stable IDs), and register a candidate.

    The work is named by its inputs: data version, settings and starting codebook. Where a version with that name is
    registered already there is nothing to do.
    """
    began = time.monotonic()
    fusion_text = warehouse.property(ITEM_EMBEDDINGS, "sid.fusion")
    if fusion_text is None:
        raise SchemaError("item_embeddings does not exist in this warehouse; run `sid load` first")
    fusion = Fusion.from_json(fusion_text)
    version = warehouse.version(ITEM_EMBEDDINGS)
    items = warehouse.read(ITEM_EMBEDDINGS, version).count()
    if items < config.fit.components:
        raise ConfigError(
            f"item_embeddings has {items} items and fit.components is {config.fit.components}; expected at least as many items as "
            f"components. Load more items or lower it: --set fit.components={max(2, items // 10)}"
        )
    same_shape = (
        champion is not None and champion.tags["shape"] == f"{config.fit.levels}x{config.fit.components}x{fusion.dim}"
    )
    start = champion if same_shape else None
    fit_key = f"{version}-{config.digest('fit')}-{start.tags['codebook_hash'][:16] if start else 'free'}"
    done = registry.find(CODEBOOK_MODEL, "fit_key", fit_key)
    if done is not None:
        if registry.resolve(CODEBOOK_MODEL, CANDIDATE) != done:
            registry.set_alias(CODEBOOK_MODEL, CANDIDATE, done.version)
        return FitResult(done, done.tags["codebook_hash"], None, time.monotonic() - began, nothing_to_do=True)

    files = tuple(warehouse.files(ITEM_EMBEDDINGS, version))
    step = max(1, items // config.fit.sample) if config.fit.sample else 1
    data = EmbeddingFiles(files, fusion.dim, config.fit.batch_rows, step=step)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        init = None
        if start is not None:
            init = load_codebook(registry.download(start, folder / "champion") / "artifacts" / "codebook").rqgmm
        fitted = _fit(config, data, init, folder, progress)
        manifest: dict[str, Any] = {
            "levels": config.fit.levels,
            "components": config.fit.components,
            "dim": fusion.dim,
            "fusion": json.loads(fusion.to_json()),
            "fit": config.fit.model_dump(mode="json"),
            "items": items,
            "items_fitted_on": -(-items // step),
            "table_versions": {ITEM_EMBEDDINGS.name: version},
            "started_from": start.tags["codebook_hash"] if start else None,
            "run_date": str(run_date),
        }
        codebook_hash = save_codebook(folder / "codebook", fitted.rqgmm, manifest)
        tags = {
            "fit_key": fit_key,
            "codebook_hash": codebook_hash,
            "shape": f"{config.fit.levels}x{config.fit.components}x{fusion.dim}",
            "started_from": start.tags["codebook_hash"] if start else "",
            "started_from_version": str(start.version) if start else "",
            "table_versions": pinned({ITEM_EMBEDDINGS.name: version}),
            "run_date": str(run_date),
        }
        picture = pictures / f"convergence-{codebook_hash[:12]}.png"
        draw_convergence(fitted.trace, picture)
        with registry.run("fit", config, tags) as run_:
            _log_trace(registry, run_.info.run_id, fitted)
            registry.client.log_artifact(run_.info.run_id, str(picture), "pictures")
            model = register(
                registry, CODEBOOK_MODEL, Path(__file__).with_name("codebook_model.py"), folder / "codebook", tags
            )
        registry.set_alias(CODEBOOK_MODEL, CANDIDATE, model.version)
    return FitResult(model, codebook_hash, picture, time.monotonic() - began)


def _fit(config: Config, data: EmbeddingFiles, init: RQGMM | None, folder: Path, progress: Progress | None) -> RQGMMFit:
    settings: dict[str, Any] = {
        "levels": config.fit.levels,
        "components": config.fit.components,
        "seed": config.fit.seed,
    }
    if config.fit.workers == 1:
        return fit_rqgmm(data, init=init, on_iteration=progress, **settings)
    from pyspark.ml.torch.distributor import TorchDistributor
    from pyspark.sql import SparkSession

    spark = SparkSession.active()
    slots = spark.sparkContext.defaultParallelism
    if config.fit.workers > slots:
        raise ConfigError(
            f"fit.workers is {config.fit.workers} and Spark has {slots} slots ({spark.sparkContext.master}); expected at most as many "
            "workers as slots. Lower fit.workers or give Spark more cores"
        )
    if init is not None:
        save_codebook(folder / "init", init, {})
    local = one_machine(spark.sparkContext.master)
    try:
        TorchDistributor(num_processes=config.fit.workers, local_mode=local, use_gpu=False).run(
            _fit_worker, asdict(data), settings, str(folder), init is not None
        )
    except RuntimeError as error:
        # The first to fail says why; the others only that it has gone.
        told = sorted(folder.glob("error-*.txt"), key=lambda file: file.stat().st_mtime_ns)
        if not told:
            raise
        raise FitFailed(
            f"worker {told[0].stem.removeprefix('error-')} of the fit failed:\n{told[0].read_text()}"
        ) from error
    trace = tuple(Iteration(**row) for row in json.loads((folder / "trace.json").read_text()))
    return RQGMMFit(load_codebook(folder / "fitted").rqgmm, trace)


def _fit_worker(data: dict[str, Any], settings: dict[str, Any], folder: str, warm: bool) -> str:
    """One process of a distributed fit. Rank 0 leaves the result in `folder`; a failure leaves its own text there."""
    import os

    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
        dist.init_process_group("gloo")
        share = EmbeddingFiles(**{**data, "files": tuple(data["files"]), "rank": rank, "world": world})
        init = load_codebook(Path(folder) / "init").rqgmm if warm else None
        fitted = fit_rqgmm(share, init=init, **settings)
        if rank == 0:
            save_codebook(Path(folder) / "fitted", fitted.rqgmm, {})
            (Path(folder) / "trace.json").write_text(json.dumps([asdict(step) for step in fitted.trace]))
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        # TorchDistributor's own exception does not carry the worker's text; the driver reads it from this file.
        # Whole or not at all: the first worker to fail has the others terminated, also while they write.
        part = Path(folder) / f"error-{rank}.part"
        part.write_text(traceback.format_exc(limit=-3))
        part.rename(part.with_suffix(".txt"))
        raise
    return folder


def _log_trace(registry: Registry, run_id: str, fitted: RQGMMFit) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    metrics = [
        Metric(f"level{step.level}_{name}", float(value), now, step.iteration)
        for step in fitted.trace
        for name, value in asdict(step).items()
        if name not in ("level", "iteration") and value is not None
    ]
    for start in range(0, len(metrics), 1000):  # MLflow's limit for one request
        registry.client.log_batch(run_id, metrics=metrics[start : start + 1000])
