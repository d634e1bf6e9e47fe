"""Small reads of tables by delta-rs, without Spark, which takes seconds for each and many to start."""

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
    """Every row of a table of few rows, read by delta-rs: Spark takes seconds for it, and many to start. No rows where it is absent.

    Raises:
        SchemaError: its columns are not the declared ones.
    """
    with open_table(root, table) as log:
        if log is None:
            return []
        found = log.to_pyarrow_table()
    if found.schema.names != table.schema.names:
        raise SchemaError(
            f"columns of {table.name} are {found.schema.names}; expected {table.schema.names}. Was the table written by another version?"
        )
    rows: list[dict[str, Any]] = found.to_pylist(maps_as_pydicts="strict")
    return rows


def count_and_version(root: str, table: Table) -> tuple[int, int] | None:
    """Rows and version of a table, from its log; None where it is absent."""
    with open_table(root, table) as log:
        return None if log is None else (log.count(), log.version())


def data_files(root: str, table: Table, version: int, codebook_version: int) -> set[str] | None:
    """The data files of a version by its log, of `semantic_ids` those of one codebook version; None where its log is gone."""
    from deltalake.exceptions import DeltaError

    part = f"/codebook_version={codebook_version}/" if table is SEMANTIC_IDS else ""
    with open_table(root, table) as log:
        try:
            if log is not None:
                log.load_as_version(version)
        except DeltaError:
            return None
        return None if log is None else {file for file in log.file_uris() if part in file}


def hashes_by_codebook_version(root: str) -> dict[int, set[str]]:
    """By codebook version the first HASH_DIGITS digits of the hashes that its rows of `semantic_ids` carry.

    From the statistics in the table's log; the rows of a version are read only where a file has none.
    """
    found: dict[int, set[str]] = {}
    with open_table(root, SEMANTIC_IDS) as log:
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
