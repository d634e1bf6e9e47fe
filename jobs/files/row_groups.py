"""The Parquet files of a table version as tasks and training read them: row group by row group with pyarrow, past the JVM.

Rows that Spark hands to Python cross from the JVM at a tenth of the speed at which pyarrow reads them. Files are whole
versions of a table because deletion vectors are off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.failures import about
from jobs.files.sources import filesystem_of

T = TypeVar("T")
FOOTERS_AT_ONCE = 16  # waiting for an object store costs no core


@dataclass(frozen=True)
class RowGroup:
    """Row group `index` of the file at `uri`, and its number of rows."""

    uri: str
    index: int
    rows: int

    @property
    def file(self) -> str:
        return self.uri.rsplit("/", 1)[1]

    def batches(self, columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        """The columns in their order in the file, `rows` at a time."""
        return iter(open_parquet(self.uri).iter_batches(rows, row_groups=[self.index], columns=columns))


def row_groups(uris: Sequence[str]) -> list[RowGroup]:
    """Of all files, in order; reads footers only."""

    def of_file(uri: str) -> list[RowGroup]:
        footer = open_parquet(uri).metadata
        rows = [footer.row_group(index).num_rows for index in range(footer.num_row_groups)]
        return [RowGroup(uri, index, n) for index, n in enumerate(rows) if n]

    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
        return [group for groups in pool.map(of_file, uris) for group in groups]


def missing(uris: Sequence[str]) -> list[str]:
    """Those that are no files any more."""
    places = [filesystem_of(uri) for uri in uris]
    found = places[0][0].get_file_info([path for _, path in places]) if places else []
    return [uri for uri, info in zip(uris, found, strict=True) if not info.is_file]


def read_ahead(batches: Iterator[T]) -> Iterator[T]:
    """The batches; a thread reads the next one while the caller works on the current one."""
    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = reader.submit(next, batches, None)
            yield batch


def open_parquet(uri: str) -> pq.ParquetFile:
    """The file; what goes wrong names it."""
    filesystem, path = filesystem_of(uri)
    with about(path):
        return pq.ParquetFile(path, filesystem=filesystem)
