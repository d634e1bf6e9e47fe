"""Files that others wrote: where they are, which of them count, what they hold together, and a name for their state.

The one reader of item vectors, interactions and lists of ids. What Spark, pandas and pyarrow users expect holds here:

* Names that begin with `_` or `.` are not data (`_temporary`, `_SUCCESS`, `.ipynb_checkpoints`, `._part-0.parquet`),
  except folders such as `_day=1`. Nor are files without Parquet inside, unless their name says so: the note names them.
* A folder with `_delta_log` is a Delta table, and is read at its current version. Iceberg and Hudi tables, and files that
  belong to a Delta table, are refused: read one by one they would bring deleted rows back.
* Folders `key=value` are columns, as Hive, Spark and pyarrow write them.
* Files with different schemas are unified: numbers widen, numbers and text become text, a column that a file lacks is
  null there. Files without rows and columns without values decide nothing.
* A path is taken as it is written; no character in it is a pattern.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote
from uuid import UUID

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from jobs.config import ConfigError
from jobs.errors import SchemaError
from jobs.fingerprint import fingerprint

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql.types import StructType

Format = Literal["auto", "parquet", "delta"]
Partition = tuple[tuple[str, str | None], ...]  # (key, value) from the outermost folder inwards; None is Hive's null

PARQUET_SUFFIXES = (".parquet", ".parq", ".pq")
FOOTERS_AT_ONCE = 16  # waiting for an object store costs no core
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
NAMED = 3  # files that a sentence lists


@dataclass(frozen=True)
class RowGroup:
    """Row group `index` of the file at `path` (on the file system of the source), and its number of rows."""

    path: str
    index: int
    rows: int


@dataclass(frozen=True)
class Source:
    """A Parquet file, the files of a folder, or a version of a Delta table, seen as one table of one schema."""

    location: str
    format: Literal["parquet", "delta"]
    schema: pa.Schema
    fingerprint: str  # changes when a name, size or time of a file does, or the version
    row_groups: tuple[RowGroup, ...] = field(default=(), repr=False)  # empty for Delta
    lacking: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict, repr=False
    )  # column -> paths of files without it
    version: int | None = None  # of a Delta table
    note: str = ""  # what was taken and what was left out, where that is not everything

    @property
    def rows(self) -> int:
        """Rows of a Parquet source."""
        return sum(group.rows for group in self.row_groups)


def open_source(
    location: str, format: Format = "auto", *, setting: str = "", snapshots: Literal["newest", "all"] = "all"
) -> Source:
    """Look at what is at `location` and read the footers, no rows. `setting` is the setting that says the format.

    With `snapshots` newest, of folders such as dt=2026-01-31 (or 20260131, or year=2026/month=1/day=31) only those of the
    newest day are read, under each folder above it.

    Raises:
        ConfigError: nothing is there, or it is of another format.
        SchemaError: a file is not Parquet, or two files do not fit together.
    """
    filesystem, path = filesystem_of(location)
    try:
        found = filesystem.get_file_info(path)
        if found.type == fs.FileType.NotFound:
            raise ConfigError(f"{location} does not exist; expected a Parquet file, a folder of them or a Delta table")
        if found.type == fs.FileType.Unknown:
            raise ConfigError(f"{location} is neither a file nor a folder; expected Parquet or a Delta table")
        inside: list[fs.FileInfo] = []
        if found.type == fs.FileType.Directory:
            if isinstance(filesystem, fs.LocalFileSystem):
                _check_links(path)
            inside = sorted(filesystem.get_file_info(fs.FileSelector(path, recursive=True)), key=lambda info: info.path)
    except (OSError, pa.ArrowInvalid) as error:
        raise ConfigError(f"{location} cannot be read ({_short(error)}); expected a path or URI of Parquet") from error
    except UnicodeError as error:
        raise ConfigError(
            f"{location!a} is, or holds, a name that is not UTF-8 ({_short(error)}); expected UTF-8. Rename it"
        ) from error
    delta = any(_relative(info.path, path) == "_delta_log" for info in inside)
    if format == "parquet" and delta:
        raise ConfigError(
            f"{location} is a Delta table; its files read one by one would bring deleted rows back. "
            f"Set {setting or 'the format'} to delta or auto"
        )
    if format == "delta" and not delta:
        raise ConfigError(
            f"{location} is not a Delta table; expected one, since {setting or 'the format'} is delta. Set it to auto"
        )
    if delta:
        return _open_delta(location)
    _refuse_other_tables(filesystem, location, path, inside)
    if found.type == fs.FileType.Directory:
        files, left_out = _data_files(filesystem, path, inside)
    else:
        files, left_out = [found], []
    if not files:
        raise ConfigError(
            f"{location} holds no Parquet file; expected at least one (names that begin with _ or . do not count)"
        )
    partitions = {info.path: _partition(_relative(info.path, path)) for info in files}
    _check_partitions(location, partitions)
    taken, note = _snapshot(partitions, snapshots)
    files = [info for info in files if info.path in taken]
    if left_out:
        note = "; ".join(filter(None, [note, f"left out, not Parquet: {_some(left_out)}"]))
    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
        footers = list(pool.map(lambda info: _footer(filesystem, info.path), files))
    named = [
        (_relative(info.path, path) or info.base_name, footer) for info, footer in zip(files, footers, strict=True)
    ]
    schema, lacking = _unified_schema(named, {info.path: partitions[info.path] for info in files})
    paths = {name: info.path for (name, _), info in zip(named, files, strict=True)}
    state = [[_relative(info.path, path), info.size, info.mtime_ns] for info in files]
    groups = tuple(
        RowGroup(info.path, index, footer.row_group(index).num_rows)
        for info, footer in zip(files, footers, strict=True)
        for index in range(footer.num_row_groups)
        if footer.row_group(index).num_rows
    )
    without = {column: tuple(paths[name] for name in names) for column, names in lacking.items()}
    return Source(location, "parquet", schema, fingerprint(state), groups, without, note=note)


def read_row_group(
    location: str, schema: pa.Schema, path: str, index: int, columns: Sequence[str], rows: int,
    as_written: Sequence[str] = (),
) -> Iterator[pa.RecordBatch]:  # fmt: skip
    """`columns` of a row group of the source at `location`, at most `rows` at a time, as `schema` has them.

    Columns `as_written` keep the type of their file (ids, that a common type could round). Needs no Spark: for tasks.
    """
    filesystem, root = filesystem_of(location)
    file = _open(filesystem, path)
    there = [name for name in columns if name in file.schema_arrow.names]
    keys = dict(_partition(_relative(path, root)))
    for batch in _row_batches(file, path, index, there, rows):
        arrays = []
        for name in columns:
            kind = schema.field(name).type
            if name in keys:
                array = _partition_array(keys[name], kind, len(batch))
            elif name in there:
                array = batch.column(batch.schema.get_field_index(name))
                array = _cast(array, plain_type(array.type) if name in as_written else kind, f"{name} of {path}")
            else:
                array = pa.nulls(len(batch), kind)
            arrays.append(array)
        yield pa.RecordBatch.from_arrays(arrays, names=list(columns))


def map_rows(
    spark: SparkSession, source: Source, columns: Sequence[str],
    convert: Callable[[pa.RecordBatch], pa.RecordBatch], schema: StructType, *,
    rows: int = 4096, as_written: Sequence[str] = (),
) -> DataFrame:  # fmt: skip
    """`convert` of every batch of `columns`, run in tasks; it returns exactly the Arrow types of `schema`.

    Of Parquet each task reads a row group itself; of Delta Spark reads the version that was opened.
    """
    from pyspark.sql import functions as F

    wanted = tuple(columns)
    if source.format == "delta":
        frame = spark.read.format("delta").option("versionAsOf", source.version).load(source.location)

        def converted(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for batch in batches:
                plain = [
                    _cast(column, plain_type(column.type), name) for name, column in zip(wanted, batch, strict=True)
                ]
                yield convert(pa.RecordBatch.from_arrays(plain, names=list(wanted)))

        return frame.select(*map(quoted, columns)).mapInArrow(converted, schema)

    location, common, kept = source.location, source.schema, tuple(as_written)

    def read(groups: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for group in (row for batch in groups for row in batch.to_pylist()):
            for batch in read_row_group(location, common, group["path"], group["index"], wanted, rows, kept):
                yield convert(batch)

    places = [(group.path, group.index, number) for number, group in enumerate(source.row_groups)]
    work = spark.createDataFrame(places, "path STRING, index INT, task INT")
    return work.repartitionById(max(1, len(places)), F.col("task")).mapInArrow(read, schema)


def quoted(column: str) -> Any:
    """The column of exactly this name, for Spark, which reads dots and backticks in names."""
    from pyspark.sql import functions as F

    return F.col("`" + column.replace("`", "``") + "`")


# ---- ids ----


def is_id_type(kind: pa.DataType) -> bool:
    """Can a column of this type hold ids: text, whole numbers, floats that are whole (pandas makes them where one is missing)."""
    kind = plain_type(kind)
    return bool(
        pa.types.is_string(kind) or pa.types.is_binary(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
        or pa.types.is_decimal(kind) or pa.types.is_null(kind) or _is_uuid(kind)
    )  # fmt: skip


def as_ids(column: pa.Array) -> tuple[pa.StringArray, npt.NDArray[np.bool_]]:
    """Ids as text (3, 3.0 and "3" are one id), and which rows hold a value that is no id; null and NaN are null.

    No ids are 3.5, infinities, floats too large to be counted one by one (2^53 and more in float64), bytes that are not UTF-8.
    """
    column = _cast(column, plain_type(column.type), "ids")
    kind, n = column.type, len(column)
    if pa.types.is_null(kind):
        return pa.nulls(n, pa.string()), np.zeros(n, bool)
    if pa.types.is_integer(kind):
        return column.cast(pa.string()), np.zeros(n, bool)
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        try:
            text = column.cast(pa.binary()).cast(pa.string())  # checks that it is UTF-8
            return text, np.zeros(n, bool)
        except pa.ArrowInvalid:
            values = column.cast(pa.binary()).to_pylist()
            texts = [None if v is None else v.decode(errors="backslashreplace") for v in values]
            wrong = [v is not None and not _is_utf8(v) for v in values]
            return pa.array(texts, pa.string()), np.array(wrong, bool)
    if not (pa.types.is_floating(kind) or pa.types.is_decimal(kind) or _is_uuid(kind)):
        raise SchemaError(f"ids have type {kind}; expected text or whole numbers")
    if _is_uuid(kind):
        values = column.storage.to_pylist()
        texts = [None if v is None else str(UUID(bytes=v)) for v in values]
        return pa.array(texts, pa.string()), np.zeros(n, bool)
    limit = {16: 2**11, 32: 2**24, 64: 2**53}[kind.bit_width] if pa.types.is_floating(kind) else None
    texts, wrong = [], []
    for value in column.to_pylist():
        if value is None or value != value:
            text, bad = None, False
        else:
            whole = value not in (float("inf"), -float("inf")) and value == int(value)
            bad = not whole or (limit is not None and abs(value) >= limit)  # the limit itself may be rounded
            text = str(int(value)) if whole else str(value)
        texts.append(text)
        wrong.append(bad)
    return pa.array(texts, pa.string()), np.array(wrong, bool)


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_uuid(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.UuidType)


# ---- paths ----


def filesystem_of(location: str) -> tuple[fs.FileSystem, str]:
    """The file system of a path or URI, and the path on it. What exists under exactly this name is a path."""
    if os.path.exists(location) or not re.match(r"[a-z][a-z0-9+.-]+:/", location):
        expanded = location if os.path.exists(location) else os.path.expanduser(location)
        return fs.LocalFileSystem(), os.path.abspath(expanded)  # tasks may run in another folder
    if location.startswith("file:"):
        path = re.sub(r"^file:(//(localhost)?(?=/))?", "", location)
        decoded = unquote(path)
        # A URI is encoded; Spark users write file:/ before a path that is not
        return fs.LocalFileSystem(), path if os.path.exists(path) and not os.path.exists(decoded) else decoded
    try:
        # Spark says s3a where pyarrow says s3
        found: tuple[fs.FileSystem, str] = fs.FileSystem.from_uri(location.replace("s3a://", "s3://", 1))
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(
            f"{location} is neither a path that exists nor a URI that can be opened ({_short(error)}); "
            "expected a local path, or a URI such as s3://bucket/folder with special characters encoded (%20)"
        ) from error
    return found


def _check_links(root: str) -> None:
    """Links to nothing would be passed over without a word, and links to a folder above would be followed for ever.

    Raises:
        SchemaError: there is one.
    """
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = f"{folder}/{name}"
            if not os.path.islink(path) or _hidden(_relative(path, root)):
                continue
            if not os.path.exists(path):
                raise SchemaError(f"{path} is a link to {os.readlink(path)}, which does not exist; expected a file")
            if os.path.realpath(folder).startswith(os.path.join(os.path.realpath(path), "")) or os.path.samefile(
                folder, path
            ):
                raise SchemaError(f"{path} is a link to a folder that it lies in; expected none. Remove it")


def _relative(path: str, root: str) -> str:
    """`path` below `root`; empty for the root itself."""
    return path[len(root.rstrip("/")) :].strip("/")


def _hidden(relative: str) -> bool:
    """Does Spark pass over it: a name on the way begins with . or with _ (but not _key=value)."""
    return any(
        part.startswith(".") or (part.startswith("_") and "=" not in part) or part.endswith("._COPYING_")
        for part in relative.split("/")
    )


def _data_files(filesystem: fs.FileSystem, root: str, inside: list[fs.FileInfo]) -> tuple[list[fs.FileInfo], list[str]]:
    """The Parquet files, in order of their names, and the names of other files."""
    data, others = [], []
    for info in inside:
        relative = _relative(info.path, root)
        if info.type != fs.FileType.File or _hidden(relative):
            continue
        # Hive and old Hadoop jobs write Parquet under names such as 000000_0
        if info.base_name.lower().endswith(PARQUET_SUFFIXES) or begins_as_parquet(filesystem, info.path):
            data.append(info)
        else:
            others.append(relative)
    return data, others


def begins_as_parquet(filesystem: fs.FileSystem, path: str) -> bool:
    try:
        with filesystem.open_input_file(path) as file:
            return bytes(file.read(4)) in (b"PAR1", b"PARE")
    except OSError:
        return False


def _refuse_other_tables(filesystem: fs.FileSystem, location: str, path: str, inside: list[fs.FileInfo]) -> None:
    for info in inside:
        relative = _relative(info.path, path)
        folder, _, name = relative.rpartition("/")
        if name == "_delta_log":
            raise ConfigError(
                f"{location} is no table itself but holds the Delta table {folder}; expected one table. Give {location.rstrip('/')}/{folder}"
            )
        if name == ".hoodie" or (name.endswith(".metadata.json") and folder.rpartition("/")[2] == "metadata"):
            kind = "a Hudi" if name == ".hoodie" else "an Iceberg"
            raise ConfigError(
                f"{location} holds {kind} table; its files read one by one would bring deleted rows back. "
                "Expected Parquet or Delta: export it first"
            )
    folder = path
    while (above := folder.rpartition("/")[0]) and above != folder:
        folder = above
        if filesystem.get_file_info(f"{folder}/_delta_log").type == fs.FileType.Directory:
            raise ConfigError(
                f"{location} is a part of the Delta table {folder}; read by itself it would bring deleted rows back. "
                "Expected the whole table"
            )


def _open_delta(location: str) -> Source:
    import deltalake

    uri = location if re.match(r"[a-z][a-z0-9+.-]+://", location) and not os.path.exists(location) else None
    where = uri.replace("s3a://", "s3://", 1) if uri else filesystem_of(location)[1]
    try:
        table = deltalake.DeltaTable(where)
        schema = pa.schema(table.schema().to_arrow())
    except Exception as error:  # of many kinds: a damaged log, a protocol that delta-rs does not know
        raise SchemaError(
            f"the log of the Delta table {location} cannot be read ({_short(error)}); expected a whole Delta table"
        ) from error
    plain = pa.schema([pa.field(f.name, plain_type(f.type)) for f in schema])
    state = fingerprint([where, str(table.metadata().id), table.version()])
    return Source(where if uri is None else location, "delta", plain, state, version=table.version())


# ---- partitions ----


def _partition(relative: str) -> Partition:
    parts = [part.split("=", 1) for part in relative.split("/")[:-1] if "=" in part]
    return tuple((key, None if value == NO_VALUE else unquote(value)) for key, value in parts)


def _check_partitions(location: str, partitions: Mapping[str, Partition]) -> None:
    kinds = {tuple(key for key, _ in values): path for path, values in partitions.items()}
    if len(kinds) > 1:
        (first, one), (second, other) = list(kinds.items())[:2]
        raise SchemaError(
            f"files of {location} lie in folders of different keys: {one.rpartition('/')[2]} under {list(first)}, "
            f"{other.rpartition('/')[2]} under {list(second)}; expected the same keys for all"
        )


def _snapshot(partitions: Mapping[str, Partition], snapshots: str) -> tuple[set[str], str]:
    """The files to read, and what to say about it: of folders named by days the newest under each folder above them."""
    everything = set(partitions)
    keys = [key for key, _ in next(iter(partitions.values()))]
    dated = _date_keys(keys, list(partitions.values()))
    if dated is None:
        return everything, ""
    first, after = dated

    def day(values: Partition) -> date:
        found = _day([value for _, value in values[first:after]])
        assert found is not None
        return found

    def shown(values: Partition) -> str:
        return "/".join(f"{key}={value}" for key, value in values[first:after])

    newest: dict[Partition, date] = {}
    for values in partitions.values():
        newest[values[:first]] = max(day(values), newest.get(values[:first], date.min))
    names = {day(values): shown(values) for values in partitions.values()}
    if len(names) == 1:
        return everything, ""
    ordered = [names[each] for each in sorted(names)]
    if snapshots == "all":
        return everything, f"all {len(names)} daily folders, {ordered[0]} to {ordered[-1]}"
    taken = {path for path, values in partitions.items() if day(values) == newest[values[:first]]}
    latest = sorted({names[each] for each in newest.values()})
    return taken, f"snapshot {_some(latest)}, the newest of {len(names)} daily folders"


def _date_keys(keys: list[str], partitions: list[Partition]) -> tuple[int, int] | None:
    """First and last + 1 of the one key (or the three, year, month and day) whose values are days, always."""
    spans = [(n, n + 1) for n in range(len(keys))]
    lower = [key.lower() for key in keys]
    spans += [(n, n + 3) for n in range(len(keys) - 2) if lower[n : n + 3] == ["year", "month", "day"]]
    dated = [span for span in spans if all(_day([v for _, v in values[slice(*span)]]) for values in partitions)]
    return dated[0] if len(dated) == 1 else None


def _day(values: list[str | None]) -> date | None:
    text = "-".join(value or "" for value in values)
    match = re.fullmatch(r"(\d{4})-(\d\d?)-(\d\d?)" if len(values) == 3 else r"(\d{4})(-?)(\d\d)\2(\d\d)", text)
    if match is None:
        return None
    year, month, day = (int(part) for part in match.groups() if part not in ("", "-"))
    try:
        return date(year, month, day)
    except ValueError:
        return None


def _partition_type(values: list[str | None]) -> pa.DataType:
    """int64 where every value is a whole number as one writes it, date32 for days, else text: 007 stays what it is."""
    given = [value for value in values if value is not None]
    if given and all(re.fullmatch(r"0|-?[1-9]\d{0,17}", value) for value in given):
        return pa.int64()
    if given and all("-" in value and _day([value]) for value in given):
        return pa.date32()
    return pa.string()


def _partition_array(value: str | None, kind: pa.DataType, n: int) -> pa.Array:
    if value is None:
        return pa.nulls(n, kind)
    scalar = date.fromisoformat(value) if pa.types.is_date(kind) else int(value) if pa.types.is_integer(kind) else value
    return pa.repeat(pa.scalar(scalar, kind), n)


# ---- footers and schemas ----


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type of the values themselves: no dictionaries, views, run lengths, extensions, large or fixed sizes."""
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType) and not _is_uuid(kind):
        return plain_type(kind.storage_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind) or pa.types.is_fixed_size_binary(kind):
        return pa.binary() if not pa.types.is_decimal(kind) else kind
    if (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        or pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind)
    ):  # fmt: skip
        return pa.list_(plain_type(kind.value_type))
    return kind


