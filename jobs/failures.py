"""Every exception that reaches the command line becomes a sentence and an exit code; its trace goes to a file.

The sentence says what happened, to which table or file, what is safe and what to do. Standard library only: the
exceptions of Spark, Delta, MLflow, SQLAlchemy and Arrow are known by their names and texts, so that `sid --help`
imports none of them.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote, unquote

from jobs.redaction import redact

WRONG_SETTINGS, GATE_DID_NOT_PASS, WRONG_DATA, UNUSABLE, INTERRUPTED = 2, 3, 4, 5, 130
OURS = ("jobs", "tokenizer", "pipelines", "benchmarks")
# The exit codes of our own exceptions, by class name; a subclass has that of its parent.
EXIT_CODES = {
    "ConfigError": WRONG_SETTINGS,
    "GateFailed": GATE_DID_NOT_PASS,
    "SchemaError": WRONG_DATA,
    "TokenizerError": WRONG_DATA,
    "RegistryMismatch": WRONG_DATA,
    "PromotionConflict": WRONG_DATA,
    "NoWayBack": WRONG_DATA,
    "WarehouseError": UNUSABLE,
    "EnvironmentProblem": UNUSABLE,
    "FitFailed": UNUSABLE,
    "IntruderError": UNUSABLE,
}
SAFE = "Every table is as its last commit left it: a commit is there whole or not at all, and readers follow the last release."
AGAIN = f"{SAFE} Then run the same command again."
LOGS = "_logs"


@dataclass(frozen=True)
class Failure:
    """What a person reads, the exit code, and whether a trace would tell more."""

    sentence: str
    code: int
    traced: bool = True


@dataclass(frozen=True)
class _Rule:
    """Exceptions whose names, text and place match `pattern`. `says` may use {where}, {store}, {detail} and the pattern's groups."""

    pattern: re.Pattern[str]
    says: str
    code: int = UNUSABLE


def _rule(pattern: str, says: str, code: int = UNUSABLE) -> _Rule:
    return _Rule(re.compile(pattern, re.DOTALL | re.IGNORECASE), says, code)


