"""The spark-submit entry: a stage runs on the given master; a JVM without Delta is an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from data import topics, write_vectors
from deltalake import DeltaTable

from jobs.spark.engine import delta_jars, find_java

pytestmark = [pytest.mark.spark, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


def submitted(tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    path = write_vectors(tmp_path / "v.parquet", list(range(50)), text_embedding=topics(50, 4))
    environment = {
        **os.environ,
        "JAVA_HOME": str(find_java()),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYSPARK_PYTHON": sys.executable,
        "SPARK_LOCAL_IP": "127.0.0.1",
    }
    command = ["spark-submit", "--master", "local[2]", *flags, str(ROOT / "infra/spark/submit.py"), "load"]
    settings = [
        "--warehouse",
        str(tmp_path / "w"),
        "--set",
        f"load.source={path}",
        "--set",
        "spark.master=spark://nowhere:7077",
    ]
    return subprocess.run(
        [*command, *settings], env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def test_a_stage_runs_under_spark_submit(tmp_path: Path) -> None:
    done = submitted(tmp_path, "--jars", ",".join(map(str, delta_jars())))
    assert done.returncode == 0, done.stderr
    assert DeltaTable(tmp_path / "w" / "item_embeddings").to_pyarrow_table().num_rows == 50


def test_a_jvm_without_delta_is_a_sentence(tmp_path: Path) -> None:
    done = submitted(tmp_path)
    assert done.returncode != 0
    assert "sid: Spark was started without the Delta jars" in done.stdout  # spark-submit joins both streams of Python
