"""Every Delta table of the warehouse: name, key, columns, partitions, checks; and the only code that reads or writes one.

Reads and writes are checked against the schema declared here. Every write is one Delta commit, so a killed job
leaves the table as it was before or as it should be after, never between.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import types as T

from jobs.config import ConfigError
from jobs.failures import about

if TYPE_CHECKING:
    import deltalake
    from delta import DeltaTable


class SchemaError(ValueError):
    """A table or an input does not have the columns it must have."""


class WarehouseError(RuntimeError):
    """The warehouse cannot be used: not writable, or in use by another command."""


@dataclass(frozen=True)
class Table:
    """A declared table. `key` identifies a row; `checks` are Delta CHECK constraints by name."""

    name: str
    key: tuple[str, ...]
    schema: T.StructType
    partition_by: tuple[str, ...] = ()
    checks: Mapping[str, str] = field(default_factory=dict)
    change_feed: bool = False


STRING, BINARY, INT, LONG, FLOAT, BOOLEAN, DATE = (
    T.StringType(), T.BinaryType(), T.IntegerType(), T.LongType(), T.FloatType(), T.BooleanType(), T.DateType(),
)  # fmt: skip
VERSIONS = T.MapType(STRING, LONG)
HASH_DIGITS = 32  # of a text that Delta keeps as the least and the greatest of a file


def _columns(optional: tuple[str, ...] = (), /, **types: T.DataType) -> T.StructType:
    return T.StructType([T.StructField(name, kind, name in optional) for name, kind in types.items()])


ITEM_EMBEDDINGS = Table(
    "item_embeddings",
    ("item_id",),
    _columns(
        item_id=STRING,
        embedding=BINARY,
        dim=INT,
        modalities=T.ArrayType(STRING),
        content_hash=STRING,
        first_seen=DATE,
        run_date=DATE,
    ),
    checks={"packed": "octet_length(embedding) IN (4 * dim, 2 * dim)"},
    change_feed=True,
)
REJECTED_EMBEDDINGS = Table(
    "rejected_embeddings",
    ("run_date", "item_id", "occurrence"),
    _columns(("item_id",), item_id=STRING, occurrence=INT, reason=STRING, detail=STRING, excerpt=STRING, run_date=DATE),
    partition_by=("run_date",),
)
SEMANTIC_IDS = Table(
    "semantic_ids",
    ("codebook_version", "item_id"),
    _columns(
        codebook_version=INT, item_id=STRING, codes=T.ArrayType(INT), suffix=INT, semantic_id=STRING, confidence=FLOAT,
        log_likelihood=FLOAT, codebook_hash=STRING, content_hash=STRING, held=BOOLEAN, run_date=DATE,
    ),
    partition_by=("codebook_version",),
    checks={"suffix_counts_from_zero": "suffix >= 0", "confidence_is_a_probability": "confidence BETWEEN 0 AND 1"},
    change_feed=True,
)  # fmt: skip
# Nullable, as Delta cannot hold a column inside an array to NOT NULL.
UNCERTAIN_ITEM = (
    T.StructType()
    .add("item_id", STRING)
    .add("semantic_id", STRING)
    .add("confidence", FLOAT)
    .add("log_likelihood", FLOAT)
)
QUALITY_REPORTS = Table(
    "quality_reports",
    ("codebook_version", "run_id"),
    _columns(
        ("judged_against",),
        codebook_version=INT, run_id=STRING, codebook_hash=STRING, metrics=T.MapType(STRING, T.DoubleType()), passed=BOOLEAN,
        reasons=T.ArrayType(STRING), least_certain=T.ArrayType(UNCERTAIN_ITEM), judged_against=INT, table_versions=VERSIONS,
        run_date=DATE,
    ),
)  # fmt: skip
RELEASES = Table(
    "releases",
    ("release_id",),
    _columns(
        ("previous",),
        release_id=LONG, codebook_version=INT, codebook_hash=STRING, table_versions=VERSIONS, previous=LONG, status=STRING,
        at=T.TimestampType(),
    ),
)  # fmt: skip
CTR_EXAMPLES = Table(
    "ctr_examples",
    ("user_id", "item_id", "ts"),
    _columns(
        user_id=STRING,
        item_id=STRING,
        label=INT,
        ts=LONG,
        history=T.ArrayType(STRING),
        features=T.ArrayType(FLOAT),
        split=STRING,
    ),
    partition_by=("split",),
)
TABLES = (ITEM_EMBEDDINGS, REJECTED_EMBEDDINGS, SEMANTIC_IDS, QUALITY_REPORTS, RELEASES, CTR_EXAMPLES)


# A release pins versions of tables for as long as someone may go back to it. VACUUM, Spark's or delta-rs's, goes by these,
# and its default of a week would remove what a release older than that needs.
KEPT = {"delta.deletedFileRetentionDuration": "interval 3650 days", "delta.logRetentionDuration": "interval 3650 days"}


@dataclass(frozen=True)
class Warehouse:
    """The tables under one root, seen through one Spark session."""

    spark: SparkSession
    root: str

    @property
    def cores(self) -> int:
        """Tasks that run at once."""
        return int(self.spark.sparkContext.defaultParallelism)

    def path(self, table: Table) -> str:
        return f"{self.root}/{table.name}"

    def exists(self, table: Table) -> bool:
        from delta import DeltaTable

        return bool(DeltaTable.isDeltaTable(self.spark, self.path(table)))

    def create(self, table: Table) -> DeltaTable:
        """The table, created empty where it is absent."""
        from delta import DeltaTable

        if not self.exists(table):
            self._clear_half_made(table)
            builder = (
                DeltaTable.createIfNotExists(self.spark)
                .tableName(self._identifier(table))
                .location(self.path(table))
                .addColumns(table.schema)
                # Without these two, delta-rs (and DuckDB and polars through it) can read the files.
                .property("delta.enableDeletionVectors", "false")
                .property("delta.columnMapping.mode", "none")
                .property("delta.enableChangeDataFeed", str(table.change_feed).lower())
            )
            for name, value in KEPT.items():
                builder = builder.property(name, value)
            for name, condition in table.checks.items():
                builder = builder.property(f"delta.constraints.{name}", condition)
            if table.partition_by:
                builder = builder.partitionedBy(*table.partition_by)
            builder.execute()
        return DeltaTable.forPath(self.spark, self.path(table))

    def _clear_half_made(self, table: Table) -> None:
        """A kill before the first entry of the log leaves a folder in which Spark neither finds nor makes a table."""
        folder = Path(self.path(table))
        files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
        if "://" not in self.root and folder.is_dir() and next(files, None) is None:
            shutil.rmtree(folder)

    def _to_write(self, table: Table) -> DeltaTable:
        """The table; one that was made before KEPT gets it, with the next write so that an idle night adds no version."""
        target = self.create(table)
        with _without_spark(self.root, table) as log:
            present = log.metadata().configuration if log is not None else KEPT
        for name, value in KEPT.items():
            if name not in present:
                self.set_property(table, name, value)
        return target

    def version(self, table: Table) -> int:
        """The newest version of the table; -1 where it does not exist."""
        from delta import DeltaTable

        if not self.exists(table):
            return -1
        latest = DeltaTable.forPath(self.spark, self.path(table)).history(1).select("version").first()
        assert latest is not None
        return int(latest["version"])

    def read(self, table: Table, version: int | None = None) -> DataFrame:
        """The table at `version` (newest by default), its schema checked.

        Raises:
            SchemaError: the table is absent, or its columns are not the declared ones.
        """
        if not self.exists(table):
            raise SchemaError(
                f"table {table.name} does not exist in this warehouse; run the stage that writes it (see `sid status`)"
            )
        reader = self.spark.read.format("delta")
        if version is not None:
            reader = reader.option("versionAsOf", version)
        frame = reader.load(self.path(table))
        check_columns(frame, table)
        return frame

    def files(self, table: Table, version: int) -> list[str]:
        """Parquet files that make up a version, in a fixed order; whole files, since deletion vectors are off."""
        # Spark gives Hadoop paths, which are not encoded as those who read URIs expect.
        return sorted(quote(path, safe="/:") for path in self.read(table, version).inputFiles())

    def merge(self, table: Table, rows: DataFrame, *, update: bool) -> int:
        """Insert rows whose key is new; with `update`, also replace rows whose key exists. Returns the version after."""
        target = self._to_write(table)
        check_columns(rows, table)
        on = " AND ".join(f"stored.{column} <=> new.{column}" for column in table.key)
        merge = target.alias("stored").merge(rows.alias("new"), on)
        if update:
            merge = merge.whenMatchedUpdateAll()
        merge.whenNotMatchedInsertAll().execute()
        return self.version(table)

    def replace(self, table: Table, rows: DataFrame, where: str) -> int:
        """Replace the rows that satisfy `where` (all, if empty) by `rows` in one commit. Returns the version after."""
        self._to_write(table)
        check_columns(rows, table)
        writer = rows.write.format("delta").mode("overwrite")
        if where:
            writer = writer.option("replaceWhere", where)
        writer.save(self.path(table))
        return self.version(table)

    def append(self, table: Table, rows: DataFrame) -> int:
        self._to_write(table)
        check_columns(rows, table)
        rows.write.format("delta").mode("append").save(self.path(table))
        return self.version(table)

    def rows(self, table: Table, values: list[dict[str, Any]]) -> DataFrame:
        """A frame of a few rows with the table's schema."""
        return self.spark.createDataFrame(
            [tuple(value[name] for name in table.schema.names) for value in values], table.schema
        )

    def property(self, table: Table, name: str) -> str | None:
        """A `sid.*` property of the table, such as the recipe its embeddings were fused with."""
        if not self.exists(table):
            return None
        detail = self.create(table).detail().select("properties").first()
        assert detail is not None
        value = detail["properties"].get(name)
        return None if value is None else str(value)

    def set_property(self, table: Table, name: str, value: str) -> None:
        quoted = value.replace("\\", "\\\\").replace("'", "\\'")
        self.spark.sql(f"ALTER TABLE {self._identifier(table)} SET TBLPROPERTIES ('{name}' = '{quoted}')")

    def _identifier(self, table: Table) -> str:
        """The table in SQL, which knows it by its path."""
        return "delta.`" + self.path(table).replace("`", "``") + "`"

    @contextmanager
    def staging(self, name: str) -> Iterator[str]:
        """A folder for the duration."""
        folder = f"{self.root}/_staging/{name}"
        try:
            yield folder
        finally:
            path = self.spark._jvm.org.apache.hadoop.fs.Path(folder)  # type: ignore[union-attr]
            path.getFileSystem(self.spark._jsc.hadoopConfiguration()).delete(path, True)

    @contextmanager
    def staged(self, rows: DataFrame, name: str) -> Iterator[DataFrame]:
        """`rows` computed once and kept as Parquet for the duration: MERGE reads its source twice, counts read it again."""
        with self.staging(name) as folder:
            rows.write.mode("overwrite").parquet(folder)
            # Without the option Spark takes brackets, stars and the like in the path for a pattern.
            yield self.spark.read.schema(rows.schema).option("__globPaths__", "false").parquet(folder)


