"""From an exception that reaches the command line to a sentence and an exit code; the trace goes to a file.

The sentence says what happened, to which table or file, what is safe and what to do.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from jobs.exceptions import OUR_PACKAGES, ExceptionText, chain, detail, store_name, table_or_file
from jobs.failure_rules import EXIT_CODES, INTERRUPTED, RULES, SAFE, SPARK_RULE, UNUSABLE
from jobs.redaction import redact

LOGS = "_logs"


@dataclass(frozen=True)
class Failure:
    """The sentence for the user, the exit code, and whether the trace is worth keeping."""

    sentence: str
    code: int
    traced: bool = True


def failure(error: BaseException, root: str = "") -> Failure:
    """The failure for an exception that ended a command on the warehouse at `root` (absolute folder or URI)."""
    links = chain(error)
    if any(isinstance(link, KeyboardInterrupt) for link in links):
        return Failure(f"stopped by Ctrl-C. {SAFE} The same command again goes on.", INTERRUPTED, traced=False)
    own = [ExceptionText.of(link) for link in links]
    tasks = [task for error in own if (task := error.in_task()) is not None]
    exceptions = [*tasks, *own]  # the exception of a task says more than the one that Spark raises for it
    for candidate in exceptions:
        code = _own_exit_code(candidate)
        if code is not None and not candidate.carries_a_trace:
            return Failure(candidate.text.strip(), code, traced=candidate.task)
    for rule in RULES if tasks else (*RULES, SPARK_RULE):
        for candidate in exceptions:
            if match := rule.pattern.search(candidate.searchable):
                groups = {name: text or "" for name, text in match.groupdict().items()}
                where = table_or_file("\n".join(e.searchable for e in (candidate, *exceptions)), root)
                sentence = rule.sentence.format(where=where, store=store_name(root), detail=detail(candidate), **groups)
                return Failure(sentence, rule.code)
    name = exceptions[0].names[0].rsplit(".", 1)[-1]
    return Failure(
        f"this is a fault of the program ({name}: {detail(exceptions[0])}), not of yours. {SAFE} Please report it with "
        "the trace.",
        UNUSABLE,
    )


def _own_exit_code(error: ExceptionText) -> int | None:
    """The exit code of an exception class of this project, or of its nearest parent class that has one."""
    own = [name.rsplit(".", 1)[-1] for name in error.names if name.split(".")[0] in OUR_PACKAGES]
    return next((EXIT_CODES[name] for name in own if name in EXIT_CODES), None)


@contextmanager
def about(path: str) -> Iterator[None]:
    """Add `path` as a note to exceptions of the block that do not name it."""
    try:
        yield
    except Exception as error:
        if path not in str(error):
            error.add_note(f"at {path}")
        raise


@contextmanager
def on_warehouse(root: str, *, write: bool = True) -> Iterator[None]:
    """Record in exceptions of the block which warehouse they are about, and whether the command may write to it."""
    try:
        yield
    except BaseException as error:
        error.__dict__.setdefault("warehouse", (root, write))
        raise


def report(error: BaseException, command: str = "") -> int:
    """Print the sentence on standard error, store the trace, and return the exit code."""
    root, write = next(
        (link.__dict__["warehouse"] for link in chain(error) if "warehouse" in link.__dict__), ("", False)
    )
    result = failure(error, root)
    lines = [f"sid: {redact(result.sentence)}"]
    if result.traced:
        path = _store_trace(error, root if write else "", command)
        lines.append(f"The full trace is in {path}" if path else "The full trace could not be written anywhere")
    print("\n".join(lines), file=sys.stderr, flush=True)
    return result.code


# ---- logs of libraries ----

_log_lines: deque[str] = deque(maxlen=500)
_log_files: list[Path] = []
LOG_FILE_BYTES = 200_000  # of the end of a log file that go into the trace file


class _LogCollector(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _log_lines.append(self.format(record))


def keep_library_logs() -> None:
    """Collect the warnings of libraries for the trace file of a failure instead of printing them."""
    os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "false")  # without it MLflow adds handlers that print
    handler = _LogCollector(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)


def include_log_file(path: Path) -> None:
    """Append the end of this file, the log of Spark's Java process, to the trace file of a failure."""
    _log_files.append(path)


def _store_trace(error: BaseException, root: str, command: str) -> Path | None:
    """Write the trace to `_logs` in the warehouse, or else to the folder for temporary files; returns the file."""
    now = datetime.now(UTC)
    text = "\n".join(
        [
            f"{now:%Y-%m-%d %H:%M:%S} UTC, {command or 'sid'}, process {os.getpid()}, Python {sys.version.split()[0]}",
            "".join(traceback.format_exception(error)),
            *(["Logged by libraries before:", *_log_lines] if _log_lines else []),
            *(f"Logged by Spark's Java process ({path.name}):\n{log}" for path in _log_files if (log := _end_of(path))),
        ]
    )
    local = [Path(root) / LOGS] if root and "://" not in root and Path(root).is_dir() else []
    for folder in (*local, Path(tempfile.gettempdir())):
        path = folder / f"sid-{now:%Y%m%dT%H%M%S}-{os.getpid()}.log"
        try:
            folder.mkdir(exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "w", errors="backslashreplace") as file:
                file.write(redact(text))
        except OSError:
            continue
        return path
    return None


def _end_of(path: Path) -> str:
    """The last LOG_FILE_BYTES of a file; empty if it cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_FILE_BYTES))
            return file.read().decode(errors="replace").strip()
    except OSError:
        return ""
