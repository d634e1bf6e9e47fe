"""The champion follows the releases; errors where registry, rows or alias say otherwise. Without Spark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from delta_rows import add_codebook, registry_at, tags_of, write_ids, write_releases

from jobs.config import ConfigError
from jobs.models.champion import restore_champion
from jobs.models.registry import CHAMPION, CODEBOOK_MODEL, CTR_MODEL, Registry, register_lost, warehouse_id
from jobs.models.versions import WAREHOUSE_TAG, RegistryMismatch
from jobs.read_config import load_config
from jobs.warehouse.delta_rs import hashes_by_codebook_version
from jobs.warehouse.releases import PROMOTED

A, B, C = "a" * 64, "b" * 64, "c" * 64


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return registry_at(tmp_path)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow puts the artefacts of a store that says no place for them into the working folder."""
    monkeypatch.chdir(tmp_path)


def champion(registry: Registry) -> int | None:
    model, _ = restore_champion(registry, verify_files=False)
    return model.number if model else None


def test_hashes_of_rows_by_version(registry: Registry) -> None:
    assert hashes_by_codebook_version(registry.root) == {}
    write_ids(registry.root, (1, A), (1, A), (2, B))
    write_ids(registry.root, (1, C))
    assert hashes_by_codebook_version(registry.root) == {1: {A[:32], C[:32]}, 2: {B[:32]}}


def test_no_statistics_in_the_log_no_difference(registry: Registry) -> None:
    write_ids(registry.root, (1, A), (1, C), (2, B))
    log = Path(registry.root, "semantic_ids", "_delta_log", "00000000000000000000.json")
    actions = [json.loads(line) for line in log.read_text().splitlines()]
    for action in actions:
        action.get("add", {}).pop("stats", None)
    log.write_text("\n".join(json.dumps(action) for action in actions))
    assert hashes_by_codebook_version(registry.root) == {1: {A[:32], C[:32]}, 2: {B[:32]}}


def test_before_the_first_release_there_is_none(registry: Registry) -> None:
    assert champion(registry) is None
    add_codebook(registry, A)
    write_ids(registry.root, (1, A))
    assert champion(registry) is None
    registry.codebooks.set_alias(CHAMPION, 1)  # a first promotion, killed before its release was written
    assert champion(registry) == 1


@pytest.mark.parametrize(
    ("named", "change"),
    [(None, "was missing"), (2, "named version 2"), (1, None)],
    ids=["removed", "moved", "as it should be"],
)
def test_the_alias_follows_the_release(registry: Registry, named: int | None, change: str | None) -> None:
    add_codebook(registry, A)
    add_codebook(registry, B)
    write_releases(registry.root, (1, A, PROMOTED))
    write_ids(registry.root, (1, A), (2, B))
    if named is not None:
        registry.codebooks.set_alias(CHAMPION, named)
    _, message = restore_champion(registry, verify_files=False)
    assert registry.codebooks.alias(CHAMPION) == 1
    assert message == (
        f"alias champion {change}; put back to version 1, which the current release is of" if change else ""
    )
    assert restore_champion(registry, verify_files=False)[1] == ""


def test_a_lost_registry_is_a_sentence_before_and_after_the_first_release(registry: Registry) -> None:
    write_ids(registry.root, (1, A))
    with pytest.raises(RegistryMismatch, match=r"has IDs of codebook versions \[1\].*no codebook.*sid register"):
        champion(registry)
    write_releases(registry.root, (1, A, PROMOTED))
    with pytest.raises(
        RegistryMismatch, match=r"release 1 is of codebook version 1 with hash aaaaaaaaaaaa, .*sid register"
    ):
        champion(registry)
    assert registry.codebooks.registered() == {}


def test_another_codebook_under_the_number_is_a_sentence(registry: Registry) -> None:
    add_codebook(registry, B)
    write_releases(registry.root, (1, A, PROMOTED))
    write_ids(registry.root, (1, A))
    with pytest.raises(
        RegistryMismatch, match=r"hash aaaaaaaaaaaa, the registry's version 1 has hash bbbbbbbbbbbb; .*sid register"
    ):
        champion(registry)
    assert registry.codebooks.alias(CHAMPION) is None


