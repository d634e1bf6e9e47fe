"""The current release: the one row that readers of the warehouse follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from jobs.registry import ModelVersion
from jobs.tables import RELEASES, Warehouse, rows_of

PROMOTED, ROLLED_BACK = "promoted", "rolled back"  # how a release came about


@dataclass(frozen=True)
class Release:
    """One promoted state: a codebook and the table versions it was judged on. `previous` is what readers followed before."""

    release_id: int
    codebook_version: int
    codebook_hash: str
    table_versions: Mapping[str, int]
    previous: int | None
    status: str
    at: datetime
    nothing_to_do: bool = False


def releases(root: str) -> list[Release]:
    """Every release of the warehouse there, the current one first; none before the first promotion."""
    found = [Release(**row) for row in rows_of(root, RELEASES)]
    return sorted(found, key=lambda release: release.release_id, reverse=True)


def current_release(root: str) -> Release | None:
    """The newest release, or None before the first promotion."""
    return next(iter(releases(root)), None)


def write_release(
    warehouse: Warehouse, current: Release | None, model: ModelVersion, table_versions: Mapping[str, int], status: str
) -> Release:
    """Append the release that readers follow from now on."""
    release = Release(
        release_id=current.release_id + 1 if current else 1,
        codebook_version=model.version,
        codebook_hash=model.tags["codebook_hash"],
        table_versions=table_versions,
        previous=current.release_id if current else None,
        status=status,
        at=datetime.now(UTC),
    )
    row = {name: getattr(release, name) for name in RELEASES.schema.names}
    warehouse.append(RELEASES, warehouse.rows(RELEASES, [row]))
    return release
