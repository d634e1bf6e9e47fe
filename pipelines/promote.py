"""promote: release a codebook version whose verdict passed on the present tables, and make it the champion.
rollback: release an earlier codebook again, with the table versions it was released with.

The row of `releases` is written last, so readers who follow the current release never see an unfinished night.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jobs.ctr.champion import restore_ctr_champion
from jobs.models.champion import check_hashes
from jobs.models.codebooks import codebook_files
from jobs.models.registry import CHAMPION, Registry
from jobs.models.versions import CodebookVersion
from jobs.warehouse.delta_spark import Warehouse
from jobs.warehouse.queries import count_items_without_id, missing_data
from jobs.warehouse.releases import (
    PROMOTED,
    ROLLED_BACK,
    Release,
    releases,
    rolled_back,
    versions_to_evaluate,
    write_release,
)
from jobs.warehouse.reports import QualityReport


class GateFailed(RuntimeError):
    """The verdict does not allow the promotion; the champion stays."""


class PromotionConflict(RuntimeError):
    """The champion or a table changed after the verdict."""


class NoWayBack(RuntimeError):
    """There is no earlier release to go back to, or its codebook or files are gone."""


@dataclass(frozen=True)
class PromoteResult:
    """The release that readers follow after a promotion."""

    release: Release
    nothing_to_do: bool = False  # it was the current one before

    def summary(self) -> str:
        return f"champion is version {self.release.codebook_version}, release {self.release.release_id}"


@dataclass(frozen=True)
class RollbackResult:
    """The release that a rollback wrote, and its consequences."""

    release: Release
    left_version: int | None  # codebook version that was champion before, if another; no night promotes it again
    ctr_version: int | None  # CTR model of this codebook, which is the champion again
    items_without_id: int  # items that came after the earlier release; the next night encodes them
    nothing_to_do: bool = False


def promote(
    warehouse: Warehouse, registry: Registry, codebook: CodebookVersion, verdict: QualityReport, *, again: bool = False
) -> PromoteResult:
    """Make `codebook` the champion and release the tables it was evaluated on. Call with the writer lock held.

    `again` allows a codebook that was rolled back; only a person should ask for that.

    Raises:
        GateFailed: the verdict is negative, or the codebook was rolled back.
        PromotionConflict: the champion is not the one the verdict compared with, or a table has changed since.
        RegistryMismatch, CodebookError: its IDs are another codebook's, or its files are gone or damaged.
    """
    history = releases(warehouse.root)
    rolled_back_from = rolled_back(history).get(codebook.number)
    if rolled_back_from is not None and not again:
        raise GateFailed(
            f"codebook version {codebook.number} was rolled back (from release {rolled_back_from}), expected another "
            "one. The champion stays; new items or settings give a new fit, "
            f"`sid promote {codebook.number}` takes this one all the same"
        )
    if not verdict.passed:
        raise GateFailed(
            f"codebook version {codebook.number} did not pass the gate: {'; '.join(verdict.reasons)}. The champion "
            "stays; change the data or the fit, or the limits under gate.* if they are wrong for your catalogue"
        )
    present = versions_to_evaluate(warehouse, codebook.number)
    if dict(verdict.table_versions) != present:
        raise PromotionConflict(
            f"the verdict is about table versions {dict(verdict.table_versions)}, the tables are at {present}; "
            "expected no change in between. Run `sid evaluate` again"
        )
    current = history[0] if history else None
    champion = current.codebook_version if current else None
    if (
        current
        and (champion, current.codebook_hash) == (codebook.number, codebook.hash)
        and dict(current.table_versions) == present
    ):
        restore_ctr_champion(registry, codebook.hash)  # a kill may have come between the release and this
        return PromoteResult(current, nothing_to_do=True)
    if champion not in (None, codebook.number, verdict.judged_against):
        raise PromotionConflict(
            f"the champion is version {champion}, the verdict compared with {verdict.judged_against or 'no champion'}; "
            "expected the same. Run `sid evaluate` again"
        )
    # Do not promote a codebook that cannot be used.
    check_hashes(warehouse.root, codebook)
    codebook_files(registry, codebook)
    # After a kill between these two writes, the next command restores the alias and the next night promotes again.
    registry.codebooks.set_alias(CHAMPION, codebook.number)
    release = write_release(warehouse, current, codebook.number, codebook.hash, present, PROMOTED)
    restore_ctr_champion(registry, codebook.hash)
    return PromoteResult(release)


def rollback(warehouse: Warehouse, registry: Registry, to: int | None = None) -> RollbackResult:
    """Make an earlier release the current one again, with its codebook as champion and its table versions.

    Without `to`, that is the newest release of another codebook that was not itself rolled back. Nothing is encoded or
    evaluated and no ID changes. Call with the writer lock held.

    Raises:
        NoWayBack: there is no such release, or its tables are gone, or the registry has not its codebook.
        RegistryMismatch, CodebookError: the codebook's files are gone or damaged.
    """
    current, target = _find_target(releases(warehouse.root), to)
    codebook = _check_target(warehouse, registry, target)
    left_version = None
    if target is not current:
        # After a kill between these writes, the same command starts from the same release and repeats them.
        if current.codebook_version != target.codebook_version:
            left_version = current.codebook_version
        registry.codebooks.set_alias(CHAMPION, codebook.number)
        current = write_release(warehouse, current, codebook.number, codebook.hash, target.table_versions, ROLLED_BACK)
    ctr = restore_ctr_champion(registry, target.codebook_hash)
    return RollbackResult(
        release=current,
        left_version=left_version,
        ctr_version=ctr.number if ctr else None,
        items_without_id=count_items_without_id(warehouse, target),
        nothing_to_do=target is current,
    )


def _find_target(history: Sequence[Release], to: int | None) -> tuple[Release, Release]:
    """The current release and the one to go back to; twice the current one if that is done already."""
    if not history:
        raise NoWayBack("this warehouse has no release; expected one to go back from. Run `sid nightly` first")
    current = history[0]
    if to is None:
        if current.status == ROLLED_BACK:
            return current, current
        excluded = {current.codebook_version, *rolled_back(history)}
        for release in history:
            if release.codebook_version not in excluded:
                return current, release
        raise NoWayBack(
            f"no release before release {current.release_id} has another codebook than version "
            f"{current.codebook_version} that was not rolled back itself; expected one. Name a release with --to, or "
            "promote another codebook: `sid promote VERSION`"
        )
    target = next((release for release in history if release.release_id == to), None)
    if target is None:
        raise NoWayBack(f"there is no release {to}; expected one of 1 to {current.release_id}")
    same = (target.codebook_version, target.table_versions) == (current.codebook_version, current.table_versions)
    return current, current if same else target


def _check_target(warehouse: Warehouse, registry: Registry, release: Release) -> CodebookVersion:
    """The codebook of a release, after a check that the codebook and the pinned tables are there."""
    version, wanted = release.codebook_version, release.codebook_hash
    remedy = (
        f"Encode and release again instead: `sid backfill --codebook {version} --all`, "
        f"`sid evaluate --codebook {version}`, `sid promote {version}`"
    )
    codebook = registry.codebooks.version(version)
    if codebook is None or codebook.hash != wanted:
        raise NoWayBack(
            f"release {release.release_id} is of codebook version {version} with hash {wanted[:12]}, the registry "
            f"has {codebook.hash[:12] if codebook else 'no such version'}; expected the same. If the registry was "
            "lost, run `sid register`; else name another release with --to"
        )
    codebook_files(registry, codebook)
    if problem := missing_data(warehouse, release):
        raise NoWayBack(f"{problem} {remedy}")
    return codebook
