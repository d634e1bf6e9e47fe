"""The registry: aliases, the newest version, versions read back, and the commit that a run records. Without Spark."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from delta_rows import add_codebook, registry_at, tags_of

from jobs.models.registry import CANDIDATE, CHAMPION, CODEBOOK_MODEL, known_warehouse_id, register_lost
from jobs.models.versions import LOST_TAG
from jobs.read_config import load_config

JOBS = Path(__file__).parents[3] / "jobs"


@pytest.mark.parametrize("ours", [True, False])
def test_a_commit_is_recorded_only_of_this_project(tmp_path: Path, ours: bool) -> None:
    """The packages inside a repository: tracked there with our setup.cfg, or only lying in somebody else's."""

    def git(*arguments: str) -> str:
        named = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *named, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    for package in ("jobs", "tokenizer"):
        shutil.copytree(JOBS.parent / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(JOBS.parent / "setup.cfg", tmp_path / "setup.cfg")
    (tmp_path / "notes.txt").write_text("somebody's own\n")
    git("init", "-q")
    git("add", "." if ours else "notes.txt")
    git("commit", "-qm", "first")
    code = "from jobs.models.registry import _git_commit; print(_git_commit())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (git("rev-parse", "HEAD") if ours else "")


def test_an_alias_names_one_version_at_a_time(tmp_path: Path) -> None:
    registry = registry_at(tmp_path)
    assert registry.codebooks.alias(CHAMPION) is None
    assert registry.codebooks.with_alias(CHAMPION) is None
    for codebook_hash in ("a", "b"):
        add_codebook(registry, codebook_hash)
    assert registry.codebooks.alias(CHAMPION) is None
    for number, codebook_hash in ((2, "b"), (1, "a"), (1, "a")):
        registry.codebooks.set_alias(CHAMPION, number)
        champion = registry.codebooks.with_alias(CHAMPION)
        assert champion is not None
        assert (registry.codebooks.alias(CHAMPION), champion.number, champion.hash) == (number, number, codebook_hash)
    assert registry.codebooks.alias(CANDIDATE) is None
    assert registry.ctr_models.alias(CHAMPION) is None


def test_versions_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """Of the numbers, not of their text: 10 comes after 9."""
    registry = registry_at(tmp_path)
    assert registry.codebooks.newest(lambda _: True) is None
    with registry.run("fit", load_config(), {}):
        for number in range(1, 12):
            lost = register_lost(registry, CODEBOOK_MODEL, tags_of(str(number), fit_key=f"key {number % 2}"))
            if number != 11:
                registry.client.delete_model_version_tag(lost.name, str(number), LOST_TAG)
    assert list(registry.codebooks.versions()) == list(range(1, 11))  # the files of 11 are gone
    assert list(registry.codebooks.registered()) == list(range(1, 12))
    newest = registry.codebooks.newest(lambda version: version.fit_key == "key 0")
    assert newest is not None
    assert newest.number == 10
    assert registry.codebooks.newest(lambda version: version.fit_key == "another") is None


def test_a_registered_version_is_read_back(tmp_path: Path) -> None:
    registry = registry_at(tmp_path)
    added = add_codebook(registry, "a" * 64)
    version = registry.codebooks.version(added.number)
    assert version is not None
    assert (version.number, version.name, version.run_id) == (1, CODEBOOK_MODEL, added.run_id)
    assert version.tags() == tags_of("a" * 64)
    assert added.warehouse == known_warehouse_id(registry.root)
    assert registry.codebooks.version(2) is None
