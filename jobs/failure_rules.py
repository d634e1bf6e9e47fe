"""What each kind of exception means for the user: an exit code and a sentence.

Standard library only: the exceptions of Spark, Delta, MLflow, SQLAlchemy and Arrow are recognised by their names and
texts, so that `sid --help` imports none of these packages.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

WRONG_SETTINGS, GATE_DID_NOT_PASS, WRONG_DATA, UNUSABLE, INTERRUPTED = 2, 3, 4, 5, 130
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
    "WorkersFailed": UNUSABLE,
    "IntruderError": UNUSABLE,
}
SAFE = (
    "Every table is as its last commit left it: a commit is there whole or not at all, and readers follow the last "
    "release."
)
AGAIN = f"{SAFE} Then run the same command again."


@dataclass(frozen=True)
class Rule:
    """What to say about exceptions whose names, text and module match `pattern`.

    `sentence` may use {where}, {store}, {detail} and the groups of the pattern.
    """

    pattern: re.Pattern[str]
    sentence: str
    code: int = UNUSABLE


def rule(pattern: str, sentence: str, code: int = UNUSABLE) -> Rule:
    return Rule(re.compile(pattern, re.DOTALL | re.IGNORECASE), sentence, code)


# The first rule that matches counts, so causes (a full disk) come before their consequences (a failed write).
RULES = (
    rule(
        r"no space left on device|disk quota exceeded|database or disk is full|file too large|\berrno 28\b",
        f"there is no space left to write {{where}}. {SAFE} Free some space, then run the same command again.",
    ),
    rule(
        r"\bMemoryError\b|OutOfMemoryError|cannot allocate memory|can't allocate memory|GC overhead limit",
        f"memory ran out. {SAFE} Give Spark's Java more (--set spark.driver_memory=8g), let each step hold less "
        "(fit.memory_mib, fit.batch_rows, encode.rows_per_batch, fewer cores in spark.master), or take a larger "
        "machine.",
    ),
    rule(
        r"python worker exited unexpectedly|python worker failed to connect back|ExecutorLostFailure",
        f"a worker process of Spark died: it was killed, or memory ran out. {SAFE} Look for the reason in the system's "
        "log, then run the same command again, with fewer cores in spark.master if it was memory.",
    ),
    rule(
        r"Py4JNetworkError|answer from java side is empty|JAVA_GATEWAY_EXITED"
        r"|\b(?:ConnectionRefusedError|ConnectionResetError|BrokenPipeError|EOFError)\b"
        r".*\nraised in \S*(?:py4j|pyspark)",
        f"Spark's Java process is gone: it was killed, or it ended by itself (too little memory?). {SAFE} "
        "Look for the reason in the system's log, then run the same command again.",
    ),
    rule(
        r"database is locked",
        f"MLflow's store {{store}} is locked by another process. {SAFE} "
        "End what else uses it (an `mlflow ui`, a database browser, a backup), then run the same command again.",
    ),
    rule(
        r"file is not a database|database disk image is malformed|malformed database schema",
        f"MLflow's store {{store}} is damaged, so no codebook can be looked up. {SAFE} Put back a copy of it.",
    ),
    rule(
        r"unable to open database file|attempt to write a readonly database|disk i/o error",
        f"MLflow's store {{store}} cannot be opened for writing. {SAFE} Check that it is a file, that this user may "
        "write it and its folder, and that the disk is not mounted read-only.",
    ),
    rule(
        r"\b(?:sqlalchemy|alembic)\.|sqlite3\.\w*Error",
        f"MLflow's store {{store}} cannot be used: {{detail}}. {SAFE} If its tables are incomplete or of another "
        "MLflow, put back a copy of it, or run the version of MLflow that made it.",
    ),
    rule(
        r"\bmlflow\.exceptions\.|\b(?:requests|urllib3)\.exceptions\.|\nraised in mlflow",
        f"MLflow does not do what it was asked: {{detail}}. {SAFE} Check mlflow.tracking_uri (or MLFLOW_TRACKING_URI) "
        "and that the server and its artefact store can be reached, then run the same command again.",
    ),
    rule(
        r"DELTA_VERSION_NOT_FOUND|VersionNotFoundException|DELTA_TIMESTAMP_EARLIER|Invalid table version",
        f"a version of {{where}} that was asked for is gone from its log: {{detail}}. {SAFE} "
        "Go on from a newer release (`sid status`), or put back a copy of the table's folder.",
    ),
    rule(
        r"DELTA_CONCURRENT|ConcurrentAppend|ConcurrentModification|ConcurrentWrite|ConcurrentDelete|CommitFailedError"
        r"|DELTA_PROTOCOL_CHANGED|DELTA_METADATA_CHANGED",
        f"another writer changed {{where}} at the same time, so this write was not made. {SAFE} One command writes to "
        "a warehouse at a time: end the other one, then run the same command again.",
    ),
    rule(
        r"DELTA_VIOLATE_CONSTRAINT|DELTA_NOT_NULL_CONSTRAINT|DELTA_REPLACE_WHERE|InvariantViolation",
        f"rows break a rule of {{where}}, so none of them was written: {{detail}}. {SAFE} The table was written "
        "by another version of this software: use that version, or restore the table from a backup.",
        WRONG_DATA,
    ),
    rule(
        r"DELTA_MISSING_DELTA_TABLE|DELTA_TABLE_NOT_FOUND|DELTA_CREATE_TABLE_WITH_NON_EMPTY|DELTA_PATH_DOES_NOT_EXIST",
        f"the folder of {{where}} is there, but the log that makes it a table (_delta_log) is not. {SAFE} "
        "Put back a copy of the folder, or move it away to start the table again.",
    ),
    rule(
        r"_delta_log|DELTA_TRUNCATED|DELTA_VERSIONS_NOT_CONTIGUOUS|DELTA_STATE_RECOVER|DELTA_LOG"
        r"|No table metadata or protocol|kernel error|DELTA_CHECKPOINT|DELTA_MISSING_PART_FILES|Json error",
        f"the log of {{where}} is damaged: an entry is missing or cannot be read ({{detail}}). {SAFE} "
        "Put back a copy of the table's folder (all of it: log and data belong together).",
    ),
    rule(
        r"FAILED_READ_FILE\.FILE_NOT_EXIST|FileNotFoundError.*\.parquet|File \S+\.parquet does not exist",
        f"a file of {{where}} is missing, though the table's log names it: was it deleted by hand? {SAFE} "
        "Put back a copy of the file or of the whole folder.",
    ),
    rule(
        r"FAILED_READ_FILE|parquet magic bytes|not a parquet file|deserialize thrift|ParquetError"
        r"|CANNOT_READ_FILE_FOOTER"
        r"|pyarrow\.lib\.\w+.*\.parquet|Unexpected end of stream",
        f"{{where}} cannot be read: a file is damaged or no Parquet. {SAFE} Put back a copy of it.",
    ),
    rule(
        r"UNSUPPORTED_FILESYSTEM|No FileSystem for scheme|ClassNotFoundException: Class org\.apache\.hadoop\.fs",
        "Spark cannot reach {where}: the file system of this address needs a jar that it was not given ({detail}). "
        'Name its package under spark.conf: "spark.jars.packages" (infra/conf/cluster.toml has an example).',
    ),
    rule(
        r"PermissionError|permission denied|AccessControlException|AccessDenied|operation not permitted"
        r"|\b403 forbidden",
        f"this user may not read or write {{where}}. {SAFE} Change its owner or mode, or run as the user who owns the "
        "warehouse.",
    ),
    rule(
        r"read-only file system",
        f"{{where}} lies on a file system that is mounted read-only. {SAFE} Mount it for writing, or choose another "
        "--warehouse.",
    ),
    rule(
        r"IsADirectoryError|is a directory",
        "{where} is a folder; expected a file. Give the path of a file, or move the folder away.",
    ),
    rule(
        r"NotADirectoryError|not a directory|FileExistsError",
        "{where} is a file where a folder is needed. Move it away, or give another path.",
    ),
    rule(
        r"FileNotFoundError|PATH_NOT_FOUND|no such file or directory",
        f"{{where}} does not exist, though it is needed. {SAFE} Was it deleted or moved while the command ran?",
    ),
    rule(
        r"\b(?:ModuleNotFoundError|ImportError)\b: (?P<what>[^\n]*)",
        "a package of the environment is missing or does not fit: {what}. Run `make setup`, or install "
        "semantic-id-pipeline with its dependencies again.",
    ),
    rule(
        r"BrokenPipeError",
        f"whoever read the output of this command stopped reading it. {SAFE} Run it again without a pipe, or write "
        "facts by --json.",
    ),
    rule(
        r"\b(?:OSError|TimeoutError|ConnectionError|ConnectionRefusedError|ConnectionResetError|gaierror)\b",
        f"the system refused to read or write {{where}}: {{detail}}. {AGAIN}",
    ),
)
SPARK_RULE = rule(
    r"\b(?:pyspark|py4j)\.",
    f"Spark stopped: {{detail}}. {SAFE} If the settings under spark.* are right, this is a fault of the program: "
    "please report it.",
)