def rows_of(root: str, table: Table) -> list[dict[str, Any]]:
    """Every row of a table of few rows, read by delta-rs: Spark takes seconds for it, and many to start. No rows where it is absent.

    Raises:
        SchemaError: its columns are not the declared ones.
    """
    with _without_spark(root, table) as log:
        if log is None:
            return []
        found = log.to_pyarrow_table()
    if found.schema.names != table.schema.names:
        raise SchemaError(
            f"columns of {table.name} are {found.schema.names}; expected {table.schema.names}. Was the table written by another version?"
        )
    rows: list[dict[str, Any]] = found.to_pylist(maps_as_pydicts="strict")
    return rows


def extent(root: str, table: Table) -> tuple[int, int] | None:
    """Rows and version of a table, from its log; None where it is absent."""
    with _without_spark(root, table) as log:
        return None if log is None else (log.count(), log.version())


def files_of(root: str, table: Table, version: int, codebook_version: int) -> set[str] | None:
    """The data files of a version by its log, of `semantic_ids` those of one codebook version; None where its log is gone."""
    from deltalake.exceptions import DeltaError

    part = f"/codebook_version={codebook_version}/" if table is SEMANTIC_IDS else ""
    with _without_spark(root, table) as log:
        try:
            if log is not None:
                log.load_as_version(version)
        except DeltaError:
            return None
        return None if log is None else {file for file in log.file_uris() if part in file}


