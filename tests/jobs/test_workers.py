"""A worker that loses another ends within a bounded time, and says that it was the other."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.workers import WorkerFiles

WORKER = """
import sys
from datetime import timedelta
import torch
import jobs.workers
from tokenizer.collectives import total
jobs.workers.LONGEST_WAIT = timedelta(seconds=float(sys.argv[3]))
files, lost_at = jobs.workers.WorkerFiles(sys.argv[1]), sys.argv[2]
with jobs.workers.worker(files) as (rank, world):
    assert total(torch.ones(3)).tolist() == [2.0] * 3
    print("ready", flush=True)
    if lost_at != "the end":
        while True:
            total(torch.ones(2**20))
    elif rank:
        sys.stdin.read()
"""


def start(rank: int, folder: Path, lost_at: str, wait: float, port: int) -> subprocess.Popen[str]:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(folder), lost_at, str(wait)],
        env={**os.environ, **address, "RANK": str(rank)},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lost_at", "how", "wait"),
    [
        ("the start", None, 3.0),
        ("a sum", signal.SIGKILL, 600.0),
        ("a sum", signal.SIGSTOP, 3.0),  # as where a machine is gone and its connections stay open
        ("the end", signal.SIGKILL, 600.0),
    ],
)
def test_who_loses_another_worker_ends_and_stores_no_error_of_its_own(
    tmp_path: Path, lost_at: str, how: signal.Signals | None, wait: float
) -> None:
    files = WorkerFiles(str(tmp_path / "files"))
    files.clear()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = range(1 if how is None else 2)
    processes = [start(rank, tmp_path / "files", lost_at, wait, port) for rank in ranks]
    try:
        if how is not None:
            for process in processes:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
            processes[1].send_signal(how)
        _, text = processes[0].communicate(timeout=90)
        assert processes[0].returncode == 1
        assert "LostWorker: another worker is gone" in text
        assert files.error() is None
    finally:
        for process in processes:
            process.kill()
            process.communicate()
