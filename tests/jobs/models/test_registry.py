"""What a run records of where it came from."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