def id_hashes(root: str) -> dict[int, set[str]]:
    """By codebook version the first HASH_DIGITS digits of the hashes that its rows of `semantic_ids` carry.

    From the statistics in the table's log; the rows of a version are read only where a file has none.
    """
    found: dict[int, set[str]] = {}
    with _without_spark(root, SEMANTIC_IDS) as log:
        if log is None:
            return found
        for file in pa.table(log.get_add_actions(flatten=True)).to_pylist():
            version = int(file["partition.codebook_version"])
            ends = [file.get(f"{end}.codebook_hash") for end in ("min", "max")]
            if None in ends:
                own = pc.field("codebook_version") == version
                read = log.to_pyarrow_dataset().to_table(columns=["codebook_hash"], filter=own)
                ends = pc.unique(read["codebook_hash"]).to_pylist()
            found.setdefault(version, set()).update(end[:HASH_DIGITS] for end in ends)
    return found


@contextmanager
def _without_spark(root: str, table: Table) -> Iterator[deltalake.DeltaTable | None]:
    """The table as delta-rs sees it, None where it is absent."""
    import deltalake
    from deltalake.exceptions import TableNotFoundError

    with ExitStack() as until_read:
        until_read.enter_context(about(f"{root}/{table.name}"))
        location = f"{root}/{table.name}"
        if "://" not in root and re.search(r"%[0-9a-fA-F]{2}|\\", root) and Path(location).is_dir():
            # delta-rs takes `%20` in a path for a space: it reads the table through links from a folder without it.
            location = until_read.enter_context(TemporaryDirectory())
            for entry in Path(root, table.name).iterdir():
                Path(location, entry.name).symlink_to(entry)
        try:
            found = deltalake.DeltaTable(location)
        except TableNotFoundError:
            found = None
        yield found