def _footer(filesystem: fs.FileSystem, path: str) -> pq.FileMetaData:
    """The footer as Parquet has it, without the Arrow schema of the writer, as Spark reads it too.

    With that schema pyarrow cannot read fixed-size lists with null rows (apache/arrow 35692).
    """
    name = path.rpartition("/")[2]
    try:
        with filesystem.open_input_file(path) as file:
            size = file.size()
            if size == 0:
                raise SchemaError(f"{path} is empty (0 bytes); expected Parquet. Was it written to its end?")
            tail = file.read_at(min(size, 2**16), size - min(size, 2**16))
            length = int.from_bytes(tail[-8:-4], "little")
            if tail[-4:] == b"PARE":
                raise SchemaError(f"{path} is an encrypted Parquet file; expected one that is not encrypted")
            if tail[-4:] != b"PAR1" or length + 12 > size:
                raise SchemaError(
                    f"{name} is not a readable Parquet file (it does not end as one): {path}; expected Parquet. "
                    "Was it written to its end?"
                )
            if length + 8 > len(tail):
                tail = file.read_at(length + 8, size - length - 8)
        plain = tail[-8 - length :].replace(b"ARROW:schema", b"ARROW:unread")
        return pq.read_metadata(pa.BufferReader(b"PAR1" + plain))
    except (pa.ArrowException, OSError) as error:
        raise SchemaError(
            f"{name} is not a readable Parquet file ({_short(error)}): {path}; expected Parquet"
        ) from error


