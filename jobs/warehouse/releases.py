"""Releases: the rows of `releases`, of which readers follow the newest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise

from jobs.warehouse.delta_rs import data_files, read_rows
from jobs.warehouse.delta_spark import Warehouse
from jobs.warehouse.tables import ITEM_EMBEDDINGS, RELEASES, SEMANTIC_IDS

PROMOTED, ROLLED_BACK = "promoted", "rolled back"  # status of a release


@dataclass(frozen=True)
class Release:
    """A codebook and the table versions that belong to it; `previous` is the release that was current before."""

    release_id: int
    codebook_version: int
    codebook_hash: str
    table_versions: Mapping[str, int]
    previous: int | None
    status: str
    at: datetime


def releases(root: str) -> list[Release]:
    """Every release of the warehouse at `root`, newest first."""
    rows = [Release(**row) for row in read_rows(root, RELEASES)]
    return sorted(rows, key=lambda release: release.release_id, reverse=True)


def current_release(root: str) -> Release | None:
    """The newest release, or None before the first promotion."""
    return next(iter(releases(root)), None)


def rolled_back(history: Sequence[Release]) -> dict[int, int]:
    """Codebook versions that were rolled back and not released again -> the release that was rolled back."""
    versions: dict[int, int] = {}
    for before, release in pairwise(sorted(history, key=lambda release: release.release_id)):
        if release.status == ROLLED_BACK and release.codebook_version != before.codebook_version:
            versions[before.codebook_version] = before.release_id
        versions.pop(release.codebook_version, None)
    return versions


def versions_to_evaluate(warehouse: Warehouse, codebook_version: int) -> dict[str, int]:
    """The table versions to evaluate a codebook on: the newest ones.

    If the current release is of this codebook and no vector and none of its IDs was written since, they are the
    versions that the release pins: IDs of another codebook give the table a new version, but the verdict need not be
    repeated.
    """
    newest = {table.name: warehouse.version(table) for table in (ITEM_EMBEDDINGS, SEMANTIC_IDS)}
    current = current_release(warehouse.root)
    if current is None or current.codebook_version != codebook_version:
        return newest
    for table in (ITEM_EMBEDDINGS, SEMANTIC_IDS):
        versions = newest[table.name], current.table_versions[table.name]
        if versions[0] == versions[1]:
            continue
        files = [data_files(warehouse.root, table, version, codebook_version) for version in versions]
        if None in files or files[0] != files[1]:
            return newest
    return dict(current.table_versions)


def write_release(
    warehouse: Warehouse,
    current: Release | None,
    codebook_version: int,
    codebook_hash: str,
    table_versions: Mapping[str, int],
    status: str,
) -> Release:
    """Append a release, which readers follow from then on."""
    release = Release(
        release_id=current.release_id + 1 if current else 1,
        codebook_version=codebook_version,
        codebook_hash=codebook_hash,
        table_versions=table_versions,
        previous=current.release_id if current else None,
        status=status,
        at=datetime.now(UTC),
    )
    row = {name: getattr(release, name) for name in RELEASES.schema.names}
    warehouse.append(RELEASES, warehouse.rows(RELEASES, [row]))
    return release
