"""What is lost, damaged or vacuumed under a warehouse on real Spark, Delta and MLflow, and the night after it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
from deltalake import DeltaTable
from mlflow import MlflowClient
from warehouse import DIM, ITEMS, WITHOUT_TRAINING, SmallWarehouse

from jobs.models.registry import CANDIDATE, CHAMPION, CODEBOOK_MODEL, open_registry
from jobs.models.versions import RegistryMismatch
from jobs.warehouse.tables import ITEM_EMBEDDINGS, SEMANTIC_IDS
from pipelines.lineage import status_facts
from pipelines.nightly import Night
from pipelines.promote import NoWayBack, PromoteResult, rollback
from pipelines.register import register
from tokenizer import CodebookError

NEXT, DUE = date(2026, 1, 2), date(2026, 3, 1)
HALVED = "gate.max_rmse_ratio=0.5"  # a gate that no candidate passes: it must halve the RMSE


def assert_refused(small: SmallWarehouse, kind: type[Exception], message: str) -> None:
    """A night stops with this error and has written nothing."""
    before, codebooks = small.versions(), list(small.registry.codebooks.registered())
    with pytest.raises(kind, match=message):
        small.night(NEXT, WITHOUT_TRAINING)
    assert small.versions() == before
    assert list(small.registry.codebooks.registered()) == codebooks


def tensors_of(small: SmallWarehouse, codebook_hash: str) -> Path:
    return small.root / "codebooks" / codebook_hash / "codebook.safetensors"


def test_an_alias_that_is_gone_is_put_back_and_nothing_is_fitted(small: SmallWarehouse) -> None:
    small.registry.client.delete_registered_model_alias(CODEBOOK_MODEL, CHAMPION)
    facts = status_facts(str(small.root), small.registry)
    assert facts["champion_version"] == 1
    assert facts["registry"] == "alias champion is missing; the next command that writes puts it back to version 1"
    night = small.night(NEXT, WITHOUT_TRAINING)
    assert night.nothing_to_do
    assert night.refit_because is None
    assert small.registry.codebooks.alias(CHAMPION) == 1
    assert status_facts(str(small.root), small.registry)["registry"] is None


def test_a_damaged_codebook_stops_the_night(small: SmallWarehouse) -> None:
    tensors = tensors_of(small, small.release.codebook_hash)
    content = tensors.read_bytes()
    tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert_refused(small, CodebookError, f"codebooks/{tensors.parent.name} in the warehouse cannot be used")


def test_rows_of_another_codebook_stop_the_night(small: SmallWarehouse) -> None:
    path = small.tables.path(SEMANTIC_IDS)
    small.tables.spark.sql(f"UPDATE delta.`{path}` SET codebook_hash = '{'f' * 64}' WHERE item_id = '7'")
    assert_refused(small, RegistryMismatch, f"semantic_ids of codebook version 1 carry hash {'f' * 12}")


def test_a_lost_registry_is_registered_anew_and_the_next_night_goes_on(small: SmallWarehouse) -> None:
    """Artefacts and all: the warehouse has what it takes. An empty store takes the place of the lost one."""
    shutil.rmtree(small.root / "mlflow_artifacts")
    small.tracking_uri = f"sqlite:///{small.root}/other.db"
    MlflowClient(small.tracking_uri).create_experiment("semantic-ids", artifact_location=f"{small.root}/other")
    small.registry = open_registry(small.config(), str(small.root))
    assert_refused(small, RegistryMismatch, "no codebook of this warehouse; .*sid register")
    assert "sid register" in status_facts(str(small.root), small.registry)["registry"]
    assert register(small.config(), small.registry, lambda _: None).registered == (1,)
    night = small.night(NEXT, WITHOUT_TRAINING)
    assert night.refit_because is None
    assert small.release.codebook_version == 1
    assert night.encoded.nothing_to_do


# ---- after a night whose candidate did not pass the gate ----


@pytest.fixture(scope="module")
def failed(
    first: tuple[SmallWarehouse, Night], tmp_path_factory: pytest.TempPathFactory
) -> tuple[SmallWarehouse, Night]:
    """A warehouse after a night of forty new items and a refit that does not pass, and that night. Read only."""
    small = first[0].copy(tmp_path_factory.mktemp("failed") / "warehouse")
    small.write_items(ITEMS + 40)
    return small, small.night(DUE, HALVED)


@pytest.fixture
def copy(failed: tuple[SmallWarehouse, Night], tmp_path: Path) -> SmallWarehouse:
    return failed[0].copy(tmp_path / "warehouse")


@pytest.mark.slow
def test_a_failing_candidate_withholds_no_new_item(failed: tuple[SmallWarehouse, Night]) -> None:
    small, night = failed
    assert night.refit_because is not None
    assert "due for a refit" in night.refit_because
    assert night.gate_message is not None
    assert "rmse is" in night.gate_message.lower()
    assert "The champion stays" in night.gate_message
    assert small.registry.codebooks.alias(CHAMPION) == 1
    assert night.fitted is not None
    assert night.fitted.codebook.number == 2
    assert night.trained is None
    assert night.release == small.release
    assert small.release.codebook_version == 1
    ids = small.tables.read(SEMANTIC_IDS, small.release.table_versions[SEMANTIC_IDS.name])
    assert ids.where("codebook_version = 1").count() == ITEMS + 40


@pytest.mark.slow
def test_the_same_night_again_neither_fits_nor_releases(
    copy: SmallWarehouse, failed: tuple[SmallWarehouse, Night]
) -> None:
    before = copy.versions()
    again = copy.night(DUE, HALVED, WITHOUT_TRAINING)
    assert again.gate_message == failed[1].gate_message
    assert again.fitted is not None
    assert again.fitted.nothing_to_do
    assert copy.versions() == before
    # Nor does it where the source was exported again with the same rows, which gives the table a new version.
    copy.write_items(ITEMS + 40)
    exported = copy.night(DUE, HALVED, WITHOUT_TRAINING)
    assert copy.versions()[ITEM_EMBEDDINGS.name] > before[ITEM_EMBEDDINGS.name]
    assert exported.fitted is not None
    assert exported.fitted.nothing_to_do
    # Nor does a night that no refit is due in, though another codebook's IDs came since.
    assert copy.night(NEXT, WITHOUT_TRAINING).promoted == PromoteResult(copy.release, nothing_to_do=True)


@pytest.mark.slow
def test_the_command_of_such_a_night_exits_with_3_and_its_json_says_which_gate(copy: SmallWarehouse) -> None:
    written = copy.root / "facts.json"
    command = [sys.executable, "-m", "pipelines", "nightly", "--date", str(DUE), "--warehouse", str(copy.root)]
    settings = [HALVED, f"load.source={copy.vectors}", "fit.components=16", "spark.master=local[2]"]
    options = [*(part for setting in settings for part in ("--set", setting)), "--json", str(written)]
    done = subprocess.run([*command, *options], check=False, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert "gate: " in done.stderr
    told = json.loads(written.read_text())
    assert (told["verdict"], told["champion_version"], told["ctr_verdict"]) == ("failed", 1, None)
    assert "rmse" in " ".join(told["reasons"]).lower()


def files(small: SmallWarehouse) -> set[Path]:
    return set(small.root.rglob("*.parquet"))


@pytest.mark.slow
def test_a_default_vacuum_removes_nothing_that_is_pinned(copy: SmallWarehouse) -> None:
    """As if every file had been made years ago."""
    before = files(copy)
    for file in (*before, *copy.root.rglob("*.json")):
        os.utime(file, (1.7e9, 1.7e9))
    for table in (ITEM_EMBEDDINGS, SEMANTIC_IDS):
        assert DeltaTable(copy.tables.path(table)).vacuum(dry_run=True) == []
        copy.tables.spark.sql(f"VACUUM delta.`{copy.tables.path(table)}`").collect()
    assert files(copy) == before


@pytest.mark.slow
def test_after_a_forced_vacuum_the_current_release_is_whole(copy: SmallWarehouse) -> None:
    """By Spark of one table, by delta-rs of the other."""
    spark, before = copy.tables.spark, files(copy)
    copy.x[3] = -copy.x[3]  # its file is written anew, so that the former one is unused
    copy.write_items(ITEMS + 40)
    assert copy.night(NEXT, WITHOUT_TRAINING).gate_message is None
    check = "spark.databricks.delta.retentionDurationCheck.enabled"
    spark.conf.set(check, "false")
    try:
        spark.sql(f"VACUUM delta.`{copy.tables.path(ITEM_EMBEDDINGS)}` RETAIN 0 HOURS").collect()
    finally:
        spark.conf.unset(check)
    ids = DeltaTable(copy.tables.path(SEMANTIC_IDS))
    ids.vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
    removed = {file.relative_to(copy.root).parts[0] for file in before - files(copy)}
    assert removed == {ITEM_EMBEDDINGS.name, SEMANTIC_IDS.name}

    release = copy.release
    assert status_facts(str(copy.root), copy.registry)["release"] == release.release_id
    rows = copy.tables.read(SEMANTIC_IDS, release.table_versions[SEMANTIC_IDS.name]).where("codebook_version = 1")
    assert len({row["semantic_id"] for row in rows.collect()}) == ITEMS + 40
    vectors = copy.tables.read(ITEM_EMBEDDINGS, release.table_versions[ITEM_EMBEDDINGS.name])
    assert {len(row["embedding"]) for row in vectors.collect()} == {4 * DIM}
    assert copy.night(NEXT, WITHOUT_TRAINING).nothing_to_do
    with pytest.raises(
        NoWayBack, match=r"files of .* version .*, which release 1 pins, are gone.*sid backfill --codebook"
    ):
        rollback(copy.tables, copy.registry, to=1)


def test_a_rollback_onto_a_codebook_that_cannot_be_read_moves_nothing(
    refitted: tuple[SmallWarehouse, Night], tmp_path: Path
) -> None:
    small = refitted[0].copy(tmp_path / "warehouse")
    current, before = small.release, small.registry.codebooks.version(1)
    assert before is not None
    tensors = tensors_of(small, before.hash)
    content = tensors.read_bytes()
    tensors.write_bytes(b"no tensors")
    with pytest.raises(CodebookError, match="cannot be used"):
        rollback(small.tables, small.registry)
    assert small.registry.codebooks.alias(CHAMPION) == 2
    assert small.release == current
    tensors.write_bytes(content)
    assert rollback(small.tables, small.registry).release.codebook_version == 1
    assert small.registry.codebooks.alias(CANDIDATE) is not None