def _open(filesystem: fs.FileSystem, path: str) -> pq.ParquetFile:
    metadata = _footer(filesystem, path)
    return pq.ParquetFile(path, filesystem=filesystem, metadata=metadata, coerce_int96_timestamp_unit="us")


def _row_batches(
    file: pq.ParquetFile, path: str, index: int, columns: list[str], rows: int
) -> Iterator[pa.RecordBatch]:
    if not columns:
        n = file.metadata.row_group(index).num_rows
        for start in range(0, n, rows):
            count = pa.nulls(min(rows, n - start))
            yield pa.RecordBatch.from_arrays([count], names=[""])
        return
    try:
        yield from file.iter_batches(rows, row_groups=[index], columns=columns)
    except (pa.ArrowException, OSError) as error:
        remedy = "expected whole Parquet. Write the file again"
        if "DuckDB" in str(file.metadata.created_by):
            # 2.0 repeats a null array as often as it would have elements
            remedy = "DuckDB writes arrays (FLOAT[16]) with null rows so that others cannot read them: cast to FLOAT[]"
        raise SchemaError(f"row group {index} of {path} cannot be read ({_short(error)}); {remedy}") from error


def _unified_schema(
    files: list[tuple[str, pq.FileMetaData]], partitions: Mapping[str, Partition]
) -> tuple[pa.Schema, dict[str, tuple[str, ...]]]:
    """One schema for all files, and for each column the files with rows that lack it."""
    schemas = []
    for name, footer in files:
        arrow = footer.schema.to_arrow_schema()
        twice = {column for column in arrow.names if arrow.names.count(column) > 1}
        if twice:
            raise SchemaError(f"{name} has two columns named {min(twice)!r}; expected every name once")
        schemas.append((name, footer, arrow))
    deciding = [each for each in schemas if each[1].num_rows] or schemas[:1]
    types: dict[str, tuple[pa.DataType, str, pq.FileMetaData]] = {}
    spellings: dict[str, tuple[str, str]] = {}
    for name, footer, arrow in deciding:
        for column in arrow:
            spelled, where = spellings.setdefault(column.name.lower(), (column.name, name))
            if spelled != column.name and column.name not in types and spelled not in arrow.names:
                raise SchemaError(
                    f"{where} has a column {spelled!r}, {name} a column {column.name!r}; expected one spelling"
                )
            kind = plain_type(column.type)
            if column.name not in types:
                types[column.name] = (kind, name, footer)
                continue
            known, first, its_footer = types[column.name]
            both = _unified(known, kind)
            if both is not None:
                types[column.name] = (both, first if both == known else name, its_footer if both == known else footer)
            elif _without_values(its_footer, column.name):
                types[column.name] = (kind, name, footer)
            elif not _without_values(footer, column.name):
                raise SchemaError(
                    f"column {column.name!r} is {known} in {first} and {kind} in {name}; expected types that one column can hold"
                )
    lacking = {
        column: tuple(name for name, footer, arrow in deciding if footer.num_rows and column not in arrow.names)
        for column in types
    }
    fields = [pa.field(column, kind) for column, (kind, _, _) in types.items()]
    keys = [key for key, _ in next(iter(partitions.values()), ())]
    for key in keys:  # a folder's value wins over a column of the file, as in Spark
        kind = _partition_type([dict(values)[key] for values in partitions.values()])
        fields = [f for f in fields if f.name != key] + [pa.field(key, kind)]
        lacking[key] = ()
    return pa.schema(fields), {column: files for column, files in lacking.items() if files}