# The first that matches counts, so causes (a full disk) stand before what they bring about (a failed write).
_RULES = (
    _rule(
        r"no space left on device|disk quota exceeded|database or disk is full|file too large|\berrno 28\b",
        f"there is no space left to write {{where}}. {SAFE} Free some space, then run the same command again.",
    ),
    _rule(
        r"\bMemoryError\b|OutOfMemoryError|cannot allocate memory|can't allocate memory|GC overhead limit",
        f"memory ran out. {SAFE} Give Spark's Java more (--set spark.driver_memory=8g), let each step hold less "
        "(fit.memory_mib, fit.batch_rows, encode.rows_per_batch, fewer cores in spark.master), or take a larger machine.",
    ),
    _rule(
        r"python worker exited unexpectedly|python worker failed to connect back|ExecutorLostFailure",
        f"a worker process of Spark died: it was killed, or memory ran out. {SAFE} Look for the reason in the system's log, "
        "then run the same command again, with fewer cores in spark.master if it was memory.",
    ),
    _rule(
        r"Py4JNetworkError|answer from java side is empty|JAVA_GATEWAY_EXITED"
        r"|\b(?:ConnectionRefusedError|ConnectionResetError|BrokenPipeError|EOFError)\b.*\nraised in \S*(?:py4j|pyspark)",
        f"Spark's Java process is gone: it was killed, or it ended by itself (too little memory?). {SAFE} "
        "Look for the reason in the system's log, then run the same command again.",
    ),
    _rule(
        r"database is locked",
        f"MLflow's store {{store}} is locked by another process. {SAFE} "
        "End what else uses it (an `mlflow ui`, a database browser, a backup), then run the same command again.",
    ),
    _rule(
        r"file is not a database|database disk image is malformed|malformed database schema",
        f"MLflow's store {{store}} is damaged, so no codebook can be looked up. {SAFE} Put back a copy of it.",
    ),
    _rule(
        r"unable to open database file|attempt to write a readonly database|disk i/o error",
        f"MLflow's store {{store}} cannot be opened for writing. {SAFE} Check that it is a file, that this user may write it and "
        "its folder, and that the disk is not mounted read-only.",
    ),
    _rule(
        r"\b(?:sqlalchemy|alembic)\.|sqlite3\.\w*Error",
        f"MLflow's store {{store}} cannot be used: {{detail}}. {SAFE} If its tables are incomplete or of another MLflow, put back a copy "
        "of it, or run the version of MLflow that made it.",
    ),
    _rule(
        r"\bmlflow\.exceptions\.|\b(?:requests|urllib3)\.exceptions\.|\nraised in mlflow",
        f"MLflow does not do what it was asked: {{detail}}. {SAFE} Check mlflow.tracking_uri (or MLFLOW_TRACKING_URI) and that the server "
        "and its artefact store can be reached, then run the same command again.",
    ),
    _rule(
        r"DELTA_VERSION_NOT_FOUND|VersionNotFoundException|DELTA_TIMESTAMP_EARLIER|Invalid table version",
        f"a version of {{where}} that was asked for is gone from its log: {{detail}}. {SAFE} "
        "Go on from a newer release (`sid status`), or put back a copy of the table's folder.",
    ),
    _rule(
        r"DELTA_CONCURRENT|ConcurrentAppend|ConcurrentModification|ConcurrentWrite|ConcurrentDelete|CommitFailedError"
        r"|DELTA_PROTOCOL_CHANGED|DELTA_METADATA_CHANGED",
        f"another writer changed {{where}} at the same time, so this write was not made. {SAFE} One command writes to a warehouse at a "
        "time: end the other one, then run the same command again.",
    ),
    _rule(
        r"DELTA_VIOLATE_CONSTRAINT|DELTA_NOT_NULL_CONSTRAINT|DELTA_REPLACE_WHERE|InvariantViolation",
        f"rows break a rule of {{where}}, so none of them was written: {{detail}}. {SAFE} Was the table written by another version?",
        WRONG_DATA,
    ),
    _rule(
        r"DELTA_MISSING_DELTA_TABLE|DELTA_TABLE_NOT_FOUND|DELTA_CREATE_TABLE_WITH_NON_EMPTY|DELTA_PATH_DOES_NOT_EXIST",
        f"the folder of {{where}} is there, but the log that makes it a table (_delta_log) is not. {SAFE} "
        "Put back a copy of the folder, or move it away to begin the table anew.",
    ),
    _rule(
        r"_delta_log|DELTA_TRUNCATED|DELTA_VERSIONS_NOT_CONTIGUOUS|DELTA_STATE_RECOVER|DELTA_LOG"
        r"|No table metadata or protocol|kernel error|DELTA_CHECKPOINT|DELTA_MISSING_PART_FILES|Json error",
        f"the log of {{where}} is damaged: an entry is missing or cannot be read ({{detail}}). {SAFE} "
        "Put back a copy of the table's folder (all of it: log and data belong together).",
    ),
    _rule(
        r"FAILED_READ_FILE\.FILE_NOT_EXIST|FileNotFoundError.*\.parquet|File \S+\.parquet does not exist",
        f"a file of {{where}} is missing, though the table's log names it: was it deleted by hand? {SAFE} "
        "Put back a copy of the file or of the whole folder.",
    ),
    _rule(
        r"FAILED_READ_FILE|parquet magic bytes|not a parquet file|deserialize thrift|ParquetError|CANNOT_READ_FILE_FOOTER"
        r"|pyarrow\.lib\.\w+.*\.parquet|Unexpected end of stream",
        f"{{where}} cannot be read: a file is damaged or no Parquet. {SAFE} Put back a copy of it.",
    ),
    _rule(
        r"UNSUPPORTED_FILESYSTEM|No FileSystem for scheme|ClassNotFoundException: Class org\.apache\.hadoop\.fs",
        "Spark cannot reach {where}: the file system of this address needs a jar that it was not given ({detail}). "
        'Name its package under spark.conf: "spark.jars.packages" (infra/conf/cluster.toml has an example).',
    ),
    _rule(
        r"PermissionError|permission denied|AccessControlException|AccessDenied|operation not permitted|\b403 forbidden",
        f"this user may not read or write {{where}}. {SAFE} Change its owner or mode, or run as the user who owns the warehouse.",
    ),
    _rule(
        r"read-only file system",
        f"{{where}} lies on a file system that is mounted read-only. {SAFE} Mount it for writing, or choose another --warehouse.",
    ),
    _rule(
        r"IsADirectoryError|is a directory",
        "{where} is a folder; expected a file. Give the path of a file, or move the folder away.",
    ),
    _rule(
        r"NotADirectoryError|not a directory|FileExistsError",
        "{where} is a file where a folder is needed. Move it away, or give another path.",
    ),
    _rule(
        r"FileNotFoundError|PATH_NOT_FOUND|no such file or directory",
        f"{{where}} does not exist, though it is needed. {SAFE} Was it deleted or moved while the command ran?",
    ),
    _rule(
        r"\b(?:ModuleNotFoundError|ImportError)\b: (?P<what>[^\n]*)",
        "a package of the environment is missing or does not fit: {what}. Run `make setup`, or install semantic-id-pipeline "
        "with its dependencies again.",
    ),
    _rule(
        r"BrokenPipeError",
        f"whoever read the output of this command stopped reading it. {SAFE} Run it again without a pipe, or write facts by --json.",
    ),
    _rule(
        r"\b(?:OSError|TimeoutError|ConnectionError|ConnectionRefusedError|ConnectionResetError|gaierror)\b",
        f"the system refused to read or write {{where}}: {{detail}}. {AGAIN}",
    ),
)
_SPARK = _rule(
    r"\b(?:pyspark|py4j)\.",
    f"Spark stopped: {{detail}}. {SAFE} If the settings under spark.* are right, this is a fault of the program: please report it.",
)