def check_columns(frame: DataFrame, table: Table) -> None:
    """Names, order and types of `frame` are those of `table` (a column may be less nullable than declared)."""
    wanted = [(f.name, f.dataType.simpleString()) for f in table.schema]
    present = [(f.name, f.dataType.simpleString()) for f in frame.schema]
    if wanted != present:
        missing = [f"{name} {kind}" for name, kind in wanted if (name, kind) not in present]
        surplus = [f"{name} {kind}" for name, kind in present if (name, kind) not in wanted]
        raise SchemaError(
            f"columns of {table.name} differ from the declared ones; missing: {', '.join(missing) or 'none'}; "
            f"not expected: {', '.join(surplus) or 'none'} (order matters). Was the table written by another version?"
        )


def warehouse_root(location: str, *, write: bool = True) -> str:
    """Absolute folder or URI of the warehouse; a local folder is created if it is to be written.

    Raises:
        ConfigError: a local folder that is not there and is only to be read, or another host's.
        WarehouseError: a local folder that cannot be written.
    """
    if re.match(r"file:/", location, re.IGNORECASE):
        parts = urlsplit(location, allow_fragments=False)
        if parts.netloc not in ("", "localhost"):
            raise ConfigError(
                f"warehouse {location} names the host {parts.netloc}; expected a folder of this machine: file:///path, or the path alone"
            )
        location = unquote(location.split(":", 1)[1].removeprefix(f"//{parts.netloc}"))
    elif "://" in location:
        return location.rstrip("/")
    try:
        folder = Path(location).expanduser().resolve()
    except (RuntimeError, OSError) as error:  # ~nobody, or links in a circle
        raise ConfigError(f"warehouse {location} is no folder ({error}); expected the path of one") from error
    if not write:
        if not folder.is_dir():
            found = "is a file" if folder.exists() else "does not exist"
            raise ConfigError(
                f"warehouse {location} {found}; expected the folder that `sid nightly` or `sid load` wrote. Check --warehouse"
            )
        return str(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise WarehouseError(
            f"warehouse {location} cannot be written ({error.strerror}); expected a folder this user may create files in. "
            "Choose another with --warehouse DIR"
        ) from error
    return str(folder)


@contextmanager
def writer_lock(root: str, command: str = "another command", run_date: date | None = None) -> Iterator[None]:
    """One writing command per local warehouse; the system frees the lock when its holder dies, however it dies.

    The file names the holder for whoever comes second. Local file systems give Delta no mutual exclusion between
    processes. Object stores with conditional writes do, so a warehouse with a URI takes no lock.
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
    except (ValueError, KeyError, TypeError):  # it was killed, or is only now, writing this
        return "another command"


def clear_staging(root: str) -> None:
    """Remove what a killed command left in the staging area of a local warehouse. Call with the lock held."""
    if "://" not in root:
        shutil.rmtree(Path(root) / "_staging", ignore_errors=True)
