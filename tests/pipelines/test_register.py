"""register: versions come back under their numbers with what later commands need, whatever is gone. Without Spark."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from data import topics
from delta_rows import registry_at, tags_of, write_ids, write_releases

from jobs.models.champion import current_champion
from jobs.models.codebooks import register_codebook
from jobs.models.registry import CANDIDATE, CHAMPION, Registry
from jobs.models.versions import LOST_TAG, RegistryMismatch
from jobs.read_config import load_config
from jobs.warehouse.releases import PROMOTED, ROLLED_BACK
from pipelines.register import RegisterResult, register
from tokenizer import CodebookError, fit_rqgmm, save_codebook

X = torch.from_numpy(topics(60, 6))


def fitted(registry: Registry, folder: Path, seed: int, **tags: str) -> str:
    """A codebook, registered; its hash."""
    rqgmm = fit_rqgmm(X, levels=2, components=4, seed=seed).rqgmm
    name = save_codebook(
        folder / "codebook",
        rqgmm,
        {"levels": 2, "components": 4, "dim": 6, "run_date": "2026-01-01", "fit": {"method": "annealed"}},
    )
    with registry.run("fit", load_config(), {}):
        register_codebook(registry, folder / "codebook", tags_of(name, **tags))
    return name


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A warehouse of three codebooks, the third rolled back, and no registry any more."""
    root = tmp_path_factory.mktemp("made")
    registry = registry_at(root)
    names = [fitted(registry, root / "scratch", seed, fit_key=f"key-{seed}") for seed in range(3)]
    write_releases(registry.root, (1, names[0], PROMOTED), (3, names[2], PROMOTED), (1, names[0], ROLLED_BACK))
    write_ids(registry.root, *((number, name) for number, name in enumerate(names, 1)))
    return root, names


@pytest.fixture
def lost(made: tuple[Path, list[str]], tmp_path: Path) -> tuple[Registry, list[str]]:
    """A copy of it with a registry that has nothing."""
    root, names = made
    for part in ("codebooks", "releases", "semantic_ids", "warehouse.json"):
        (shutil.copytree if (root / part).is_dir() else shutil.copy)(root / part, tmp_path / part)
    return registry_at(tmp_path), names


def tags(registry: Registry, tag: str) -> dict[int, str | None]:
    return {number: model.tags.get(tag) for number, model in registry.codebooks.registered().items()}


def test_every_version_comes_back_as_it_was(lost: tuple[Registry, list[str]]) -> None:
    registry, names = lost
    with pytest.raises(RegistryMismatch, match="sid register"):
        current_champion(registry)
    messages: list[str] = []
    done = register(load_config(), registry, messages.append)
    assert done == RegisterResult((1, 2, 3), (), champion_version=1, candidate_version=3)
    assert tags(registry, "codebook_hash") == dict(enumerate(names, 1))
    assert tags(registry, "fit_key") == {1: "key-0", 2: "key-1", 3: "key-2"}
    assert messages[:3] == [f"version {n}: registered from codebooks/{name}" for n, name in enumerate(names, 1)]
    model = current_champion(registry)
    assert model is not None
    assert model.number == 1
    for alias, number in ((CHAMPION, 1), (CANDIDATE, 3)):
        assert registry.codebooks.alias(alias) == number
    again = register(load_config(), registry, lambda _: None)
    assert again == RegisterResult((), (), champion_version=1, candidate_version=3, nothing_to_do=True)
    assert list(registry.codebooks.registered()) == [1, 2, 3]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = mlflow.pyfunc.load_model("models:/semantic-id-codebook@champion")
    assert set(loaded.predict(np.asarray(X[:3]))["codebook_hash"]) == {names[0]}


def test_a_number_whose_codebook_is_gone_is_taken_all_the_same(lost: tuple[Registry, list[str]]) -> None:
    registry, names = lost
    shutil.rmtree(Path(registry.root, "codebooks", names[1]))
    messages: list[str] = []
    assert register(load_config(), registry, messages.append) == RegisterResult((1, 3), (2,), 1, 3)
    assert messages[1].startswith("version 2: its codebook is gone from the warehouse")
    assert tags(registry, LOST_TAG) == {1: None, 2: "its files are gone", 3: None}
    assert tags(registry, "codebook_hash")[2] == names[1][:32]  # as far as its rows tell
    assert register(load_config(), registry, lambda _: None).nothing_to_do


def test_without_what_was_written_down_the_manifest_says_it(lost: tuple[Registry, list[str]]) -> None:
    registry, names = lost
    for noted in Path(registry.root, "codebooks").glob("*/versions.json"):
        noted.unlink()
    assert register(load_config(), registry, lambda _: None).registered == (1, 2, 3)
    assert tags(registry, "codebook_hash") == dict(enumerate(names, 1))
    for tag, value in {
        "levels": "2",
        "components": "4",
        "dim": "6",
        "run_date": "2026-01-01",
        "method": "annealed",
        "started_from": "",
    }.items():
        assert set(tags(registry, tag).values()) == {value}


@pytest.mark.parametrize("how", ["damaged", "gone"])
def test_without_the_champion_s_codebook_nothing_is_registered(lost: tuple[Registry, list[str]], how: str) -> None:
    registry, names = lost
    folder = Path(registry.root, "codebooks", names[0])
    if how == "damaged":
        (folder / "codebook.safetensors").write_bytes(b"no tensors")
    else:
        shutil.rmtree(folder)
    kind, message = (
        (CodebookError, "cannot be used") if how == "damaged" else (RegistryMismatch, "nothing was registered")
    )
    with pytest.raises(kind, match=message):
        register(load_config(), registry, lambda _: None)
    assert registry.codebooks.registered() == {}


def test_a_number_that_another_codebook_has_is_a_sentence(lost: tuple[Registry, list[str]], tmp_path: Path) -> None:
    registry, names = lost
    other = fitted(registry, tmp_path / "scratch", seed=9)
    message = f"version 1 in the registry has hash {other[:12]}, the warehouse's codebook version 1 has {names[0][:12]}"
    with pytest.raises(RegistryMismatch, match=message):
        register(load_config(), registry, lambda _: None)
    assert list(registry.codebooks.registered()) == [1]


def test_a_registry_that_deleted_versions_gives_no_number_twice(lost: tuple[Registry, list[str]]) -> None:
    registry, _ = lost
    register(load_config(), registry, lambda _: None)
    registry.client.delete_model_version(registry.codebooks.name, "3")
    with pytest.raises(RegistryMismatch, match="the registry gave number 4 to codebook version 3; expected 3"):
        register(load_config(), registry, lambda _: None)
    assert list(registry.codebooks.registered()) == [1, 2]