def failure(error: BaseException, root: str = "") -> Failure:
    """What to say about an exception that ended a command on the warehouse at `root` (absolute folder or URI)."""
    links = _chain(error)
    if any(isinstance(link, KeyboardInterrupt) for link in links):
        return Failure(f"stopped by Ctrl-C. {SAFE} The same command again goes on.", INTERRUPTED, traced=False)
    live = [_Seen.of(link) for link in links]
    tasks = [task for link in live if (task := link.in_task()) is not None]
    seen = [*tasks, *live]  # what happened in a task says more than what Spark makes of it
    for candidate in seen:
        code = candidate.own_code
        if code is not None and not candidate.carries_a_trace:
            return Failure(candidate.text.strip(), code, traced=candidate.task)
    for rule in _RULES if tasks else (*_RULES, _SPARK):
        for candidate in seen:
            if match := rule.pattern.search(candidate.haystack):
                groups = {name: text or "" for name, text in match.groupdict().items()}
                where = _where("\n".join(s.haystack for s in (candidate, *seen)), root)
                says = rule.says.format(where=where, store=_store(root), detail=_detail(candidate), **groups)
                return Failure(says, rule.code)
    name = seen[0].names[0].rsplit(".", 1)[-1]
    return Failure(
        f"this is a fault of the program ({name}: {_detail(seen[0])}), not of yours. {SAFE} Please report it with the trace.",
        UNUSABLE,
    )


@contextmanager
def about(path: str) -> Iterator[None]:
    """Exceptions of the block that do not name a file themselves carry `path` as a note."""
    try:
        yield
    except Exception as error:
        if path not in str(error):
            error.add_note(f"at {path}")
        raise


@contextmanager
def on_warehouse(root: str, *, write: bool = True) -> Iterator[None]:
    """Exceptions of the block remember which warehouse they are about, and whether its folder may take their trace."""
    try:
        yield
    except BaseException as error:
        error.__dict__.setdefault("warehouse", (root, write))
        raise


def report(error: BaseException, command: str = "") -> int:
    """Print what happened on standard error, keep the trace, and return the exit code."""
    root, write = next(
        (link.__dict__["warehouse"] for link in _chain(error) if "warehouse" in link.__dict__), ("", False)
    )
    told = failure(error, root)
    lines = [f"sid: {redact(told.sentence)}"]
    if told.traced:
        path = _keep_trace(error, root if write else "", command)
        lines.append(f"The full trace is in {path}" if path else "The full trace could not be written anywhere")
    print("\n".join(lines), file=sys.stderr, flush=True)
    return told.code


# ---- what libraries log ----

_logged: deque[str] = deque(maxlen=500)


class _Kept(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _logged.append(self.format(record))


def keep_library_logs() -> None:
    """What libraries log of their trouble goes into the file of a failure's trace, not on the screen beside our sentence."""
    os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "false")  # else it gives its loggers handlers of their own
    handler = _Kept(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)


def _keep_trace(error: BaseException, root: str, command: str) -> Path | None:
    """Write the trace below the warehouse, or else to the folder of temporary files."""
    now = datetime.now(UTC)
    text = "\n".join(
        [
            f"{now:%Y-%m-%d %H:%M:%S} UTC, {command or 'sid'}, process {os.getpid()}, Python {sys.version.split()[0]}",
            "".join(traceback.format_exception(error)),
            *(["What libraries logged before:", *_logged] if _logged else []),
        ]
    )
    local = [Path(root) / LOGS] if root and "://" not in root and Path(root).is_dir() else []
    for folder in (*local, Path(tempfile.gettempdir())):
        path = folder / f"sid-{now:%Y%m%dT%H%M%S}-{os.getpid()}.log"
        try:
            folder.mkdir(exist_ok=True)
            with open(
                os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", errors="backslashreplace"
            ) as file:
                file.write(redact(text))
        except OSError:
            continue
        return path
    return None


# ---- how an exception is read ----

# The last line of Python's trace, which may go on over several, in what Spark or a worker of the fit hands on.
_TRACE = re.compile(
    r"Traceback \(most recent call last\):\n(?:[ \t]+[^\n]*\n)+(?P<name>[A-Za-z_][\w.]*)(?:: (?P<text>.*?))?"
    r"(?=\s*\n\s*SQLSTATE|\s*\n\s+at |\n\nThe above exception|\n\nDuring handling|\s*\Z)",
    re.DOTALL,
)
_JAVA_FRAME = re.compile(r"\n\s+(?:at |\.\.\. \d+ more|\d+: )[^\n]*")


