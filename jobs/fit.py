"""fit: `item_embeddings` at one version -> a codebook, registered as `candidate`.

A process reads batches from the table's files with pyarrow. It keeps its rows in memory if they take at most
`fit.memory_mib`, and else reads them again in each pass, so that its memory does not grow with the table.
One process fits by default; `jobs/distributed_fit.py` fits with `fit.workers` of them.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from jobs.config import Config, ConfigError, FitConfig
from jobs.distributed_fit import fit_on_workers
from jobs.embeddings.batches import EmbeddingFiles
from jobs.embeddings.recipe import FUSION
from jobs.errors import SchemaError
from jobs.fingerprint import fingerprint
from jobs.models.checkpoint import Checkpoint
from jobs.models.codebooks import codebook_files, load_files, register_codebook
from jobs.models.registry import CANDIDATE, Registry
from jobs.models.versions import CodebookVersion, codebook_tags
from jobs.pictures import draw_convergence
from jobs.warehouse.delta_spark import Warehouse
from jobs.warehouse.tables import ITEM_EMBEDDINGS
from jobs.workers import local_device
from tokenizer import Fusion, Iteration, RQGMMFit, fit_rqgmm, save_codebook

RECIPE = 1  # version of the fit's algorithm: under another one the same inputs are fitted again
MLFLOW_METRICS = 1000  # MLflow's limit for one request


@dataclass(frozen=True)
class FitResult:
    codebook: CodebookVersion
    picture: Path | None
    seconds: float = 0.0
    nothing_to_do: bool = False

    def summary(self) -> str:
        return f"codebook version {self.codebook.number}, hash {self.codebook.hash[:12]}"


def run(
    config: Config,
    warehouse: Warehouse,
    registry: Registry,
    run_date: date,
    pictures: Path,
    champion: CodebookVersion | None = None,
    progress: Callable[[Iteration], None] | None = None,
    report: Callable[[str], None] = print,
) -> FitResult:
    """Fit a codebook on the newest `item_embeddings` and register it as candidate.

    The fit starts from the champion if there is one of the same shape, so that few IDs change. If a version of the same
    inputs (rows, settings, starting codebook) is registered, there is nothing to do. `progress` takes each
    iteration, `report` a line of text.

    Raises:
        SchemaError: there are no item embeddings.
        ConfigError: there are fewer items than components, or no such device, or not as many slots as workers.
        WorkersFailed: see `Workers.run`.
    """
    began = time.monotonic()
    fusion_text = warehouse.property(ITEM_EMBEDDINGS, FUSION)
    if fusion_text is None:
        raise SchemaError("item_embeddings does not exist in this warehouse; run `sid load` first")
    fusion = Fusion.from_json(fusion_text)
    version = warehouse.version(ITEM_EMBEDDINGS)
    items = warehouse.read(ITEM_EMBEDDINGS, version).count()
    if items < config.fit.components:
        raise ConfigError(
            f"item_embeddings has {items} items and fit.components is {config.fit.components}; expected at least as "
            f"many items as components. Load more items or lower it: --set fit.components={max(2, items // 10)}"
        )
    files = tuple(warehouse.files(ITEM_EMBEDDINGS, version))
    # By the names of the files, not the version: a commit that changes no row gives a new version too.
    rows_key = fingerprint([file.rpartition("/")[2] for file in files])[:16]
    start = champion if champion is not None and _can_start_from(champion, config.fit, fusion.dim) else None
    fit_key = f"{RECIPE}-{rows_key}-{config.digest('fit')}-{start.hash[:16] if start else 'free'}"
    known = registry.codebooks.newest(lambda version: version.fit_key == fit_key)
    if known is not None:
        codebook_files(registry, known)
        if registry.codebooks.alias(CANDIDATE) != known.number:
            registry.codebooks.set_alias(CANDIDATE, known.number)
        return FitResult(known, None, time.monotonic() - began, nothing_to_do=True)

    step = max(1, items // config.fit.sample) if config.fit.sample else 1
    mib = 4 * fusion.dim * items / step / config.fit.workers / 2**20
    data = EmbeddingFiles(files, fusion.dim, config.fit.batch_rows, step=step, in_memory=mib <= config.fit.memory_mib)
    checkpoint = Checkpoint(warehouse.root, fit_key)
    checkpoint.open()
    if start is not None:
        checkpoint.save_start(load_files(codebook_files(registry, start), start.hash).rqgmm)
    fitted = fit_table(config.fit, data, checkpoint, progress, report)

    table_versions = {ITEM_EMBEDDINGS.name: version}
    manifest: dict[str, Any] = {
        "levels": config.fit.levels,
        "components": config.fit.components,
        "dim": fusion.dim,
        "fusion": json.loads(fusion.to_json()),
        "fit": config.fit.model_dump(mode="json"),
        "items": items,
        "items_fitted_on": -(-items // step),
        "table_versions": table_versions,
        "started_from": start.hash if start else None,
        "run_date": str(run_date),
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "codebook"
        codebook_hash = save_codebook(folder, fitted.rqgmm, manifest)
        tags = codebook_tags(
            codebook_hash=codebook_hash,
            levels=config.fit.levels,
            components=config.fit.components,
            dim=fusion.dim,
            method=config.fit.method,
            fit_key=fit_key,
            started_from=start.hash if start else None,
            started_from_version=start.number if start else None,
            table_versions=table_versions,
            run_date=run_date,
        )
        picture = pictures / f"convergence-{codebook_hash[:12]}.png"
        draw_convergence(fitted.trace, picture)
        with registry.run("fit", config, tags) as mlflow_run:
            _log_trace(registry, mlflow_run.info.run_id, fitted)
            registry.client.log_artifact(mlflow_run.info.run_id, str(picture), "pictures")
            codebook = register_codebook(registry, folder, tags)
    registry.codebooks.set_alias(CANDIDATE, codebook.number)
    checkpoint.close()
    return FitResult(codebook, picture, time.monotonic() - began)


def _can_start_from(champion: CodebookVersion, config: FitConfig, dim: int) -> bool:
    """Whether the champion has the shape and the method that the settings ask for."""
    wanted = (config.levels, config.components, dim, config.method)
    return (champion.levels, champion.components, champion.dim, champion.method) == wanted


def fit_table(
    config: FitConfig,
    data: EmbeddingFiles,
    checkpoint: Checkpoint,
    progress: Callable[[Iteration], None] | None = None,
    report: Callable[[str], None] = print,
) -> RQGMMFit:
    """Fit in this process or on `config.workers`, from the last level that `checkpoint` has."""
    settings: dict[str, Any] = {
        "levels": config.levels,
        "components": config.components,
        "method": config.method,
        "seed": config.seed,
        "beam": config.beam,
    }
    if config.workers > 1:
        return fit_on_workers(config, data, checkpoint, settings, progress, report)
    return fit_rqgmm(
        data.rows(),
        init=checkpoint.start(),
        resume=checkpoint.latest(),
        device=local_device(config.device),
        on_iteration=progress,
        on_level=checkpoint.save,
        **settings,
    )


def _log_trace(registry: Registry, run_id: str, fitted: RQGMMFit) -> None:
    """Log every iteration of the fit as metrics of an MLflow run."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    metrics = [
        Metric(f"level{step.level}_{name}" if step.level else f"all_levels_{name}", float(value), now, step.iteration)
        for step in fitted.trace
        for name, value in asdict(step).items()
        if name not in ("level", "iteration") and value is not None
    ]
    for start in range(0, len(metrics), MLFLOW_METRICS):
        registry.client.log_batch(run_id, metrics=metrics[start : start + MLFLOW_METRICS])
