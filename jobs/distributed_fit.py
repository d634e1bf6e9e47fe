"""The fit on several processes, which TorchDistributor starts on Spark's executors.

Each worker reads its share of the rows, and the statistics of all are summed over gloo; the codebook equals that of one
process. Driver and workers exchange levels through the checkpoint folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from jobs.config import FitConfig
from jobs.embeddings.batches import EmbeddingFiles
from jobs.models.checkpoint import Checkpoint
from jobs.workers import PROGRESS_SECONDS, WorkerFiles, Workers, local_device, worker
from tokenizer import Iteration, RQGMMFit, fit_rqgmm


def fit_on_workers(
    config: FitConfig,
    data: EmbeddingFiles,
    checkpoint: Checkpoint,
    settings: dict[str, Any],
    progress: Callable[[Iteration], None] | None,
    report: Callable[[str], None],
) -> RQGMMFit:
    """Fit on `config.workers` processes; `settings` are the keyword arguments of `fit_rqgmm`.

    A lost worker restarts the fit from the last finished level.

    Raises:
        ConfigError, WorkersFailed: see `Workers.run`.
    """

    def lost() -> None:
        saved = checkpoint.latest()
        done = saved.rqgmm.n_levels if saved else 0
        resumed = f"from level {done + 1}" if done < config.levels else "with all levels together"
        report(f"a worker was lost; going on {resumed}")

    def forward(step: dict[str, Any]) -> None:
        if progress is not None:
            progress(Iteration(**step))

    workers = Workers(config.workers, "fit.workers", "fit", WorkerFiles(checkpoint.folder))
    workers.run(_fit_worker, data, settings, config.device, checkpoint, progress=forward, lost=lost)
    return checkpoint.result()


def _fit_worker(data: EmbeddingFiles, settings: dict[str, Any], device: str, checkpoint: Checkpoint) -> None:
    """One process of the fit. Rank 0 stores levels, progress and result in the checkpoint."""
    files = WorkerFiles(checkpoint.folder)
    saved_at = time.monotonic()

    def save_progress(step: Iteration) -> None:
        nonlocal saved_at
        if time.monotonic() - saved_at > PROGRESS_SECONDS:
            files.save_progress(asdict(step))
            saved_at = time.monotonic()

    with worker(files) as (rank, world):
        callbacks: dict[str, Any] = {"on_iteration": save_progress, "on_level": checkpoint.save} if rank == 0 else {}
        fitted = fit_rqgmm(
            replace(data, rank=rank, world=world).rows(),
            init=checkpoint.start(),
            resume=checkpoint.latest(),
            device=local_device(device),
            **callbacks,
            **settings,
        )
        if rank == 0:
            checkpoint.save_result(fitted)