@dataclass(frozen=True)
class _Seen:
    """An exception as names and text: a live one, or one that a task of Spark or a worker of the fit ended with."""

    names: tuple[str, ...]  # of its class and the parents of that, qualified
    text: str
    raised_in: str = ""  # module of the frame that raised it
    task: bool = False

    @staticmethod
    def of(error: BaseException) -> _Seen:
        names = tuple(f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__[:-2])
        frames = list(traceback.walk_tb(error.__traceback__))
        where = str(frames[-1][0].f_globals.get("__name__", "")) if frames else ""
        file = getattr(error, "filename", None)
        notes = [*getattr(error, "__notes__", ()), *([f"at {file}"] if isinstance(file, str) else [])]
        return _Seen(names or ("BaseException",), "\n".join([str(error), *notes]), where)

    def in_task(self) -> _Seen | None:
        found = list(_TRACE.finditer(self.text))
        if not found:
            return None
        name, text = found[-1]["name"], found[-1]["text"] or ""
        return _Seen(_parents(name), text.strip(), "", task=True)

    @property
    def carries_a_trace(self) -> bool:
        return not self.task and "Traceback (most recent call last)" in self.text

    @property
    def own_code(self) -> int | None:
        """The exit code, if the exception is ours."""
        own = [name.rsplit(".", 1)[-1] for name in self.names if name.split(".")[0] in OURS]
        return next((EXIT_CODES[name] for name in own if name in EXIT_CODES), None)

    @property
    def haystack(self) -> str:
        return f"{' '.join(self.names)}: {self.text}\nraised in {self.raised_in}"


def _parents(name: str) -> tuple[str, ...]:
    """The qualified names of a class of ours and its parents; of others only the name itself."""
    module, _, kind = name.rpartition(".")
    loaded = sys.modules.get(module)
    if loaded is None and module.split(".")[0] in OURS:
        import importlib

        loaded = importlib.import_module(module)
    found = getattr(loaded, kind, None)
    if not isinstance(found, type):
        return (name,)
    return tuple(f"{parent.__module__}.{parent.__qualname__}" for parent in found.__mro__)


def _chain(error: BaseException) -> list[BaseException]:
    """The exception, what caused it, what it came on top of."""
    links: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in links:
        links.append(following)
        following = following.__cause__ or (None if following.__suppress_context__ else following.__context__)
    return links


def _detail(seen: _Seen) -> str:
    """The first line that says something, without Java's class names and Spark's advice."""
    text = _JAVA_FRAME.sub("", seen.text).removeprefix("An error occurred while calling").strip()
    text = re.sub(r"^\S+\.\n:\s*", "", text)
    text = re.sub(r"^(?:[\w$]+\.)+[\w$]*(?:Exception|Error): ", "", text)
    text = re.sub(r"\(Background on this error at: \S+\)|\s*SQLSTATE: \w+", "", text)
    first = next((line.strip() for line in text.splitlines() if line.strip()), "") or seen.names[0]
    return (first if len(first) <= 200 else f"{first[:200]} ...").rstrip(".")


def _store(root: str) -> str:
    """Where MLflow keeps its data, as a person calls it."""
    own = Path(root, "mlflow.db")
    return str(own) if root and "://" not in root and own.exists() else "(mlflow.tracking_uri)"


def _where(text: str, root: str) -> str:
    """The table or file that an exception is about, as a person calls it."""
    text = text.replace("\\/", "/")
    if root:
        for form in dict.fromkeys((root, quote(root, safe="/:"))):
            match = re.search(re.escape(form) + r"/(?P<name>[^/\s:'\"`,)]+)(?P<rest>(?:/[^\s:'\"`,)]+)*)", text)
            if match:
                name, rest = unquote(match["name"]), unquote(match["rest"]).strip("/").rstrip(".")
                is_table = not name.startswith((".", "_")) and (
                    "_delta_log" in text or "parquet" in text or "DELTA_" in text or not rest
                )
                if is_table and "." not in name:
                    return f"table {name}" + (f" (file {rest})" if rest else "") + f" in {root}"
                return f"{root}/{name}" + (f"/{rest}" if rest else "")
    match = re.search(
        r"""\n?at (?P<note>/[^\n]+)|['"](?P<quoted>/[^'"\n]+)['"]|(?:file:/*|(?<=\s))(?P<bare>/[^\s:'",)]+)""", text
    )
    if match:
        return match["note"] or match["quoted"] or f"/{match['bare'].lstrip('/')}"
    return f"the warehouse {root}" if root else "the file"
