"""Reading and writing tables with Spark.

Reads and writes are checked against the declared schema. Every write is one Delta commit, so a kill leaves the table
either as it was before or as it is after the write.
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

# A release pins table versions, and someone may go back to it years later. VACUUM of Spark and of delta-rs reads these
# properties; its default of a week would remove files that older releases need.
RETENTION = {
    "delta.logRetentionDuration": "interval 3650 days",
    "delta.deletedFileRetentionDuration": "interval 3650 days",
}


@dataclass(frozen=True)
class Warehouse:
    """The tables under one root, read and written with one Spark session."""

    spark: SparkSession
    root: str

    @property
    def cores(self) -> int:
        """Number of tasks that run at the same time."""
        return int(self.spark.sparkContext.defaultParallelism)

    def path(self, table: Table) -> str:
        return f"{self.root}/{table.name}"

    def exists(self, table: Table) -> bool:
        from delta import DeltaTable

        return bool(DeltaTable.isDeltaTable(self.spark, self.path(table)))

    def create(self, table: Table) -> DeltaTable:
        """The table; an empty one is created if it does not exist."""
        from delta import DeltaTable

        if not self.exists(table):
            self._remove_incomplete(table)
            builder = (
                DeltaTable.createIfNotExists(self.spark)
                .tableName(self._identifier(table))
                .location(self.path(table))
                .addColumns(table.schema)
                # Both off, so that delta-rs can read the files, and DuckDB and polars through it.
                .property("delta.enableDeletionVectors", "false")
                .property("delta.columnMapping.mode", "none")
                .property("delta.enableChangeDataFeed", str(table.change_feed).lower())
            )
            for name, value in {**RETENTION, **table.properties}.items():
                builder = builder.property(name, value)
            for name, condition in table.checks.items():
                builder = builder.property(f"delta.constraints.{name}", condition)
            if table.partition_by:
                builder = builder.partitionedBy(*table.partition_by)
            builder.execute()
        return DeltaTable.forPath(self.spark, self.path(table))

    def _remove_incomplete(self, table: Table) -> None:
        """Remove the folder of a table whose creation was killed before its first log entry; Spark refuses it."""
        folder = Path(self.path(table))
        files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
        if "://" not in self.root and folder.is_dir() and next(files, None) is None:
            shutil.rmtree(folder)

    def _to_write(self, table: Table) -> DeltaTable:
        """The table to write to, with properties and optional columns that older tables lack.

        They are added only before a write, so a night without work adds no table version.
        """
        target = self.create(table)
        declared = {**RETENTION, **table.properties}
        with open_table(self.root, table) as log:
            properties = log.metadata().configuration if log is not None else declared
            columns = [] if log is None else [field.name for field in log.schema().fields]
        added = [field for field in table.schema if columns and field.nullable and field.name not in columns]
        if added:
            types = ", ".join(f"{field.name} {field.dataType.simpleString()}" for field in added)
            self.spark.sql(f"ALTER TABLE {self._identifier(table)} ADD COLUMNS ({types})")
            target = self.create(table)
        if not set(declared) <= set(properties):  # in one statement: Delta compares the two of RETENTION
            self._set_properties(table, {name: properties.get(name, value) for name, value in declared.items()})
        return target

    def version(self, table: Table) -> int:
        """The newest version of the table; -1 if it does not exist."""
        from delta import DeltaTable

        if not self.exists(table):
            return -1
        latest = DeltaTable.forPath(self.spark, self.path(table)).history(1).select("version").first()
        assert latest is not None
        return int(latest["version"])

    def read(self, table: Table, version: int | None = None) -> DataFrame:
        """The table at `version` (newest by default), with its schema checked.

        Raises:
            SchemaError: the table does not exist, or its columns are not the declared ones.
        """
        if not self.exists(table):
            raise SchemaError(
                f"table {table.name} does not exist in this warehouse; run the stage that writes it (see `sid status`)"
            )
        reader = self.spark.read.format("delta")
        if version is not None:
            reader = reader.option("versionAsOf", version)
        frame = reader.load(self.path(table))
        if len(frame.columns) < len(table.schema):  # written before an optional column was declared
            absent = [field for field in table.schema if field.nullable and field.name not in frame.columns]
            frame = frame.withColumns({field.name: F.lit(None).cast(field.dataType) for field in absent})
        check_columns(frame, table)
        return frame

    def files(self, table: Table, version: int) -> list[str]:
        """The Parquet files of a version as URIs, sorted. Every row in them counts, as deletion vectors are off."""
        return data_files(self.read(table, version))

    def merge(self, table: Table, rows: DataFrame) -> int:
        """Insert rows whose key is new and replace those whose key exists. Returns the new version."""
        target = self._to_write(table)
        check_columns(rows, table)
        on = " AND ".join(f"stored.{column} <=> new.{column}" for column in table.key)
        merge = target.alias("stored").merge(rows.alias("new"), on)
        merge.whenMatchedUpdateAll().whenNotMatchedInsertAll().execute()
        return self.version(table)

    def replace(self, table: Table, rows: DataFrame, where: str) -> int:
        """Replace the rows that satisfy `where` (all if empty) by `rows` in one commit. Returns the new version."""
        self._to_write(table)
        check_columns(rows, table)
        writer = rows.write.format("delta").mode("overwrite")
        if where:
            writer = writer.option("replaceWhere", where)
        elif self._columns(table) != table.schema.simpleString():  # an earlier layout; no row of it remains
            writer = writer.option("overwriteSchema", "true").partitionBy(*table.partition_by)
        writer.save(self.path(table))
        return self.version(table)

    def update(self, table: Table, rows: DataFrame, columns: Sequence[str]) -> int:
        """Set `columns` in the rows whose key is in `rows`, which has key and columns. Returns the new version."""
        target = self._to_write(table)
        on = " AND ".join(f"stored.{column} <=> new.{column}" for column in table.key)
        merge = target.alias("stored").merge(rows.alias("new"), on)
        merge.whenMatchedUpdate(set={column: f"new.{column}" for column in columns}).execute()
        return self.version(table)

    def _columns(self, table: Table) -> str:
        return self.spark.read.format("delta").load(self.path(table)).schema.simpleString()

    def append(self, table: Table, rows: DataFrame) -> int:
        """Append rows, whose keys must be new. Returns the new version."""
        self._to_write(table)
        check_columns(rows, table)
        rows.write.format("delta").mode("append").save(self.path(table))
        return self.version(table)

    def rows(self, table: Table, values: list[dict[str, Any]]) -> DataFrame:
        """A DataFrame of a few rows, given as values by column, with the table's schema."""
        return self.spark.createDataFrame(
            [tuple(value[name] for name in table.schema.names) for value in values], table.schema
        )

    def property(self, table: Table, name: str) -> str | None:
        """A `sid.*` property of the table, such as the fusion of its embeddings; None if it is not set."""
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
        """The table as SQL names it, by its path."""
        return "delta.`" + self.path(table).replace("`", "``") + "`"

    @contextmanager
    def staging(self, name: str) -> Iterator[str]:
        """The path of a folder in the staging area, which is removed at the end of the block."""
        folder = f"{self.root}/_staging/{name}"
        try:
            yield folder
        finally:
            path = self.spark._jvm.org.apache.hadoop.fs.Path(folder)  # type: ignore[union-attr]
            path.getFileSystem(self.spark._jsc.hadoopConfiguration()).delete(path, True)

    @contextmanager
    def staged(self, rows: DataFrame, name: str, like: Table | None = None) -> Iterator[DataFrame]:
        """`rows`, computed once and stored as Parquet for the block: MERGE reads its source twice, a count again.

        Written with the settings of the table that they are `like`.
        """
        with self.staging(name) as folder:
            rows.write.mode("overwrite").options(**(like.properties if like else {})).parquet(folder)
            # Without the option Spark reads brackets and stars in the path as a pattern.
            yield self.spark.read.schema(rows.schema).option("__globPaths__", "false").parquet(folder)


