"""Rollback on real Spark, Delta and MLflow: interrupted, done, again, the nights after it, and back.

After the story of test_nightly.py, or after two nights of its own. The tests are one story too.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest
from house import ITEMS, House

import pipelines.promote
from jobs import evaluate
from jobs.files.filesystem import filesystem_of
from jobs.models.registry import CHAMPION
from jobs.models.versions import CodebookVersion
from jobs.warehouse.releases import ROLLED_BACK, Release, releases, rolled_back
from jobs.warehouse.reports import report
from jobs.warehouse.tables import ITEM_EMBEDDINGS, RELEASES, SEMANTIC_IDS, TABLES, Table
from pipelines.nightly import Night
from pipelines.promote import GateFailed, NoWayBack, RollbackResult, promote, rollback


@pytest.fixture(scope="module")
def before(house: House, first: Night) -> list[Release]:
    """The releases before the rollback, the newest first; of two codebooks, the second with ten more items."""
    if len({release.codebook_version for release in releases(house.warehouse.root)}) == 1:
        house.write(ITEMS + 50)
        house.night(date(2026, 2, 10), "train.interactions=")
    house.write(ITEMS + 60)
    house.night(date(2026, 2, 12), "train.interactions=")
    return releases(house.warehouse.root)


@pytest.fixture(scope="module")
def old(before: list[Release]) -> Release:
    """What a rollback goes back to."""
    return next(release for release in before if release.codebook_version != before[0].codebook_version)


def codebook(house: House, version: int) -> CodebookVersion:
    model = house.registry.codebooks.version(version)
    assert model is not None
    return model


def champion(house: House) -> int:
    number = house.registry.codebooks.alias(CHAMPION)
    assert number is not None
    return number


def versions(house: House) -> dict[str, int]:
    return {table.name: house.warehouse.version(table) for table in TABLES if table is not RELEASES}


@pytest.fixture(scope="module")
def done(house: House, before: list[Release], old: Release) -> RollbackResult:
    """Killed before its last write, then run again."""

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    tables = versions(house)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines.promote, "write_release", killed)
        with pytest.raises(KeyboardInterrupt):
            rollback(house.warehouse, house.registry)
    assert releases(house.warehouse.root) == before
    result = rollback(house.warehouse, house.registry)
    assert versions(house) == tables  # neither an ID nor a vector was written
    return result


def test_a_rollback_releases_the_old_codebook_with_its_tables(
    house: House, before: list[Release], old: Release, done: RollbackResult
) -> None:
    newest = releases(house.warehouse.root)[0]
    assert (newest.release_id, newest.previous, newest.status) == (
        before[0].release_id + 1,
        before[0].release_id,
        ROLLED_BACK,
    )
    assert (newest.codebook_version, newest.codebook_hash) == (old.codebook_version, old.codebook_hash)
    assert newest.table_versions == old.table_versions == done.release.table_versions
    assert (done.release.release_id, done.left_version, done.nothing_to_do) == (
        newest.release_id,
        before[0].codebook_version,
        False,
    )
    assert champion(house) == old.codebook_version
    assert done.items_without_id == 10


def test_a_rollback_again_does_nothing(house: House, old: Release, done: RollbackResult) -> None:
    for again in (rollback(house.warehouse, house.registry), rollback(house.warehouse, house.registry, old.release_id)):
        assert (again.release.release_id, again.release.codebook_version, again.nothing_to_do) == (
            done.release.release_id,
            old.codebook_version,
            True,
        )


def test_there_is_no_way_to_a_release_that_never_was(house: House, done: RollbackResult) -> None:
    with pytest.raises(NoWayBack, match=f"there is no release 99; expected one of 1 to {done.release.release_id}"):
        rollback(house.warehouse, house.registry, to=99)


def test_no_night_promotes_what_was_rolled_back(
    house: House, before: list[Release], old: Release, done: RollbackResult
) -> None:
    left = codebook(house, before[0].codebook_version)
    verdict = report(house.warehouse.root, left.number)
    assert verdict is not None
    assert verdict.passed
    with pytest.raises(GateFailed, match=f"version {left.number} was rolled back"):
        promote(house.warehouse, house.registry, left, verdict)
    night = house.night(date(2026, 3, 2), "train.interactions=")  # due by the champion's age, not by the rollback's
    assert night.refit_because is None
    assert night.release is not None
    assert night.release.codebook_version == old.codebook_version
    assert len(house.ids(old.codebook_version)) == ITEMS + 60


def test_the_next_rollback_does_not_return_to_what_was_left(house: House, done: RollbackResult) -> None:
    with pytest.raises(NoWayBack, match="that was not rolled back itself"):
        rollback(house.warehouse, house.registry)


def test_a_person_can_promote_it_all_the_same(house: House, before: list[Release], done: RollbackResult) -> None:
    left, rival = (codebook(house, release.codebook_version) for release in (before[0], done.release))
    day, pictures = date(2026, 3, 2), house.root / "pictures"
    verdict = evaluate.run(house.config, house.warehouse, house.registry, left, rival, day, pictures)
    assert promote(house.warehouse, house.registry, left, verdict, again=True).release.codebook_version == left.number
    assert champion(house) == left.number
    assert left.number not in rolled_back(releases(house.warehouse.root))


def test_there_and_back_by_number(house: House, before: list[Release], done: RollbackResult) -> None:
    there = releases(house.warehouse.root)[0]
    assert rollback(house.warehouse, house.registry).release == releases(house.warehouse.root)[0]
    assert champion(house) == done.release.codebook_version
    back = rollback(house.warehouse, house.registry, there.release_id)
    assert (back.release.codebook_version, back.left_version) == (there.codebook_version, done.release.codebook_version)
    assert champion(house) == there.codebook_version
    excluded = rolled_back(releases(house.warehouse.root))
    assert there.codebook_version not in excluded  # the next night may release it
    assert done.release.codebook_version in excluded


@pytest.mark.parametrize("table", [ITEM_EMBEDDINGS, SEMANTIC_IDS], ids=lambda table: table.name)
def test_a_release_whose_files_are_gone_is_a_sentence(house: House, done: RollbackResult, table: Table) -> None:
    """As VACUUM leaves it; the file is put back."""
    oldest = releases(house.warehouse.root)[-1]
    path = Path(filesystem_of(house.warehouse.files(table, oldest.table_versions[table.name])[0])[1])
    hidden = path.with_suffix(".hidden")
    path.rename(hidden)
    try:
        with pytest.raises(NoWayBack, match=f"files of {table.name} version .*are gone.*sid backfill --codebook"):
            rollback(house.warehouse, house.registry, oldest.release_id)
    finally:
        hidden.rename(path)
