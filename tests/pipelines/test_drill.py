"""A fire drill on real Spark, Delta and MLflow: what is lost, damaged or swept away under a warehouse, and the night
after it.
"""

from __future__ import annotations

import os
import shutil
from datetime import date
from pathlib import Path

import pytest
from deltalake import DeltaTable
from house import DIM, ITEMS, House
from mlflow import MlflowClient
from pyspark.sql import SparkSession

from jobs.models.registry import CANDIDATE, CHAMPION, CODEBOOK_MODEL, open_registry
from jobs.models.versions import RegistryMismatch
from jobs.warehouse.releases import Release, current_release, releases
from jobs.warehouse.tables import ITEM_EMBEDDINGS, SEMANTIC_IDS, TABLES
from pipelines.lineage import status_facts
from pipelines.nightly import Night
from pipelines.promote import NoWayBack, PromoteResult, rollback
from pipelines.register import register
from tokenizer import CodebookError

DAY, NEXT, DUE = date(2026, 1, 1), date(2026, 1, 2), date(2026, 3, 1)
ALONE = "train.interactions="


@pytest.fixture(scope="module")
def drill(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> House:
    house = House(spark, tmp_path_factory.mktemp("drill"))
    house.night(DAY, ALONE)
    return house


def released(house: House) -> Release:
    release = current_release(house.warehouse.root)
    assert release is not None
    return release


def tables(house: House) -> dict[str, int]:
    return {table.name: house.warehouse.version(table) for table in TABLES}


def refused(house: House, kind: type[Exception], said: str) -> None:
    """The night stops with this sentence and has written nothing."""
    before, codebooks = tables(house), list(house.registry.codebooks.registered())
    with pytest.raises(kind, match=said):
        house.night(NEXT, ALONE)
    assert tables(house) == before
    assert list(house.registry.codebooks.registered()) == codebooks


def test_an_alias_that_is_gone_is_put_back_and_nothing_is_fitted(drill: House) -> None:
    drill.registry.client.delete_registered_model_alias(CODEBOOK_MODEL, CHAMPION)
    facts = status_facts(drill.warehouse.root, drill.registry)
    assert facts["champion_version"] == 1
    assert facts["registry"] == "alias champion is missing; the next command that writes puts it back to version 1"
    night = drill.night(NEXT, ALONE)
    assert night.nothing_to_do
    assert night.refit_because is None
    alias = drill.registry.codebooks.alias(CHAMPION)
    assert alias is not None
    assert alias == 1
    assert status_facts(drill.warehouse.root, drill.registry)["registry"] is None


def test_a_damaged_codebook_stops_the_night(drill: House) -> None:
    tensors = Path(drill.root, "codebooks", released(drill).codebook_hash, "codebook.safetensors")
    content = tensors.read_bytes()
    tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(drill, CodebookError, f"codebooks/{tensors.parent.name} in the warehouse cannot be used")
    tensors.write_bytes(content)


def test_rows_of_another_codebook_stop_the_night(drill: House, spark: SparkSession) -> None:
    path = drill.warehouse.path(SEMANTIC_IDS)
    spark.sql(f"UPDATE delta.`{path}` SET codebook_hash = '{'f' * 64}' WHERE item_id = '7'")
    refused(drill, RegistryMismatch, f"semantic_ids of codebook version 1 carry hash {'f' * 12}")
    spark.sql(f"UPDATE delta.`{path}` SET codebook_hash = '{released(drill).codebook_hash}' WHERE item_id = '7'")


def test_a_lost_registry_is_registered_anew_and_the_next_night_goes_on(drill: House) -> None:
    """Artefacts and all: what stands in the warehouse is enough. An empty store takes the place of the lost one."""
    shutil.rmtree(drill.root / "mlflow_artifacts")
    store = f"sqlite:///{drill.root}/other.db"
    MlflowClient(store).create_experiment("semantic-ids", artifact_location=f"{drill.root}/other")
    drill.settings.append(f"mlflow.tracking_uri={store}")
    drill.registry = open_registry(drill.configured(), str(drill.root))
    refused(drill, RegistryMismatch, "no codebook of this warehouse; .*sid register")
    assert "sid register" in status_facts(drill.warehouse.root, drill.registry)["registry"]
    assert register(drill.configured(), drill.registry, lambda _: None).registered == (1,)
    night = drill.night(NEXT, ALONE)
    assert night.refit_because is None
    assert released(drill).codebook_version == 1
    assert night.encoded.nothing_to_do


@pytest.fixture(scope="module")
def failed(drill: House) -> Night:
    """A night of new items whose candidate fails: a refit is due, and must halve the RMSE."""
    drill.write(ITEMS + 40)
    return drill.night(DUE, "gate.max_rmse_ratio=0.5")


def test_a_failing_candidate_withholds_no_new_item(drill: House, failed: Night) -> None:
    assert failed.gate_message is not None
    assert failed.fitted is not None
    assert failed.fitted.model.number == 2
    assert failed.trained is None
    release = released(drill)
    assert failed.release == release
    assert release.codebook_version == 1
    ids = drill.warehouse.read(SEMANTIC_IDS, release.table_versions[SEMANTIC_IDS.name])
    assert ids.where("codebook_version = 1").count() == ITEMS + 40


def test_the_same_night_again_neither_fits_nor_releases(drill: House, failed: Night) -> None:
    before = tables(drill)
    again = drill.night(DUE, "gate.max_rmse_ratio=0.5", ALONE)
    assert again.gate_message == failed.gate_message
    assert again.fitted is not None
    assert again.fitted.nothing_to_do
    assert tables(drill) == before
    # Nor does a night that no refit is due in, though another codebook's IDs came since.
    assert drill.night(NEXT, ALONE).promoted == PromoteResult(released(drill), nothing_to_do=True)


def files(house: House) -> set[Path]:
    return set(house.root.rglob("*.parquet"))


def test_a_default_vacuum_removes_nothing_that_is_pinned(drill: House, failed: Night) -> None:
    """As if every file had been made years ago."""
    before = files(drill)
    for file in (*before, *drill.root.rglob("*.json")):
        os.utime(file, (1.7e9, 1.7e9))
    for table in (ITEM_EMBEDDINGS, SEMANTIC_IDS):
        assert DeltaTable(drill.warehouse.path(table)).vacuum(dry_run=True) == []
        drill.warehouse.spark.sql(f"VACUUM delta.`{drill.warehouse.path(table)}`").collect()
    assert files(drill) == before


@pytest.mark.parametrize("engine", ["delta-rs", "spark"])
def test_after_a_forced_vacuum_the_current_release_is_whole(drill: House, failed: Night, engine: str) -> None:
    spark = drill.warehouse.spark
    before = files(drill)
    drill.x[3] = -drill.x[3]  # whose file is written anew, so that the former one is of the past
    drill.write(ITEMS + 40)
    assert drill.night(NEXT, ALONE).gate_message is None
    release = released(drill)
    check = "spark.databricks.delta.retentionDurationCheck.enabled"
    spark.conf.set(check, "false")
    try:
        for table in (ITEM_EMBEDDINGS, SEMANTIC_IDS):
            path = drill.warehouse.path(table)
            if engine == "spark":
                spark.sql(f"VACUUM delta.`{path}` RETAIN 0 HOURS").collect()
            else:
                DeltaTable(path).vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
    finally:
        spark.conf.unset(check)
    assert before - files(drill)
    assert status_facts(drill.warehouse.root, drill.registry)["release"] == release.release_id
    ids = drill.warehouse.read(SEMANTIC_IDS, release.table_versions[SEMANTIC_IDS.name]).where("codebook_version = 1")
    assert len({row["semantic_id"] for row in ids.collect()}) == ITEMS + 40
    vectors = drill.warehouse.read(ITEM_EMBEDDINGS, release.table_versions[ITEM_EMBEDDINGS.name])
    assert {len(row["embedding"]) for row in vectors.collect()} == {4 * DIM}
    assert drill.night(NEXT, ALONE).nothing_to_do
    with pytest.raises(
        NoWayBack, match=r"files of .* version .*, which release 1 pins, are gone.*sid backfill --codebook"
    ):
        rollback(drill.warehouse, drill.registry, to=1)


def test_a_rollback_onto_a_codebook_that_cannot_be_read_moves_nothing(drill: House, failed: Night) -> None:
    drill.write(ITEMS + 50)
    assert drill.night(DUE, ALONE, "gate.max_churn=1").gate_message is None
    current, target = releases(drill.warehouse.root)[:2]
    assert (current.codebook_version, target.codebook_version) == (3, 1)
    tensors = Path(drill.root, "codebooks", target.codebook_hash, "codebook.safetensors")
    content = tensors.read_bytes()
    tensors.write_bytes(b"no tensors")
    with pytest.raises(CodebookError, match="cannot be used"):
        rollback(drill.warehouse, drill.registry)
    alias = drill.registry.codebooks.alias(CHAMPION)
    assert alias is not None
    assert alias == 3
    assert released(drill) == current
    tensors.write_bytes(content)
    assert rollback(drill.warehouse, drill.registry).release.codebook_version == 1
    assert drill.registry.codebooks.alias(CANDIDATE) is not None
