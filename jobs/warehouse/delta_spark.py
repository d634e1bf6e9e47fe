"""Reading and writing of tables through Spark.

Reads and writes are checked against the declared schema. Every write is one Delta commit: a job that is killed
leaves the table as it was before or as it is after, never in between.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs.errors import SchemaError
from jobs.warehouse.delta_rs import open_table
from jobs.warehouse.tables import Table

if TYPE_CHECKING:
    from delta import DeltaTable

# A release pins versions of tables for as long as someone may go back to it. VACUUM, Spark's or delta-rs's, goes by these,
# and its default of a week would remove what a release older than that needs.
KEPT = {
    "delta.logRetentionDuration": "interval 3650 days",
    "delta.deletedFileRetentionDuration": "interval 3650 days",
}


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
        """The table; one that was made before KEPT or before an optional column was declared gets them, with the next write
        so that an idle night adds no version.
        """
        target = self.create(table)
        with open_table(self.root, table) as log:
            present = log.metadata().configuration if log is not None else KEPT
            columns = [] if log is None else [field.name for field in log.schema().fields]
        added = [field for field in table.schema if columns and field.nullable and field.name not in columns]
        if added:
            types = ", ".join(f"{field.name} {field.dataType.simpleString()}" for field in added)
            self.spark.sql(f"ALTER TABLE {self._identifier(table)} ADD COLUMNS ({types})")
            target = self.create(table)
        if not set(KEPT) <= set(present):
            self._set_properties(table, KEPT)  # in one statement: Delta checks one retention against the other
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
        if len(frame.columns) < len(table.schema):  # made before an optional column was declared: null in every row
            absent = [field for field in table.schema if field.nullable and field.name not in frame.columns]
            frame = frame.withColumns({field.name: F.lit(None).cast(field.dataType) for field in absent})
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
        elif self._columns(table) != table.schema.simpleString():  # an earlier layout, of which no row is left
            writer = writer.option("overwriteSchema", "true").partitionBy(*table.partition_by)
        writer.save(self.path(table))
        return self.version(table)

    def update(self, table: Table, rows: DataFrame, columns: Sequence[str]) -> int:
        """Set `columns` in the stored rows whose key is among `rows`, which have key and columns. Returns the version after."""
        target = self._to_write(table)
        on = " AND ".join(f"stored.{column} <=> new.{column}" for column in table.key)
        merge = target.alias("stored").merge(rows.alias("new"), on)
        merge.whenMatchedUpdate(set={column: f"new.{column}" for column in columns}).execute()
        return self.version(table)

    def _columns(self, table: Table) -> str:
        return self.spark.read.format("delta").load(self.path(table)).schema.simpleString()

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
        self._set_properties(table, {name: value})

    def _set_properties(self, table: Table, properties: Mapping[str, str]) -> None:
        quoted = {name: value.replace("\\", "\\\\").replace("'", "\\'") for name, value in properties.items()}
        pairs = ", ".join(f"'{name}' = '{value}'" for name, value in quoted.items())
        self.spark.sql(f"ALTER TABLE {self._identifier(table)} SET TBLPROPERTIES ({pairs})")

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


def clear_staging(root: str) -> None:
    """Remove what a killed command left in the staging area of a local warehouse. Call with the lock held."""
    if "://" not in root:
        shutil.rmtree(Path(root) / "_staging", ignore_errors=True)
