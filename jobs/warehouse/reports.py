"""Quality reports: the rows of `quality_reports`, which `evaluate` writes and `promote` reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from jobs.warehouse.delta_rs import read_rows
from jobs.warehouse.tables import ITEM_EMBEDDINGS, QUALITY_REPORTS, SEMANTIC_IDS

if TYPE_CHECKING:
    from jobs.warehouse.delta_spark import Warehouse


@dataclass(frozen=True)
class UncertainItem:
    """An item with a low confidence, which is the posterior probability of its codes."""

    item_id: str
    semantic_id: str
    confidence: float
    log_likelihood: float


@dataclass(frozen=True)
class QualityReport:
    """A row of `quality_reports`: the metrics of a codebook version and the verdict of the gate."""

    codebook_version: int
    run_id: str
    passed: bool
    reasons: tuple[str, ...]
    metrics: Mapping[str, float]
    least_certain: tuple[UncertainItem, ...]
    table_versions: Mapping[str, int]
    judged_against: int | None  # version of the champion that it was compared with


def report(root: str, codebook_version: int, run_id: str | None = None) -> QualityReport | None:
    """A stored report of a codebook version: that of `run_id`, or the newest; None if there is none."""
    rows = (row for row in _newest_first(root, codebook_version) if run_id in (None, row["run_id"]))
    newest = next(rows, None)
    if newest is None:
        return None
    return QualityReport(
        codebook_version=codebook_version,
        run_id=newest["run_id"],
        passed=newest["passed"],
        reasons=tuple(newest["reasons"]),
        metrics=newest["metrics"],
        least_certain=tuple(UncertainItem(**item) for item in newest["least_certain"]),
        table_versions=newest["table_versions"],
        judged_against=newest["judged_against"],
    )


def make_newest(warehouse: Warehouse, stored: QualityReport) -> None:
    """Give a report that was reused the present time, unless it is the newest of its codebook version already."""
    rows = _newest_first(warehouse.root, stored.codebook_version)
    if rows[0]["run_id"] != stored.run_id:
        row = next(row for row in rows if row["run_id"] == stored.run_id)
        now = {**row, "evaluated_at": datetime.now(UTC)}
        warehouse.merge(QUALITY_REPORTS, warehouse.rows(QUALITY_REPORTS, [now]))


def _newest_first(root: str, codebook_version: int) -> list[dict[str, Any]]:
    """The rows of a codebook version. Those without a time come last, by the table versions that were evaluated."""

    def age(row: Mapping[str, Any]) -> tuple[datetime, list[int]]:
        versions = [row["table_versions"][table.name] for table in (SEMANTIC_IDS, ITEM_EMBEDDINGS)]
        return row["evaluated_at"] or datetime.min.replace(tzinfo=UTC), versions

    rows = [row for row in read_rows(root, QUALITY_REPORTS) if row["codebook_version"] == codebook_version]
    return sorted(rows, key=age, reverse=True)
