"""Files that others wrote, seen as one table: item vectors, interactions, lists of ids.

* A folder with `_delta_log` is a Delta table, and is read at its current version. Other folders are Parquet files
  (`listing.py` says which), of daily folders the newest (`partitions.py`), unified to one schema (`schemas.py`).
* Folders `key=value` are columns; a column that a file lacks is null there.
* A path is taken as it is written; no character in it is a pattern.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from jobs.config import ConfigError
from jobs.errors import SchemaError, first_line
from jobs.files.filesystem import filesystem_of, relative, uri_below
from jobs.files.listing import Listing, list_files
from jobs.files.parquet import RowGroup, open_source_file, row_groups_of, source_batches, source_footers
from jobs.files.partitions import Snapshots, check_keys, newest_snapshot, partition_array, partition_of, some
from jobs.files.schemas import unified_schema
from jobs.files.values import cast, plain_type
from jobs.fingerprint import fingerprint

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql.types import StructType

Format = Literal["auto", "parquet", "delta"]
ROWS_PER_BATCH = 4096


@dataclass(frozen=True)
class Source:
    """A Parquet file, the files of a folder, or a version of a Delta table, seen as one table of one schema.

    Attributes:
        location: path or URI.
        schema: of all files together, in plain types (`values.plain_type`).
        fingerprint: changes when a name, size or time of a file does, or the version of a Delta table.
        row_groups: those with rows, of Parquet; none of Delta.
        lacking: column -> URIs of the files that have rows but not this column.
        version: of a Delta table.
        note: which files are read and which are left out, where that is not all of them.
    """

    location: str
    format: Literal["parquet", "delta"]
    schema: pa.Schema
    fingerprint: str
    row_groups: tuple[RowGroup, ...] = field(default=(), repr=False)
    lacking: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    version: int | None = None
    note: str = ""

    @property
    def rows(self) -> int:
        """Rows of a Parquet source."""
        return sum(group.rows for group in self.row_groups)

    def reader(
        self, columns: Sequence[str], rows: int = ROWS_PER_BATCH, as_written: Sequence[str] = ()
    ) -> SourceReader:
        """Reads `columns` of single row groups of a Parquet source, at most `rows` rows at a time."""
        schema = pa.schema([self.schema.field(name) for name in columns])
        return SourceReader(filesystem_of(self.location)[1], schema, rows, frozenset(as_written))

    def batches(
        self, columns: Sequence[str], rows: int = ROWS_PER_BATCH, as_written: Sequence[str] = ()
    ) -> Iterator[pa.RecordBatch]:
        """`columns` of all rows of a Parquet source, as `reader` reads them."""
        reader = self.reader(columns, rows, as_written)
        for group in self.row_groups:
            yield from reader.batches(group.uri, group.index)

    def first_values(self, column: str, rows: int) -> pa.Array:
        """The first values of a column of a Parquet source that are not null, at most `rows`."""
        reader, without = self.reader([column]), set(self.lacking.get(column, ()))
        parts: list[pa.Array] = [pa.array([], self.schema.field(column).type)]
        for group in self.row_groups:
            if group.uri in without:
                continue
            for batch in reader.batches(group.uri, group.index):
                parts.append(batch.column(0).drop_null())
                if sum(map(len, parts)) >= rows:
                    return pa.concat_arrays(parts)[:rows]
        return pa.concat_arrays(parts)

    def frame(self, spark: SparkSession) -> DataFrame:
        """The rows of a Delta source, at its version."""
        return spark.read.format("delta").option("versionAsOf", self.version).load(self.location)


@dataclass(frozen=True)
class SourceReader:
    """Reads row groups of a Parquet source, without Spark and without the list of them: small enough to send to tasks.

    Attributes:
        root: path of the source on its file system.
        schema: the columns to read, with their types.
        rows: most rows of a batch.
        as_written: columns that keep the type of their file, such as ids, which a type common to all could round.
    """

    root: str
    schema: pa.Schema
    rows: int
    as_written: frozenset[str]

    def batches(self, uri: str, index: int) -> Iterator[pa.RecordBatch]:
        """The columns of a row group.

        Raises:
            SchemaError: the file cannot be read, or a value is not of the type of the column.
        """
        filesystem, path = filesystem_of(uri)
        file = open_source_file(filesystem, path)
        in_file = [name for name in self.schema.names if name in file.schema_arrow.names]
        in_path = dict(partition_of(relative(path, self.root)))
        for batch in source_batches(file, path, index, in_file, self.rows):
            arrays = []
            for name, kind in zip(self.schema.names, self.schema.types, strict=True):
                if name in in_path:
                    array = partition_array(in_path[name], kind, len(batch))
                elif name in in_file:
                    array = batch.column(batch.schema.get_field_index(name))
                    kind = plain_type(array.type) if name in self.as_written else kind
                    array = cast(array, kind, f"{name} of {path}")
                else:
                    array = pa.nulls(len(batch), kind)
                arrays.append(array)
            yield pa.RecordBatch.from_arrays(arrays, names=self.schema.names)


def open_source(location: str, format: Format = "auto", *, setting: str = "", snapshots: Snapshots = "all") -> Source:
    """The source at `location`, by its file names and footers; no row is read.

    Args:
        location: path or URI of a Parquet file, a folder of them, or a Delta table.
        format: what it must be.
        setting: the setting that says the format, for error messages.
        snapshots: newest reads, of folders such as dt=2026-01-31 (or 20260131, or year=2026/month=1/day=31), only those
            of the newest day, under each folder above it.

    Raises:
        ConfigError: nothing is there, or it is of another format.
        SchemaError: a file is not Parquet, or two files do not fit together.
    """
    listing = list_files(location)
    if format == "parquet" and listing.is_delta:
        raise ConfigError(
            f"{location} is a Delta table; its files read one by one would bring deleted rows back. "
            f"Set {setting or 'the format'} to delta or auto"
        )
    if format == "delta" and not listing.is_delta:
        raise ConfigError(
            f"{location} is not a Delta table; expected one, since {setting or 'the format'} is delta. Set it to auto"
        )
    return _delta_source(location) if listing.is_delta else _parquet_source(listing, snapshots)


def _parquet_source(listing: Listing, snapshots: Snapshots) -> Source:
    files, left_out = listing.parquet_files()
    names = {info.path: relative(info.path, listing.path) for info in files}
    partitions = {path: partition_of(name) for path, name in names.items()}
    check_keys(listing.location, partitions)
    chosen, note = newest_snapshot(partitions, snapshots)
    files = [info for info in files if info.path in chosen]
    if left_out:
        note = "; ".join(filter(None, [note, f"left out, not Parquet: {some(left_out)}"]))
    footers = source_footers(listing.filesystem, [info.path for info in files])
    uris = {names[info.path] or info.base_name: uri_below(listing.location, info.path) for info in files}
    by_name = dict(zip(uris, footers, strict=True))
    schema, lacking = unified_schema(by_name, {info.path: partitions[info.path] for info in files})
    return Source(
        listing.location,
        "parquet",
        schema,
        fingerprint([[names[info.path], info.size, info.mtime_ns] for info in files]),
        tuple(group for name, uri in uris.items() for group in row_groups_of(uri, by_name[name])),
        {column: tuple(uris[name] for name in lacking_files) for column, lacking_files in lacking.items()},
        note=note,
    )


def _delta_source(location: str) -> Source:
    import deltalake

    uri = location if re.match(r"[a-z][a-z0-9+.-]+://", location) and not os.path.exists(location) else None
    table_uri = uri.replace("s3a://", "s3://", 1) if uri else filesystem_of(location)[1]
    try:
        table = deltalake.DeltaTable(table_uri)
        schema = pa.schema(table.schema().to_arrow())
    except Exception as error:  # of many kinds: a damaged log, a protocol that delta-rs does not know
        raise SchemaError(
            f"the log of the Delta table {location} cannot be read ({first_line(error)}); expected a whole Delta table"
        ) from error
    plain = pa.schema([pa.field(f.name, plain_type(f.type)) for f in schema])
    state = fingerprint([table_uri, str(table.metadata().id), table.version()])
    return Source(table_uri if uri is None else location, "delta", plain, state, version=table.version())


# ---- with Spark ----


def map_rows(
    spark: SparkSession,
    source: Source,
    columns: Sequence[str],
    convert: Callable[[pa.RecordBatch], pa.RecordBatch],
    schema: StructType,
    *,
    rows: int = ROWS_PER_BATCH,
    as_written: Sequence[str] = (),
) -> DataFrame:
    """`convert` of every batch of `columns`, run in tasks; it returns exactly the Arrow types of `schema`.

    Of Parquet each task reads a row group itself; of Delta Spark reads the version that was opened.
    """
    if source.format == "delta":
        names = tuple(columns)

        def convert_plain(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for batch in batches:
                plain = [cast(column, plain_type(column.type), name) for name, column in zip(names, batch, strict=True)]
                yield convert(pa.RecordBatch.from_arrays(plain, names=list(names)))

        return source.frame(spark).select(*map(quoted, columns)).mapInArrow(convert_plain, schema)

    reader = source.reader(columns, rows, as_written)

    def read(groups: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for group in (row for batch in groups for row in batch.to_pylist()):
            for batch in reader.batches(group["uri"], group["index"]):
                yield convert(batch)

    tasks = len(source.row_groups)
    work = row_group_frame(spark, source, range(tasks))
    return work.repartitionById(max(1, tasks), "task").mapInArrow(read, schema)


def row_group_frame(spark: SparkSession, source: Source, task_of: Sequence[int | None]) -> DataFrame:
    """The row groups of a Parquet source that have a task, each with its number in the source and the task."""
    rows = [
        (group.uri, group.index, number, task)
        for number, (group, task) in enumerate(zip(source.row_groups, task_of, strict=True))
        if task is not None
    ]
    return spark.createDataFrame(rows, "uri STRING, index INT, row_group INT, task INT")


def quoted(column: str) -> Any:
    """The column of exactly this name, for Spark, which reads dots and backticks in names."""
    from pyspark.sql import functions as F

    return F.col("`" + column.replace("`", "``") + "`")
