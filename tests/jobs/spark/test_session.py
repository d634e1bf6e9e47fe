"""Starting Spark in a command of its own: whose settings it has, who can see them, and what it leaves behind."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from data import topics, write_vectors

from jobs.spark import session

CORE_SITE = (
    "<configuration><property><name>fs.defaultFS</name><value>hdfs://nowhere:8020</value></property></configuration>"
)
SECRETS = ["Zq9'PLANTED \\u00e9=#: x", "PLANTED-token-1234567", "PLANTEDpassword"]
COMMAND = """
import json, os, sys
from pathlib import Path
from jobs.read_config import load_config
from jobs.spark.session import spark_session

folder, secret = sys.argv[1:]
properties = {"spark.hadoop.fs.s3a.secret.key": secret, "spark.driver.extraJavaOptions": "-Dtheirs=1"}
config = load_config(overrides=["spark.master=local[1]", "spark.driver_memory=1g"])
config = config.model_copy(update={"spark": config.spark.model_copy(update={"conf": properties})})
with spark_session(config) as session:
    context = session.spark.sparkContext
    java = Path(f"/proc/{context._gateway.proc.pid}")
    session.spark.range(5).write.format("delta").save(f"{folder}/delta")
    print(json.dumps({
        "arrived": context._jsc.hadoopConfiguration().get("fs.s3a.secret.key"),
        "theirs": session.spark._jvm.java.lang.System.getProperty("theirs"),
        "python": context.pythonExec,
        "rows": session.spark.read.format("delta").load(f"{folder}/delta").count(),
        "visible": secret in java.joinpath("cmdline").read_text() + java.joinpath("environ").read_text(),
        "modes": sorted({oct(path.stat().st_mode & 0o77) for path in Path(os.environ["TMPDIR"]).iterdir()}),
    }))
"""


def test_java_gets_its_own_settings_privately_and_leaves_nothing(tmp_path: Path) -> None:
    for name in ("tmp", "cwd", "hadoop", "conf", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "hadoop" / "core-site.xml").write_text(CORE_SITE)
    (tmp_path / "conf" / "spark-defaults.conf").write_text("spark.sql.extensions no.such.Extension\n")
    foreign = {
        "TMPDIR": str(tmp_path / "tmp"),
        "HADOOP_CONF_DIR": str(tmp_path / "hadoop"),
        "SPARK_CONF_DIR": str(tmp_path / "conf"),
        "SPARK_HOME": str(tmp_path / "no-spark"),
        "PYSPARK_PYTHON": "/usr/bin/no-python",
        "JAVA_HOME": str(tmp_path / "no-java"),
    }
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, str(tmp_path / "out"), SECRETS[0]],
        env={**os.environ, **foreign},
        cwd=tmp_path / "cwd",
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "arrived": SECRETS[0],
        "theirs": "1",
        "python": sys.executable,
        "rows": 5,
        "visible": False,
        "modes": ["0o0"],
    }
    assert "PLANTED" not in done.stderr
    for name in ("HADOOP_CONF_DIR", "SPARK_CONF_DIR", "SPARK_HOME", "PYSPARK_PYTHON", "JAVA_HOME"):
        assert f"sid: {name}" in done.stderr
    assert list((tmp_path / "tmp").iterdir()) == []
    assert list((tmp_path / "cwd").iterdir()) == []


def test_what_a_killed_command_left_is_removed_and_what_is_in_use_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, used = (tmp_path / f"{session.SCRATCH}{name}" for name in ("left", "used"))
    for folder in (left, used):
        folder.mkdir()
        (folder / session.LOCK).touch()
        (folder / "blockmgr").mkdir()
    with open(used / session.LOCK) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        own = session._scratch.__wrapped__()
        assert set(tmp_path.iterdir()) == {used, own}
    assert (used / "blockmgr").is_dir()


@pytest.mark.slow
def test_a_night_writes_and_prints_no_credential(tmp_path: Path) -> None:
    """Planted in a Spark property whose name says so, and as the password of a URI in one whose name does not."""
    root = tmp_path / "w"
    source = write_vectors(tmp_path / "v.parquet", list(range(120)), text_embedding=topics(120, 8))
    (tmp_path / "secret.toml").write_text(
        f'[spark.conf]\n"spark.hadoop.fs.s3a.secret.key" = "{SECRETS[1]}"\n'
        f'"spark.hadoop.javax.jdo.option.ConnectionURL" = "jdbc:mysql://ann:{SECRETS[2]}@db/x"\n'
    )
    settings = [
        f"load.source={source}",
        "fit.components=8",
        "spark.master=local[2]",
        "spark.driver_memory=1g",
        "gate.max_collision_share=1",
    ]
    command = [
        sys.executable,
        "-m",
        "pipelines",
        "nightly",
        "--warehouse",
        str(root),
        "--config",
        str(tmp_path / "secret.toml"),
    ]
    flags = [flag for setting in settings for flag in ("--set", setting)]
    done = subprocess.run(
        [*command, *flags, "--json", str(tmp_path / "facts.json")],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "PLANTED" not in done.stdout + done.stderr + (tmp_path / "facts.json").read_text()
    configs = list(root.rglob("config.json"))
    assert configs
    assert all('"spark.hadoop.fs.s3a.secret.key": "***"' in path.read_text() for path in configs)
    assert [path for path in root.rglob("*") if path.is_file() and b"PLANTED" in path.read_bytes()] == []