def test_rows_of_another_codebook_are_a_sentence(registry: Registry) -> None:
    add_codebook(registry, B)
    write_releases(registry.root, (1, B, PROMOTED))
    write_ids(registry.root, (1, A))
    with pytest.raises(
        RegistryMismatch, match=r"version 1 carry hash aaaaaaaaaaaa, .* is bbbbbbbbbbbb; .*sid rollback --to"
    ):
        champion(registry)


def test_a_name_on_a_shared_server_is_one_warehouse_s(tmp_path: Path) -> None:
    shared = f"mlflow.tracking_uri=sqlite:///{tmp_path}/shared.db"
    first, second = registry_at(tmp_path / "first", shared), registry_at(tmp_path / "second", shared)
    assert champion(first) is None
    add_codebook(first, A)
    registry_of_none = (
        r"semantic-id-codebook version 1 .* belongs to warehouse {}, this warehouse is {}; "
        r".*--set mlflow\.catalogue=NAME"
    )
    ids = [warehouse_id(registry.root) for registry in (first, second)]
    assert ids[0] != ids[1]
    with pytest.raises(RegistryMismatch, match=registry_of_none.format(*ids)):
        champion(second)
    assert champion(first) is None

    named = registry_at(tmp_path / "second", shared, "mlflow.catalogue=shoes")
    assert champion(named) is None
    assert (add_codebook(named, B).name, add_codebook(named, C).number) == ("semantic-id-codebook-shoes", 2)
    assert {n: version.warehouse for n, version in named.codebooks.registered().items()} == {1: ids[1], 2: ids[1]}
    assert list(first.codebooks.registered()) == [1]
    third = registry_at(tmp_path / "third", shared, "mlflow.catalogue=shoes")
    with pytest.raises(RegistryMismatch, match=r"\(mlflow\.catalogue is 'shoes'\)"):
        champion(third)


@pytest.mark.parametrize("model", [CODEBOOK_MODEL, CTR_MODEL])
def test_untagged_versions_are_ours_where_our_tables_know_their_hash(tmp_path: Path, model: str) -> None:
    registry = registry_at(tmp_path, f"mlflow.tracking_uri=sqlite:///{tmp_path}/shared.db")
    if model == CODEBOOK_MODEL:
        version = add_codebook(registry, A)
    else:
        with registry.run("train", load_config(), {}):
            version = register_lost(registry, model, tags_of(A))
    registry.client.delete_model_version_tag(version.name, "1", WAREHOUSE_TAG)
    with pytest.raises(RegistryMismatch, match=r"belongs to warehouse unknown .*set its tag warehouse_id="):
        champion(registry)
    write_ids(registry.root, (1, A))
    if model == CODEBOOK_MODEL:
        assert champion(registry) is None
    write_releases(registry.root, (1, A, PROMOTED))
    if model == CODEBOOK_MODEL:
        assert champion(registry) == 1


def test_the_default_store_is_one_warehouse_s_whatever_the_tags(registry: Registry) -> None:
    """A copy of a warehouse, or one from before versions had tags; its names stay as they are."""
    add_codebook(registry, A)
    registry.client.set_model_version_tag(CODEBOOK_MODEL, "1", WAREHOUSE_TAG, "another")
    assert champion(registry) is None
    assert registry_at(Path(registry.root), "mlflow.catalogue=shoes").name(CODEBOOK_MODEL) == "semantic-id-codebook"


def test_a_warehouse_has_one_id(tmp_path: Path) -> None:
    made = warehouse_id(str(tmp_path))
    assert len(made) == 32
    assert warehouse_id(str(tmp_path)) == warehouse_id(tmp_path.as_uri()) == made
    assert json.loads((tmp_path / "warehouse.json").read_text()) == {"id": made, "format": 1}


def test_a_catalogue_is_a_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mlflow\.catalogue"):
        load_config(overrides=["mlflow.catalogue=a/b"])
