"""One writing command per warehouse at a time."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime
from pathlib import Path

from jobs.errors import WarehouseError


@contextmanager
def writer_lock(root: str, command: str = "another command", run_date: date | None = None) -> Iterator[None]:
    """Hold the lock of a local warehouse, which only one process can. The system releases it when the process ends.

    The file names the process that holds the lock, for the error message of others. On local file systems Delta does
    not keep two processes from writing at once. Object stores with conditional writes do, so a warehouse with a URI has
    no lock.

    Raises:
        WarehouseError: another process holds the lock.
    """
    if "://" in root:
        yield
        return
    with open(Path(root) / ".writer.lock", "a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            raise WarehouseError(
                f"the warehouse is being written by {_holder(handle.read())}; one writer at a time. "
                "Wait for it, or choose another --warehouse"
            ) from None
        handle.truncate(0)
        since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        day = run_date.isoformat() if run_date else None
        handle.write(json.dumps({"command": command, "date": day, "since": since, "pid": os.getpid()}))
        handle.flush()
        yield


def _holder(text: str) -> str:
    """The process that holds the lock, in words."""
    try:
        facts = json.loads(text)
        day = f" for {facts['date']}" if facts["date"] else ""
        return f"{facts['command']}{day} (process {facts['pid']}, since {facts['since']})"
    except (ValueError, KeyError, TypeError):  # the file is empty or incomplete
        return "another command"
