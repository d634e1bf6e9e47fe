"""fit: `item_embeddings` at one version -> a codebook, registered as `candidate`.

Batches are read from the table's files by pyarrow; a process keeps its rows if they are few (`fit.memory_mib`) and else reads
them again in each pass, so that it never holds a large table.
One process by default; with `fit.workers` > 1 TorchDistributor starts that many on Spark's executors and each reads
its share of the files' rows.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from jobs.config import Config, ConfigError, FitConfig
from jobs.embeddings.batches import EmbeddingFiles
from jobs.embeddings.recipe import FUSION
from jobs.errors import SchemaError
from jobs.models.checkpoint import Checkpoint
from jobs.models.codebooks import codebook_files, load_files, register_codebook
from jobs.models.registry import CANDIDATE, Registry
from jobs.models.versions import CodebookVersion, codebook_tags
from jobs.pictures import draw_convergence
from jobs.spark.session import one_machine
from jobs.warehouse.delta_spark import Warehouse
from jobs.warehouse.tables import ITEM_EMBEDDINGS
from tokenizer import Fusion, Iteration, LostWorker, RQGMMFit, fit_rqgmm, save_codebook

Progress = Callable[[Iteration], None]
Tell = Callable[[str], None]
RECIPE = 1  # of a fit: the same inputs under another one are other work
RESTARTS = 2  # of a distributed fit that lost a worker


@dataclass(frozen=True)
class FitResult:
    model: CodebookVersion
    codebook_hash: str
    picture: Path | None
    seconds: float = 0.0
    nothing_to_do: bool = False

    def summary(self) -> str:
        return f"codebook version {self.model.number}, hash {self.codebook_hash[:12]}"


class FitFailed(RuntimeError):
    """A worker of a distributed fit failed (the message is its own), or workers were lost again and again."""


def run(
    config: Config, warehouse: Warehouse, registry: Registry, run_date: date, pictures: Path,
    champion: CodebookVersion | None = None, progress: Progress | None = None, tell: Tell = print,
) -> FitResult:  # fmt: skip
    """Fit on the newest `item_embeddings`, from the champion if there is one (stable IDs), and register a candidate.

    The work is named by its inputs: data version, settings and starting codebook. Where a version with that name is
    registered already there is nothing to do.
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
            f"item_embeddings has {items} items and fit.components is {config.fit.components}; expected at least as many items as "
            f"components. Load more items or lower it: --set fit.components={max(2, items // 10)}"
        )
    start = champion if champion is not None and _can_start_from(champion, config.fit, fusion.dim) else None
    fit_key = f"{RECIPE}-{version}-{config.digest('fit')}-{start.hash[:16] if start else 'free'}"
    done = registry.codebooks.newest(lambda version: version.fit_key == fit_key)
    if done is not None:
        codebook_files(registry, done)
        if registry.codebooks.alias(CANDIDATE) != done.number:
            registry.codebooks.set_alias(CANDIDATE, done.number)
        return FitResult(done, done.hash, None, time.monotonic() - began, nothing_to_do=True)

    files = tuple(warehouse.files(ITEM_EMBEDDINGS, version))
    step = max(1, items // config.fit.sample) if config.fit.sample else 1
    mib = 4 * fusion.dim * items / step / config.fit.workers / 2**20
    data = EmbeddingFiles(files, fusion.dim, config.fit.batch_rows, step=step, in_memory=mib <= config.fit.memory_mib)
    checkpoint = Checkpoint(warehouse.root, fit_key)
    checkpoint.open()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if start is not None:
            checkpoint.save_start(load_files(codebook_files(registry, start), start.hash).rqgmm)
        fitted = fit_table(config.fit, data, checkpoint, progress, tell)
        manifest: dict[str, Any] = {
            "levels": config.fit.levels,
            "components": config.fit.components,
            "dim": fusion.dim,
            "fusion": json.loads(fusion.to_json()),
            "fit": config.fit.model_dump(mode="json"),
            "items": items,
            "items_fitted_on": -(-items // step),
            "table_versions": {ITEM_EMBEDDINGS.name: version},
            "started_from": start.hash if start else None,
            "run_date": str(run_date),
        }
        codebook_hash = save_codebook(folder / "codebook", fitted.rqgmm, manifest)
        tags = codebook_tags(
            codebook_hash=codebook_hash,
            levels=config.fit.levels,
            components=config.fit.components,
            dim=fusion.dim,
            method=config.fit.method,
            fit_key=fit_key,
            started_from=start.hash if start else None,
            started_from_version=start.number if start else None,
            table_versions={ITEM_EMBEDDINGS.name: version},
            run_date=run_date,
        )
        picture = pictures / f"convergence-{codebook_hash[:12]}.png"
        draw_convergence(fitted.trace, picture)
        with registry.run("fit", config, tags) as run_:
            _log_trace(registry, run_.info.run_id, fitted)
            registry.client.log_artifact(run_.info.run_id, str(picture), "pictures")
            model = register_codebook(registry, folder / "codebook", tags)
        registry.codebooks.set_alias(CANDIDATE, model.number)
    checkpoint.close()
    return FitResult(model, codebook_hash, picture, time.monotonic() - began)


def _can_start_from(champion: CodebookVersion, config: FitConfig, dim: int) -> bool:
    """Whether the champion has the shape and the method that the settings ask for."""
    wanted = (config.levels, config.components, dim, config.method)
    return (champion.levels, champion.components, champion.dim, champion.method) == wanted


def fit_table(
    config: FitConfig, data: EmbeddingFiles, checkpoint: Checkpoint, progress: Progress | None = None, tell: Tell = print
) -> RQGMMFit:  # fmt: skip
    """Fit in this process, or on `config.workers` of TorchDistributor; either goes on from what `checkpoint` holds.

    A worker that is lost (its machine, its memory) restarts the fit from the last level; one that fails by itself ends it.

    Raises:
        FitFailed: a worker's own words, or that workers were lost again and again.
    """
    settings: dict[str, Any] = {
        "levels": config.levels, "components": config.components, "method": config.method, "seed": config.seed, "beam": config.beam,
    }  # fmt: skip
    if config.workers == 1:
        return fit_rqgmm(
            data.rows(), init=checkpoint.start(), resume=checkpoint.latest(), device=_device(config.device), on_iteration=progress,
            on_level=checkpoint.save, **settings,
        )  # fmt: skip
    from pyspark.ml.torch.distributor import TorchDistributor
    from pyspark.sql import SparkSession

    context = SparkSession.active().sparkContext
    if config.workers > context.defaultParallelism:
        raise ConfigError(
            f"fit.workers is {config.workers} and Spark has {context.defaultParallelism} slots ({context.master}); expected at most as "
            "many workers as slots. Lower fit.workers or give Spark more cores"
        )
    distributor = TorchDistributor(
        num_processes=config.workers, local_mode=one_machine(context.master or ""), use_gpu=False
    )
    for left in reversed(range(1 + RESTARTS)):
        try:
            with _followed(checkpoint, progress):
                distributor.run(_fit_worker, asdict(data), settings, config.device, asdict(checkpoint))
            break
        except RuntimeError as error:
            told = checkpoint.error()
            if told is not None:
                raise FitFailed(f"worker {told[0]} of the fit failed:\n{told[1]}") from error
            if not left:
                raise FitFailed(
                    f"the fit lost a worker {1 + RESTARTS} times ({error}); expected {config.workers} that last. Their logs may say why "
                    "(memory?). Levels that are done are kept: run again to go on, or with fewer --set fit.workers"
                ) from error
        saved = checkpoint.latest()
        done = saved.rqgmm.n_levels if saved else 0
        tell(
            f"a worker was lost; going on {f'from level {done + 1}' if done < config.levels else 'with all levels together'}"
        )
    return checkpoint.result()


def _device(wanted: str) -> torch.device:
    """The device of this process; the workers of a machine share its GPUs out by local rank."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "fit.device is cuda and this machine has no usable GPU; expected one. Leave it at auto, or say cpu"
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


@contextmanager
def _followed(checkpoint: Checkpoint, progress: Progress | None) -> Iterator[None]:
    """While workers fit, pass on to `progress` where they say they are."""
    done = threading.Event()

    def follow() -> None:
        last = None
        while not done.wait(1.0):
            step = checkpoint.progress()
            if progress is not None and step is not None and step != last:
                progress(step)
                last = step

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield
    finally:
        done.set()
        follower.join()


def _fit_worker(data: dict[str, Any], settings: dict[str, Any], device: str, place: dict[str, str]) -> None:
    """One process of a distributed fit. Rank 0 leaves levels and progress in the checkpoint, any rank its last words."""
    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    checkpoint = Checkpoint(**place)
    told = time.monotonic()

    def tell(step: Iteration) -> None:
        nonlocal told
        if time.monotonic() - told > 1:
            checkpoint.save_progress(step)
            told = time.monotonic()

    try:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", world))))
        dist.init_process_group("gloo")
        share = EmbeddingFiles(**{**data, "files": tuple(data["files"]), "rank": rank, "world": world})
        heard: dict[str, Any] = {"on_iteration": tell, "on_level": checkpoint.save} if rank == 0 else {}
        fitted = fit_rqgmm(
            share.rows(),
            init=checkpoint.start(),
            resume=checkpoint.latest(),
            device=_device(device),
            **heard,
            **settings,
        )
        if rank == 0:
            checkpoint.save_result(fitted)
        dist.barrier()
        dist.destroy_process_group()
    except LostWorker:
        raise  # the driver starts all anew
    except Exception:
        # TorchDistributor's own exception does not carry the worker's text.
        checkpoint.save_error(rank, traceback.format_exc(limit=-3))
        raise


def _log_trace(registry: Registry, run_id: str, fitted: RQGMMFit) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    metrics = [
        Metric(f"level{step.level}_{name}" if step.level else f"all_levels_{name}", float(value), now, step.iteration)
        for step in fitted.trace
        for name, value in asdict(step).items()
        if name not in ("level", "iteration") and value is not None
    ]
    for start in range(0, len(metrics), 1000):  # MLflow's limit for one request
        registry.client.log_batch(run_id, metrics=metrics[start : start + 1000])
