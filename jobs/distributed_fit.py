"""The fit on several processes, which TorchDistributor starts on Spark's executors.

Each worker reads its share of the rows, and the statistics of all are summed over gloo; the codebook equals that of one
process. Driver and workers exchange levels, progress and errors through the checkpoint folder.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from jobs.config import ConfigError, FitConfig
from jobs.embeddings.batches import EmbeddingFiles
from jobs.models.checkpoint import Checkpoint
from jobs.spark.session import one_machine
from tokenizer import Iteration, LostWorker, RQGMMFit, fit_rqgmm

RESTARTS = 2  # of a fit that lost a worker
PROGRESS_SECONDS = 1.0  # between two looks at the progress of the workers


class FitFailed(RuntimeError):
    """A worker failed (the message is its own), or workers were lost in every attempt."""


def fit_on_workers(
    config: FitConfig,
    data: EmbeddingFiles,
    checkpoint: Checkpoint,
    settings: dict[str, Any],
    progress: Callable[[Iteration], None] | None,
    report: Callable[[str], None],
) -> RQGMMFit:
    """Fit on `config.workers` processes; `settings` are the keyword arguments of `fit_rqgmm`.

    A worker that is lost with its machine or for want of memory restarts the fit from the last finished level; a worker
    that raises ends it.

    Raises:
        ConfigError: Spark has fewer slots than workers.
        FitFailed: a worker raised, or workers were lost in 1 + RESTARTS attempts.
    """
    from pyspark.ml.torch.distributor import TorchDistributor
    from pyspark.sql import SparkSession

    context = SparkSession.active().sparkContext
    if config.workers > context.defaultParallelism:
        raise ConfigError(
            f"fit.workers is {config.workers} and Spark has {context.defaultParallelism} slots ({context.master}); "
            "expected at most as many workers as slots. Lower fit.workers or give Spark more cores"
        )
    local = one_machine(context.master or "")
    distributor = TorchDistributor(num_processes=config.workers, local_mode=local, use_gpu=False)
    for attempts_left in reversed(range(1 + RESTARTS)):
        try:
            with _forward_progress(checkpoint, progress):
                distributor.run(_fit_worker, asdict(data), settings, config.device, asdict(checkpoint))
            break
        except RuntimeError as error:
            failure = checkpoint.error()
            if failure is not None:
                rank, trace = failure
                raise FitFailed(f"worker {rank} of the fit failed:\n{trace}") from error
            if not attempts_left:
                raise FitFailed(
                    f"the fit lost a worker {1 + RESTARTS} times ({error}); expected {config.workers} that last. Their "
                    "logs may say why (memory?). Finished levels are kept: run again to go on, or with fewer --set "
                    "fit.workers"
                ) from error
        saved = checkpoint.latest()
        done = saved.rqgmm.n_levels if saved else 0
        resumed = f"from level {done + 1}" if done < config.levels else "with all levels together"
        report(f"a worker was lost; going on {resumed}")
    return checkpoint.result()


def fit_device(name: str) -> torch.device:
    """The device for `fit.device`; the workers on one machine divide its GPUs among them by local rank."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "fit.device is cuda and this machine has no usable GPU; expected one. Leave it at auto, or set cpu"
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


@contextmanager
def _forward_progress(checkpoint: Checkpoint, progress: Callable[[Iteration], None] | None) -> Iterator[None]:
    """Pass the progress that rank 0 stores in the checkpoint on to `progress` while the block runs."""
    finished = threading.Event()

    def poll() -> None:
        previous = None
        while not finished.wait(PROGRESS_SECONDS):
            step = checkpoint.progress()
            if progress is not None and step is not None and step != previous:
                progress(step)
                previous = step

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def _fit_worker(data: dict[str, Any], settings: dict[str, Any], device: str, checkpoint_of: dict[str, str]) -> None:
    """One process of the fit. Rank 0 stores levels, progress and result in the checkpoint, any rank its error."""
    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    checkpoint = Checkpoint(**checkpoint_of)
    saved_at = time.monotonic()

    def save_progress(step: Iteration) -> None:
        nonlocal saved_at
        if time.monotonic() - saved_at > PROGRESS_SECONDS:
            checkpoint.save_progress(step)
            saved_at = time.monotonic()

    try:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", world))))
        dist.init_process_group("gloo")
        share = EmbeddingFiles(**{**data, "files": tuple(data["files"]), "rank": rank, "world": world})
        callbacks: dict[str, Any] = {"on_iteration": save_progress, "on_level": checkpoint.save} if rank == 0 else {}
        fitted = fit_rqgmm(
            share.rows(),
            init=checkpoint.start(),
            resume=checkpoint.latest(),
            device=fit_device(device),
            **callbacks,
            **settings,
        )
        if rank == 0:
            checkpoint.save_result(fitted)
        dist.barrier()
        dist.destroy_process_group()
    except LostWorker:
        raise  # the driver restarts all workers
    except Exception:
        # The exception of TorchDistributor does not carry the worker's text.
        checkpoint.save_error(rank, traceback.format_exc(limit=-3))
        raise
