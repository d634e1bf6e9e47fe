"""Codebooks in the warehouse: whole or not there, verified by hash, copied in from a registry that has them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from data import topics
from delta_rows import registry_at, tags_of, version_of

from jobs.errors import SchemaError
from jobs.models.codebooks import (
    check_recipe,
    codebook_files,
    load_files,
    read_codebook,
    store_codebook,
    store_tags,
    stored_tags,
)
from jobs.models.registry import CODEBOOK_MODEL, Registry, register
from jobs.models.versions import CodebookVersion, RegistryMismatch
from jobs.read_config import load_config
from tokenizer import CodebookError, fit_rqgmm, save_codebook

RECIPE = {
    "item_id": "item_id",
    "dims": {"text": 6},
    "weights": {"text": 1.0},
    "normalize": True,
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A codebook's folder and hash."""
    folder = tmp_path_factory.mktemp("fitted") / "codebook"
    rqgmm = fit_rqgmm(torch.from_numpy(topics(60, 6)), levels=2, components=4, seed=0).rqgmm
    return folder, save_codebook(folder, rqgmm, {"fusion": RECIPE})


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("as_uri", [False, True], ids=["folder", "uri"])
def test_a_kept_codebook_is_read_as_it_was(tmp_path: Path, fitted: tuple[Path, str], as_uri: bool) -> None:
    folder, name = fitted
    root = tmp_path.as_uri() if as_uri else str(tmp_path)
    store_codebook(root, folder, name)
    files = read_codebook(root, name)
    assert files is not None
    assert files == {file.name: file.read_bytes() for file in folder.iterdir()}
    assert load_files(files, name).hash == name
    assert sorted(path.name for path in (tmp_path / "codebooks" / name).iterdir()) == [
        "codebook.safetensors",
        "manifest.json",
    ]


def test_without_its_manifest_a_folder_does_not_count(tmp_path: Path, fitted: tuple[Path, str]) -> None:
    """As a kill between the two files leaves it."""
    folder, name = fitted
    store_codebook(str(tmp_path), folder, name)
    (tmp_path / "codebooks" / name / "manifest.json").unlink()
    assert read_codebook(str(tmp_path), name) is None
    store_codebook(str(tmp_path), folder, name)
    assert read_codebook(str(tmp_path), name) is not None


@pytest.mark.parametrize("file", ["codebook.safetensors", "manifest.json"])
def test_a_damaged_codebook_is_a_sentence(tmp_path: Path, fitted: tuple[Path, str], file: str) -> None:
    folder, name = fitted
    store_codebook(str(tmp_path), folder, name)
    flip(tmp_path / "codebooks" / name / "codebook.safetensors")
    if file == "manifest.json":
        (tmp_path / "codebooks" / name / file).write_text("{")
    files = read_codebook(str(tmp_path), name)
    assert files is not None
    with pytest.raises(CodebookError, match=f"^codebooks/{name} in the warehouse cannot be used: .*from a backup"):
        load_files(files, name)
    store_codebook(str(tmp_path), folder, name)  # a fit that ends in the same codebook writes it whole again
    files = read_codebook(str(tmp_path), name)
    assert files is not None
    assert load_files(files, name).hash == name


def test_what_a_version_was_registered_with_is_written_down_once(tmp_path: Path, fitted: tuple[Path, str]) -> None:
    folder, name = fitted
    store_codebook(str(tmp_path), folder, name)
    store_tags(str(tmp_path), version_of(name, fit_key="k"))
    store_tags(str(tmp_path), version_of(name, 3, fit_key="other"))
    store_tags(str(tmp_path), version_of(name, fit_key="later"))
    assert stored_tags(str(tmp_path)) == [
        (1, tags_of(name, fit_key="k")),
        (3, tags_of(name, fit_key="other")),
    ]
    (tmp_path / "codebooks" / name / "versions.json").write_text("{")
    with pytest.raises(CodebookError, match=r"versions\.json in codebooks/.* is damaged"):
        stored_tags(str(tmp_path))


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """On a shared store, under a name of its own."""
    monkeypatch.chdir(tmp_path)  # where MLflow puts artefacts of a store that says no other place
    return registry_at(tmp_path, f"mlflow.tracking_uri=sqlite:///{tmp_path}/shared.db", "mlflow.catalogue=shoes")


def test_a_warehouse_from_before_gets_its_codebook_from_the_registry(
    registry: Registry, fitted: tuple[Path, str]
) -> None:
    folder, name = fitted
    code = Path(check_recipe.__code__.co_filename).with_name("codebook_model.py")
    with registry.run("fit", load_config(), {}):
        former = {"codebook_hash": name, "shape": "2x4x6", "run_date": "2026-01-01", "rolled_back": "from release 2"}
        registered = CodebookVersion.of(register(registry, CODEBOOK_MODEL, code, folder, former))
    assert registered.name == "semantic-id-codebook-shoes"
    assert read_codebook(registry.root, name) is None
    assert load_files(codebook_files(registry, registered), name).hash == name
    assert read_codebook(registry.root, name) is not None
    assert stored_tags(registry.root) == [(1, tags_of(name))]
    gone = version_of("f" * 64, 9)
    with pytest.raises(RegistryMismatch, match="codebook version 9 has its files neither in codebooks/ffff"):
        codebook_files(registry, gone)


def test_a_codebook_is_for_the_recipe_it_was_fitted_on() -> None:
    fitted_on = {"fusion": RECIPE}
    check_recipe(fitted_on, version_of("a"), json.dumps(RECIPE))
    check_recipe(fitted_on, version_of("a"), json.dumps({**RECIPE, "item_id": "id", "dtype": "float16"}))
    for other in ({"dims": {"text": 8}}, {"weights": {"text": 2.0}}, {"normalize": False}, {"dims": {"image": 6}}):
        with pytest.raises(SchemaError, match=r"codebook version 1 \(hash a\) was fitted on vectors of the recipe"):
            check_recipe(fitted_on, version_of("a"), json.dumps({**RECIPE, **other}))


def test_a_codebook_is_for_vectors_of_one_order_of_blocks() -> None:
    both = {
        **RECIPE,
        "dims": {"text": 6, "image": 6},
        "weights": {"text": 1.0, "image": 1.0},
        "order": ["text", "image"],
    }
    check_recipe({"fusion": both}, version_of("a"), json.dumps(both))
    check_recipe({"fusion": {**both, "order": []}}, version_of("a"), json.dumps(both))  # made before the order was kept
    with pytest.raises(SchemaError, match="was fitted on vectors of the recipe"):
        check_recipe({"fusion": both}, version_of("a"), json.dumps({**both, "order": ["image", "text"]}))
