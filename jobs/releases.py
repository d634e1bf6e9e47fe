"""The current release: the one row that readers of the warehouse follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from pyspark.sql import functions as F

from jobs.tables import RELEASES, Warehouse


@dataclass(frozen=True)
class Release:
    """One promoted state: a codebook and the table versions it was judged on."""

    release_id: int
    codebook_version: int
    codebook_hash: str
    table_versions: Mapping[str, int]
    previous: int | None
    status: str
    at: datetime
    nothing_to_do: bool = False


def current_release(warehouse: Warehouse) -> Release | None:
    """The newest release, or None before the first promotion."""
    if not warehouse.exists(RELEASES):
        return None
    row = warehouse.read(RELEASES).orderBy(F.desc("release_id")).first()
    return None if row is None else Release(**row.asDict())
