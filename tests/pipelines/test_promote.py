"""Rollback and promotion on real Spark, Delta and MLflow: interrupted, done, again, the night after, and back."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from warehouse import ITEMS, WITHOUT_TRAINING, SmallWarehouse

import pipelines.promote
from jobs import evaluate
from jobs.files.filesystem import filesystem_of
from jobs.models.registry import CHAMPION
from jobs.models.versions import CodebookVersion
from jobs.warehouse.releases import ROLLED_BACK, Release, releases, rolled_back
from jobs.warehouse.reports import report
from jobs.warehouse.tables import ITEM_EMBEDDINGS, RELEASES, SEMANTIC_IDS, Table
from pipelines.nightly import Night
from pipelines.promote import GateFailed, NoWayBack, RollbackResult, promote, rollback


@dataclass(frozen=True)
class RolledBack:
    """A warehouse after a rollback from codebook 2 to codebook 1; ten items have IDs under codebook 2 only."""

    small: SmallWarehouse  # read only: tests change a copy
    before: list[Release]  # the newest first
    versions: dict[str, int]  # of the tables, before
    result: RollbackResult

    @property
    def target(self) -> Release:
        """The release whose codebook and table versions came back."""
        return next(release for release in self.before if release.codebook_version == 1)


@pytest.fixture(scope="module")
def done(refitted: tuple[SmallWarehouse, Night], tmp_path_factory: pytest.TempPathFactory) -> RolledBack:
    """Interrupted before its last write, then run again."""
    small = refitted[0].copy(tmp_path_factory.mktemp("rolled back") / "warehouse")
    small.write_items(ITEMS + 60)
    small.night(date(2026, 2, 12), WITHOUT_TRAINING)
    before, versions = releases(str(small.root)), small.versions()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines.promote, "write_release", interrupted)
        with pytest.raises(KeyboardInterrupt):
            rollback(small.tables, small.registry)
    assert releases(str(small.root)) == before
    return RolledBack(small, before, versions, rollback(small.tables, small.registry))


@pytest.fixture
def small(done: RolledBack, tmp_path: Path) -> SmallWarehouse:
    """A copy of the warehouse after the rollback, to change."""
    return done.small.copy(tmp_path / "warehouse")


def codebook(small: SmallWarehouse, number: int) -> CodebookVersion:
    version = small.registry.codebooks.version(number)
    assert version is not None
    return version


def test_a_rollback_releases_the_old_codebook_with_its_tables(done: RolledBack) -> None:
    newest, last = releases(str(done.small.root))[0], done.before[0]
    assert (last.codebook_version, done.target.codebook_version) == (2, 1)
    assert (newest.release_id, newest.previous, newest.status) == (last.release_id + 1, last.release_id, ROLLED_BACK)
    assert (newest.codebook_version, newest.codebook_hash) == (1, done.target.codebook_hash)
    assert newest.table_versions == done.target.table_versions
    assert done.result.release == newest
    assert (done.result.left_version, done.result.nothing_to_do, done.result.items_without_id) == (2, False, 10)
    assert done.small.registry.codebooks.alias(CHAMPION) == 1


def test_a_rollback_writes_neither_an_id_nor_a_vector(done: RolledBack) -> None:
    after = done.small.versions()
    assert {name: after[name] for name in after if name != RELEASES.name} == {
        name: done.versions[name] for name in after if name != RELEASES.name
    }


def test_a_rollback_again_does_nothing(small: SmallWarehouse, done: RolledBack) -> None:
    for to in (None, done.target.release_id):
        again = rollback(small.tables, small.registry, to)
        assert (again.release, again.nothing_to_do) == (done.result.release, True)
    assert small.versions() == done.small.versions()


def test_there_is_no_way_to_a_release_that_never_was(small: SmallWarehouse, done: RolledBack) -> None:
    with pytest.raises(
        NoWayBack, match=f"there is no release 99; expected one of 1 to {done.result.release.release_id}"
    ):
        rollback(small.tables, small.registry, to=99)


def test_no_night_promotes_what_was_rolled_back(small: SmallWarehouse) -> None:
    verdict = report(str(small.root), 2)
    assert verdict is not None
    assert verdict.passed
    with pytest.raises(GateFailed, match="version 2 was rolled back"):
        promote(small.tables, small.registry, codebook(small, 2), verdict)
    night = small.night(date(2026, 3, 2), WITHOUT_TRAINING)  # due by the champion's age, not by the rollback's
    assert night.refit_because is None
    assert night.release is not None
    assert night.release.codebook_version == 1
    assert len(small.ids(1)) == ITEMS + 60
    with pytest.raises(NoWayBack, match="that was not rolled back itself"):
        rollback(small.tables, small.registry)


def test_a_person_can_promote_it_all_the_same_and_go_back(small: SmallWarehouse) -> None:
    first, second = codebook(small, 1), codebook(small, 2)
    verdict = evaluate.run(
        small.config(), small.tables, small.registry, second, first, date(2026, 3, 2), small.root / "pictures"
    )
    promoted = promote(small.tables, small.registry, second, verdict, again=True).release
    assert promoted.codebook_version == small.registry.codebooks.alias(CHAMPION) == 2
    assert 2 not in rolled_back(releases(str(small.root)))

    assert rollback(small.tables, small.registry).release == small.release
    assert small.registry.codebooks.alias(CHAMPION) == small.release.codebook_version == 1
    back = rollback(small.tables, small.registry, promoted.release_id)
    assert (back.release.codebook_version, back.left_version) == (2, 1)
    assert small.registry.codebooks.alias(CHAMPION) == 2
    excluded = rolled_back(releases(str(small.root)))
    assert 2 not in excluded  # the next night may release it
    assert 1 in excluded


@pytest.mark.parametrize("table", [ITEM_EMBEDDINGS, SEMANTIC_IDS], ids=lambda table: table.name)
def test_a_release_whose_files_are_gone_is_a_sentence(small: SmallWarehouse, table: Table) -> None:
    """As VACUUM leaves it."""
    oldest = releases(str(small.root))[-1]
    Path(filesystem_of(small.tables.files(table, oldest.table_versions[table.name])[0])[1]).unlink()
    with pytest.raises(NoWayBack, match=f"files of {table.name} version .*are gone.*sid backfill --codebook"):
        rollback(small.tables, small.registry, oldest.release_id)
