"""Work on several processes, which TorchDistributor starts on Spark's executors.

Workers tell the driver how far they are and why they failed by files in a folder beside the tables, which every worker
of a cluster can write.
"""

from __future__ import annotations

import json
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from pyarrow import fs

from jobs.config import ConfigError
from jobs.errors import SchemaError
from jobs.files.filesystem import filesystem_of, read_file, write_file
from jobs.spark.session import one_machine
from tokenizer import LostWorker
from tokenizer.collectives import lost_worker

RESTARTS = 2  # of work that lost a worker
REPLACE_SECONDS = 20  # before a restart on a cluster, which may have lost an executor and starts another
PROGRESS_SECONDS = 1.0  # between two looks at the progress of the workers
LONGEST_WAIT = timedelta(minutes=10)  # of a worker for the others; one that is killed is noticed at once
PROGRESS, ERROR = "progress.json", "error-"
OURS = {kind.__name__: kind for kind in (ConfigError, SchemaError)}  # what a user caused, in one sentence


class WorkersFailed(RuntimeError):
    """A worker failed (the message is its own), or workers were lost in every attempt."""


@dataclass(frozen=True)
class WorkerFiles:
    """Progress and errors of workers in the folder at `uri`."""

    uri: str

    def clear(self) -> None:
        """Create the folder, without what an earlier attempt left."""
        filesystem, folder = filesystem_of(self.uri)
        filesystem.create_dir(folder, recursive=True)
        for name in self._names():
            if name == PROGRESS or name.startswith(ERROR):
                filesystem.delete_file(f"{folder}/{name}")

    def save_progress(self, progress: Mapping[str, Any]) -> None:
        self._write(PROGRESS, progress)

    def progress(self) -> dict[str, Any] | None:
        filesystem, folder = filesystem_of(self.uri)
        content = read_file(filesystem, f"{folder}/{PROGRESS}")
        return None if content is None else json.loads(content)

    def save_error(self, rank: int, error: Exception) -> None:
        kind = next((name for name, ours in OURS.items() if isinstance(error, ours)), None)
        text = str(error) if kind else traceback.format_exc(limit=-3)
        self._write(f"{ERROR}{rank}.json", {"rank": rank, "kind": kind, "text": text})

    def error(self) -> dict[str, Any] | None:
        """That of the first worker that raised; workers that lost another worker store none."""
        filesystem, folder = filesystem_of(self.uri)
        names = sorted(name for name in self._names() if name.startswith(ERROR))
        content = read_file(filesystem, f"{folder}/{names[0]}") if names else None
        return None if content is None else json.loads(content)

    def _names(self) -> list[str]:
        filesystem, folder = filesystem_of(self.uri)
        return [entry.base_name for entry in filesystem.get_file_info(fs.FileSelector(folder))]

    def _write(self, name: str, values: Mapping[str, Any]) -> None:
        filesystem, folder = filesystem_of(self.uri)
        write_file(filesystem, f"{folder}/{name}", json.dumps(values).encode())


@dataclass(frozen=True)
class Workers:
    """`count` processes for one piece of work.

    Attributes:
        setting: That the number comes from, such as "fit.workers".
        work: What they do, such as "fit".
    """

    count: int
    setting: str
    work: str
    files: WorkerFiles

    def run(
        self,
        function: Callable[..., None],
        *arguments: Any,
        progress: Callable[[dict[str, Any]], None],
        lost: Callable[[], None],
    ) -> None:
        """Call `function(*arguments)` in each process, which calls `worker` first; results are left in files.

        If a worker is lost (its machine failed, or it ran out of memory), `lost` is called and all workers start again.
        A worker that raises ends the work.

        Raises:
            ConfigError: Spark has fewer slots than workers.
            ConfigError, SchemaError: a worker raised it.
            WorkersFailed: a worker raised something else, or workers were lost in 1 + RESTARTS attempts.
        """
        from py4j.protocol import Py4JJavaError
        from pyspark.ml.torch.distributor import TorchDistributor
        from pyspark.sql import SparkSession

        context = SparkSession.active().sparkContext
        if self.count > context.defaultParallelism:
            raise ConfigError(
                f"{self.setting} is {self.count} and Spark has {context.defaultParallelism} slots ({context.master}); "
                f"expected at most as many workers as slots. Lower {self.setting} or give Spark more cores"
            )
        local = one_machine(context.master or "")
        distributor = TorchDistributor(num_processes=self.count, local_mode=local, use_gpu=False)
        for attempts_left in reversed(range(1 + RESTARTS)):
            self.files.clear()
            try:
                with self._progress_to(progress):
                    distributor.run(function, *arguments)
                return
            except (RuntimeError, Py4JJavaError) as error:  # of processes beside this one, and of Spark's tasks
                failure = self.files.error()
                if failure is not None:
                    if failure["kind"] is not None:
                        raise OURS[failure["kind"]](failure["text"]) from error
                    text = f"worker {failure['rank']} of the {self.work} failed:\n{failure['text']}"
                    raise WorkersFailed(text) from error
                if not attempts_left:
                    raise WorkersFailed(
                        f"the {self.work} lost a worker {1 + RESTARTS} times; expected {self.count} that "
                        "last. Their logs may say why. The same command again goes on from what is finished; if memory "
                        f"ran out, set fewer {self.setting}"
                    ) from error
            lost()
            if not local:
                time.sleep(REPLACE_SECONDS)

    @contextmanager
    def _progress_to(self, progress: Callable[[dict[str, Any]], None]) -> Iterator[None]:
        """Pass the progress that a worker stores on to `progress` while the block runs."""
        finished = threading.Event()

        def poll() -> None:
            previous = None
            while not finished.wait(PROGRESS_SECONDS):
                step = self.files.progress()
                if step is not None and step != previous:
                    progress(step)
                    previous = step

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield
        finally:
            finished.set()
            thread.join()


@contextmanager
def worker(files: WorkerFiles) -> Iterator[tuple[int, int]]:
    """In a worker: the process group, for the block. Gives rank and number of processes, stores an exception."""
    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", world))))
        with lost_worker():
            dist.init_process_group("gloo", timeout=LONGEST_WAIT)
        yield rank, world
        with lost_worker():
            dist.barrier()
        dist.destroy_process_group()
    except LostWorker:
        raise  # the driver restarts all workers
    except Exception as error:
        files.save_error(rank, error)  # the exception of TorchDistributor does not carry the worker's text
        raise


def local_device(name: str = "auto") -> torch.device:
    """The device for `fit.device`; the workers on one machine divide its GPUs among them by local rank."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "fit.device is cuda and this machine has no usable GPU; expected one. Leave it at auto, or set cpu"
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
