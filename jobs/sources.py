"""Parquet files that others wrote: where they are, what they hold, and a name for their state."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from jobs.config import ConfigError
from jobs.tables import SchemaError


@dataclass(frozen=True)
class ParquetFiles:
    """A file, or the files of a folder: one schema, the row groups (path, index), a fingerprint of names, sizes and times."""

    schema: pa.Schema
    fingerprint: str
    row_groups: tuple[tuple[str, int], ...] = field(repr=False)


def open_parquet(location: str) -> ParquetFiles:
    """Read the footers at `location`, no rows.

    Raises:
        ConfigError: nothing is there.
        SchemaError: a file is not Parquet, or lacks columns that the first one has.
    """
    filesystem, path = filesystem_of(location)
    found = filesystem.get_file_info(path)
    if found.type == fs.FileType.NotFound:
        raise ConfigError(f"{location} does not exist; expected a Parquet file or a folder of them")
    files = [found]
    if found.type == fs.FileType.Directory:
        inside = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
        files = sorted((i for i in inside if i.path.endswith(".parquet")), key=lambda info: info.path)
    if not files:
        raise ConfigError(f"{location} holds no .parquet file; expected at least one")
    row_groups: list[tuple[str, int]] = []
    schema: pa.Schema | None = None
    for info in files:
        try:
            footer = pq.ParquetFile(info.path, filesystem=filesystem)
        except pa.ArrowInvalid as error:
            raise SchemaError(f"{info.base_name} is not a readable Parquet file ({error}); expected Parquet") from error
        if schema is None:
            schema = footer.schema_arrow
        elif missing := set(schema.names) - set(footer.schema_arrow.names):
            raise SchemaError(
                f"{info.base_name} lacks columns {sorted(missing)} that {files[0].base_name} has; expected one schema"
            )
        row_groups += [(info.path, group) for group in range(footer.metadata.num_row_groups)]
    assert schema is not None
    stamp = json.dumps([[info.base_name, info.size, info.mtime_ns] for info in files])
    return ParquetFiles(schema, hashlib.sha256(stamp.encode()).hexdigest()[:32], tuple(row_groups))


def filesystem_of(location: str) -> tuple[fs.FileSystem, str]:
    """The file system of a path or URI, and the path on it."""
    if re.match(r"[a-z][a-z0-9+.-]+:/", location):
        # Spark says s3a where pyarrow says s3
        found: tuple[fs.FileSystem, str] = fs.FileSystem.from_uri(location.replace("s3a://", "s3://", 1))
        return found
    return fs.LocalFileSystem(), os.path.abspath(location)  # tasks may run in another folder
