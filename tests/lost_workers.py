"""Workers of TorchDistributor that a test starts, found by a mark in their environment, and killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

MARK = "SID_TEST"


def mark_workers(monkeypatch: pytest.MonkeyPatch, spark: SparkSession, folder: Path) -> None:
    """Processes that this one and tasks of Spark start carry the folder in their environment."""
    monkeypatch.setenv(MARK, str(folder))
    monkeypatch.setitem(spark.sparkContext.environment, MARK, str(folder))


def kill_worker_when(reached: Callable[[], bool], folder: Path) -> None:
    """In a thread: kill -9 the worker of rank 1 that carries `folder`, once."""

    def kill() -> None:
        while not reached():
            time.sleep(0.01)
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environment = (process / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:  # it has gone, or is not ours
                continue
            is_worker = any(text.startswith("LOCAL_RANK=") for text in environment)  # not what starts it
            if is_worker and f"{MARK}={folder}" in environment and "RANK=1" in environment:
                os.kill(int(process.name), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
