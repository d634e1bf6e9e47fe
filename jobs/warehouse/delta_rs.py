"""Small reads of tables by delta-rs. Spark takes seconds for each and many more to start."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.errors import SchemaError
from jobs.failures import about
from jobs.warehouse.tables import SEMANTIC_IDS, Table

if TYPE_CHECKING:
    import deltalake

HASH_DIGITS = 32  # Delta's statistics keep this many characters of the least and the greatest text of a file


def read_rows(root: str, table: Table) -> list[dict[str, Any]]:
    """Every row of a small table; no rows if the table does not exist.

    Raises:
        SchemaError: its columns are not the declared ones.
    """
    with open_table(root, table) as log:
        if log is None:
            return []
        content = log.to_pyarrow_table()
    optional = [field.name for field in table.schema if field.nullable and field.name not in content.schema.names]
    expected = [name for name in table.schema.names if name not in optional]
    if content.schema.names != expected:
        raise SchemaError(
            f"columns of {table.name} are {content.schema.names}; expected {table.schema.names}. The table was written "
            "by another version of this software: use that version, or restore the table from a backup"
        )
    absent = dict.fromkeys(optional)  # written before an optional column was declared
    return [{**row, **absent} for row in content.to_pylist(maps_as_pydicts="strict")]


def count_and_version(root: str, table: Table) -> tuple[int, int] | None:
    """Number of rows and version of a table, from its log; None if it does not exist."""
    with open_table(root, table) as log:
        return None if log is None else (log.count(), log.version())


def data_files(root: str, table: Table, version: int, codebook_version: int) -> set[str] | None:
    """The data files of a table version, from its log; of `semantic_ids` only those of one codebook version.

    None if the log no longer has the version.
    """
    from deltalake.exceptions import DeltaError

    partition = f"/codebook_version={codebook_version}/" if table is SEMANTIC_IDS else ""
    with open_table(root, table) as log:
        try:
            if log is not None:
                log.load_as_version(version)
        except DeltaError:
            return None
        return None if log is None else {file for file in log.file_uris() if partition in file}


def hashes_by_codebook_version(root: str) -> dict[int, set[str]]:
    """Codebook version -> the codebook hashes of its rows in `semantic_ids`, cut to HASH_DIGITS digits.

    From the statistics in the table's log; the rows of a version are read only if one of its files has no statistics.
    """
    hashes: dict[int, set[str]] = {}
    with open_table(root, SEMANTIC_IDS) as log:
        if log is None:
            return hashes
        for file in pa.table(log.get_add_actions(flatten=True)).to_pylist():
            version = int(file["partition.codebook_version"])
            ends = [file.get(f"{end}.codebook_hash") for end in ("min", "max")]
            if None in ends:
                of_version = pc.field("codebook_version") == version
                rows = log.to_pyarrow_dataset().to_table(columns=["codebook_hash"], filter=of_version)
                ends = pc.unique(rows["codebook_hash"]).to_pylist()
            hashes.setdefault(version, set()).update(end[:HASH_DIGITS] for end in ends)
    return hashes


def may_have_nulls(root: str, codebook_version: int, column: str) -> bool:
    """Whether a column may be null in rows that `semantic_ids` has of a codebook version; no row is read.

    From the null counts in the table's log. A file without a count, such as one that was written before the column was
    declared, may have nulls.
    """
    with open_table(root, SEMANTIC_IDS) as log:
        files = [] if log is None else pa.table(log.get_add_actions(flatten=True)).to_pylist()
    return any(
        file.get(f"null_count.{column}") != 0
        for file in files
        if int(file["partition.codebook_version"]) == codebook_version
    )


@contextmanager
def open_table(root: str, table: Table) -> Iterator[deltalake.DeltaTable | None]:
    """The table as delta-rs reads it; None if it does not exist."""
    import deltalake
    from deltalake.exceptions import TableNotFoundError

    with ExitStack() as until_read:
        until_read.enter_context(about(f"{root}/{table.name}"))
        location = f"{root}/{table.name}"
        if "://" not in root and re.search(r"%[0-9a-fA-F]{2}|\\", root) and Path(location).is_dir():
            # delta-rs decodes `%20` in a path to a space, so it reads the table through links in a folder without it.
            location = until_read.enter_context(TemporaryDirectory())
            for entry in Path(root, table.name).iterdir():
                Path(location, entry.name).symlink_to(entry)
        try:
            delta_table = deltalake.DeltaTable(location)
        except TableNotFoundError:
            delta_table = None
        yield delta_table
