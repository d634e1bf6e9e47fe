"""promote: the alias `champion` moves to a codebook version if its verdict passed on the tables as they are now.

The `releases` row is written last, so whoever follows the current release never sees half a night.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from jobs.evaluate import EvaluateResult
from jobs.registry import CHAMPION, CODEBOOK_MODEL, ModelVersion, Registry
from jobs.releases import Release, current_release
from jobs.tables import ITEM_EMBEDDINGS, RELEASES, SEMANTIC_IDS, Warehouse


class GateFailed(RuntimeError):
    """The verdict does not allow the promotion; the champion stays."""


class PromotionConflict(RuntimeError):
    """The champion or the tables moved since the verdict."""


def promote(warehouse: Warehouse, registry: Registry, model: ModelVersion, verdict: EvaluateResult) -> Release:
    """Make `model` the champion and release the tables it was judged on. Call with the writer lock held.

    Raises:
        GateFailed: the verdict is negative.
        PromotionConflict: the champion is not the one the verdict compared with, or a table has changed since.
    """
    if not verdict.passed:
        raise GateFailed(
            f"codebook version {model.version} did not pass the gate: {'; '.join(verdict.reasons)}. The champion stays; "
            "change the data or the fit, or the limits under gate.* if they are wrong for your catalogue"
        )
    present = {table.name: warehouse.version(table) for table in (ITEM_EMBEDDINGS, SEMANTIC_IDS)}
    if dict(verdict.table_versions) != present:
        raise PromotionConflict(
            f"the verdict is about table versions {dict(verdict.table_versions)}, the tables are at {present}; "
            "expected no change in between. Run `sid evaluate` again"
        )
    current = current_release(warehouse)
    champion = registry.resolve(CODEBOOK_MODEL, CHAMPION)
    if current and current.codebook_version == model.version and dict(current.table_versions) == present:
        if champion is None or champion.version != model.version:
            registry.set_alias(CODEBOOK_MODEL, CHAMPION, model.version)
        return replace(current, nothing_to_do=True)
    if champion is not None and champion.version not in (model.version, verdict.judged_against):
        raise PromotionConflict(
            f"the champion is version {champion.version}, the verdict compared with "
            f"{verdict.judged_against or 'no champion'}; expected the same. Run `sid evaluate` again"
        )
    # Killed between these two writes, the next run finds the alias in place and writes the row.
    registry.set_alias(CODEBOOK_MODEL, CHAMPION, model.version)
    release = Release(
        release_id=current.release_id + 1 if current else 1,
        codebook_version=model.version,
        codebook_hash=model.tags["codebook_hash"],
        table_versions=present,
        previous=current.release_id if current else None,
        status="promoted",
        at=datetime.now(UTC),
    )
    row = {name: getattr(release, name) for name in RELEASES.schema.names}
    warehouse.append(RELEASES, warehouse.rows(RELEASES, [row]))
    return release