def data_files(frame: DataFrame) -> list[str]:
    """The files that a frame reads as URIs, sorted."""
    # Spark gives Hadoop paths, which are not percent-encoded.
    return sorted(quote(path, safe="/:") for path in frame.inputFiles())


def check_columns(frame: DataFrame, table: Table) -> None:
    """Check that names, order and types of `frame` are those of `table`; nullability may differ.

    Raises:
        SchemaError: they are not.
    """
    declared = [(f.name, f.dataType.simpleString()) for f in table.schema]
    present = [(f.name, f.dataType.simpleString()) for f in frame.schema]
    if declared != present:
        missing = [f"{name} {kind}" for name, kind in declared if (name, kind) not in present]
        surplus = [f"{name} {kind}" for name, kind in present if (name, kind) not in declared]
        raise SchemaError(
            f"columns of {table.name} differ from the declared ones; missing: {', '.join(missing) or 'none'}; "
            f"not expected: {', '.join(surplus) or 'none'} (order matters). The table was written by another version "
            "of this software: use that version, or restore the table from a backup"
        )


def clear_staging(root: str) -> None:
    """Remove the files of killed commands from the staging area of a local warehouse. Call with the lock held."""
    if "://" not in root:
        shutil.rmtree(Path(root) / "_staging", ignore_errors=True)