def _unified(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """The type that holds values of both; None where there is none."""
    if a == b:
        return a
    if (pa.types.is_string(a) and _is_number(b)) or (pa.types.is_string(b) and _is_number(a)):
        return pa.string()
    try:
        both = pa.unify_schemas([pa.schema([("", a)]), pa.schema([("", b)])], promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        return None
    return both.field(0).type


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _without_values(footer: pq.FileMetaData, column: str) -> bool:
    """Is a flat column null in every row, as its statistics say: such as one that pandas wrote of None or NaN alone."""
    leaves = [n for n in range(footer.num_columns) if footer.schema.column(n).path == column]
    if len(leaves) != 1:
        return False
    for group in range(footer.num_row_groups):
        chunk = footer.row_group(group).column(leaves[0])
        found = chunk.statistics
        if found is None or not found.has_null_count or found.null_count != chunk.num_values:
            return False
    return True


def _cast(array: pa.Array, kind: pa.DataType, what: str) -> pa.Array:
    if array.type == kind:
        return array
    if array.null_count == len(array):
        return pa.nulls(len(array), kind)
    if isinstance(array, pa.ExtensionArray):
        return _cast(array.storage, kind, what) if not _is_uuid(array.type) else as_ids(array)[0].cast(kind)
    if pa.types.is_string(kind) and _is_number(array.type):
        return as_ids(array)[0]
    if pa.types.is_run_end_encoded(array.type):
        import pyarrow.compute as pc

        return _cast(pc.run_end_decode(array), kind, what)
    try:
        return array.cast(kind, safe=False)
    except pa.ArrowException as error:
        raise SchemaError(f"{what} cannot be read as {kind} ({_short(error)}); expected values of one type") from error


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMED])
    return f"{shown} and {len(names) - NAMED} more" if len(names) > NAMED else shown


def _short(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def read_file(filesystem: fs.FileSystem, path: str) -> bytes | None:
    """The content of a small file; None where there is none."""
    try:
        with filesystem.open_input_stream(path) as stream:
            content: bytes = stream.read()
    except FileNotFoundError:
        return None
    return content


def write_file(filesystem: fs.FileSystem, path: str, content: bytes) -> None:
    """A small file, whole or not at all: a reader, or a kill, may come at any moment. Its folder is made where absent."""
    filesystem.create_dir(path.rsplit("/", 1)[0], recursive=True)
    with filesystem.open_output_stream(f"{path}.part") as stream:
        stream.write(content)
    filesystem.move(f"{path}.part", path)
