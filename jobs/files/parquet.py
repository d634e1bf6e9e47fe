"""Parquet files: footers, row groups and their batches, read with pyarrow instead of Spark.

Rows that Spark hands to Python cross from the JVM at a tenth of the speed at which pyarrow reads them, so tasks get row
groups instead of rows. Files of our tables are whole versions, because deletion vectors are off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from jobs.errors import SchemaError, first_line
from jobs.failures import about
from jobs.files.filesystem import filesystem_of

T = TypeVar("T")
FOOTERS_AT_ONCE = 16  # waiting for an object store costs no core
MAGIC, ENCRYPTED_MAGIC = b"PAR1", b"PARE"  # first and last bytes of a file
TAIL_BYTES = 2**16  # of a file, in which most footers fit


@dataclass(frozen=True)
class RowGroup:
    """Row group `index` of the file at `uri` (or path), and its number of rows."""

    uri: str
    index: int
    rows: int

    @property
    def file(self) -> str:
        return self.uri.rsplit("/", 1)[1]

    def batches(self, columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        """The columns in their order in the file, `rows` at a time."""
        return iter(open_parquet(self.uri).iter_batches(rows, row_groups=[self.index], columns=columns))

    def read(self, columns: list[str]) -> pa.Table:
        """The columns of all rows."""
        return open_parquet(self.uri).read_row_group(self.index, columns=columns)


def row_groups(uris: Sequence[str]) -> list[RowGroup]:
    """The row groups with rows of all files, in order; reads footers only."""
    return [group for uri, footer in zip(uris, footers(uris), strict=True) for group in row_groups_of(uri, footer)]


def row_groups_of(uri: str, footer: pq.FileMetaData) -> list[RowGroup]:
    """The row groups with rows of the file at `uri`."""
    rows = [footer.row_group(index).num_rows for index in range(footer.num_row_groups)]
    return [RowGroup(uri, index, n) for index, n in enumerate(rows) if n]


def read_ahead(batches: Iterator[T]) -> Iterator[T]:
    """The batches; a thread reads the next one while the caller works on the current one."""
    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = reader.submit(next, batches, None)
            yield batch


# ---- files of our tables: an exception is a damaged warehouse, for jobs/failures.py ----


def open_parquet(uri: str) -> pq.ParquetFile:
    """The file; an exception names it."""
    filesystem, path = filesystem_of(uri)
    with about(path):
        return pq.ParquetFile(path, filesystem=filesystem)


def footers(uris: Sequence[str]) -> list[pq.FileMetaData]:
    """The footer of each file."""
    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
        return list(pool.map(lambda uri: open_parquet(uri).metadata, uris))


# ---- files that others wrote: an exception is wrong data, a SchemaError ----


def source_footers(filesystem: fs.FileSystem, paths: Sequence[str]) -> list[pq.FileMetaData]:
    """The footer of each file, as `source_footer` reads it."""
    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
        return list(pool.map(lambda path: source_footer(filesystem, path), paths))


def source_footer(filesystem: fs.FileSystem, path: str) -> pq.FileMetaData:
    """The footer without the Arrow schema of the writer, as Spark reads it too.

    With that schema pyarrow cannot read fixed-size lists with null rows (apache/arrow 35692).

    Raises:
        SchemaError: the file is not whole, plain Parquet.
    """
    name = path.rpartition("/")[2]
    try:
        with filesystem.open_input_file(path) as file:
            size = file.size()
            if size == 0:
                raise SchemaError(f"{path} is empty (0 bytes); expected Parquet. Was it written to its end?")
            tail = file.read_at(min(size, TAIL_BYTES), size - min(size, TAIL_BYTES))
            length = int.from_bytes(tail[-8:-4], "little")
            if tail[-4:] == ENCRYPTED_MAGIC:
                raise SchemaError(f"{path} is an encrypted Parquet file; expected one that is not encrypted")
            if tail[-4:] != MAGIC or length + 12 > size:
                raise SchemaError(
                    f"{name} is not a readable Parquet file (it does not end as one): {path}; expected Parquet. "
                    "Was it written to its end?"
                )
            if length + 8 > len(tail):
                tail = file.read_at(length + 8, size - length - 8)
        plain = tail[-8 - length :].replace(b"ARROW:schema", b"ARROW:unread")
        return pq.read_metadata(pa.BufferReader(MAGIC + plain))
    except (pa.ArrowException, OSError) as error:
        raise SchemaError(
            f"{name} is not a readable Parquet file ({first_line(error)}): {path}; expected Parquet"
        ) from error


def open_source_file(filesystem: fs.FileSystem, path: str) -> pq.ParquetFile:
    """A file with the footer of `source_footer`; its times of 96 bits are read to the microsecond.

    Raises:
        SchemaError: the file is not whole, plain Parquet.
    """
    footer = source_footer(filesystem, path)
    return pq.ParquetFile(path, filesystem=filesystem, metadata=footer, coerce_int96_timestamp_unit="us")


def source_batches(
    file: pq.ParquetFile, path: str, index: int, columns: list[str], rows: int
) -> Iterator[pa.RecordBatch]:
    """The columns of row group `index` of a file at `path`, at most `rows` at a time; of no columns as many null rows.

    Raises:
        SchemaError: the row group cannot be read.
    """
    if not columns:
        n = file.metadata.row_group(index).num_rows
        for start in range(0, n, rows):
            yield pa.RecordBatch.from_arrays([pa.nulls(min(rows, n - start))], names=[""])
        return
    try:
        yield from file.iter_batches(rows, row_groups=[index], columns=columns)
    except (pa.ArrowException, OSError) as error:
        remedy = "expected whole Parquet. Write the file again"
        if "DuckDB" in str(file.metadata.created_by):
            # 2.0 repeats a null array as often as it would have elements
            remedy = "DuckDB writes arrays (FLOAT[16]) with null rows so that others cannot read them: cast to FLOAT[]"
        raise SchemaError(f"row group {index} of {path} cannot be read ({first_line(error)}); {remedy}") from error


def begins_as_parquet(filesystem: fs.FileSystem, path: str) -> bool:
    """Is it Parquet by its first bytes, whatever its name?"""
    try:
        with filesystem.open_input_file(path) as file:
            return bytes(file.read(4)) in (MAGIC, ENCRYPTED_MAGIC)
    except OSError:
        return False
