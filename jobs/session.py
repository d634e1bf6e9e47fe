"""The one Spark session of a command: Delta on, quiet, in UTC, with the environment's own python on the workers."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

from pyspark.sql import SparkSession

from jobs.config import Config
from jobs.engine import EnvironmentProblem, delta_jars, find_java

# Right for tables of some files on one machine, wrong for a cluster, where Spark's and Delta's own defaults are good:
# fifty tasks per snapshot and ten thousand for a listing cost seconds each when there are two cores.
LOCAL_CONF = {
    "spark.sql.shuffle.partitions": "4",
    "spark.databricks.delta.snapshotPartitions": "2",
    "spark.sql.sources.parallelPartitionDiscovery.parallelism": "4",
    "spark.driver.host": "127.0.0.1",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.ui.enabled": "false",
}
CONF = {
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.execution.arrow.pyspark.enabled": "true",
    # A barrier stage (TorchDistributor) that can never get its slots must fail in seconds, not hang for minutes.
    "spark.scheduler.barrier.maxConcurrentTasksCheck.interval": "2s",
    "spark.scheduler.barrier.maxConcurrentTasksCheck.maxFailures": "2",
    "spark.ui.showConsoleProgress": "false",
}


@dataclass(frozen=True)
class Session:
    spark: SparkSession
    start_seconds: float


@contextmanager
def spark_session(config: Config) -> Iterator[Session]:
    """Start Spark for the duration of a command; a session that exists already is used and left alone."""
    existing = SparkSession.getActiveSession()
    if existing is not None:
        yield Session(existing, 0.0)
        return
    began = time.monotonic()
    # Under spark-submit the JVM runs already: master, memory and jars are what it was started with.
    submitted = "PYSPARK_GATEWAY_PORT" in os.environ
    local = not submitted and one_machine(config.spark.master)
    os.environ["PYSPARK_PYTHON"] = os.environ.get("PYSPARK_PYTHON", sys.executable)
    if not submitted:
        os.environ["JAVA_HOME"] = str(find_java())
    if local:
        os.environ["SPARK_LOCAL_IP"] = "127.0.0.1"
    conf = {
        **CONF,
        **(LOCAL_CONF if local else {}),
        **({} if submitted else _start(config)),
        **config.spark.conf,
    }
    builder = SparkSession.builder.appName("semantic-id-pipeline")
    for name, value in conf.items():
        builder = builder.config(name, value)
    with _quiet_launch():
        spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("OFF" if local else "ERROR")
    if not callable(spark._jvm.io.delta.tables.DeltaTable):  # type: ignore[union-attr]
        spark.stop()
        raise EnvironmentProblem(
            "Spark was started without the Delta jars; expected them on its class path. Give them to spark-submit: "
            '--jars "$(python -m jobs.engine)"'
        )
    try:
        yield Session(spark, time.monotonic() - began)
    finally:
        spark.stop()


def one_machine(master: str) -> bool:
    """Is everything in one JVM: `local` and `local[n]`, not `local-cluster`."""
    return master == "local" or master.startswith("local[")


def _start(config: Config) -> dict[str, str]:
    """What only counts when the JVM starts."""
    quiet = Path(__file__).with_name("log4j2.properties").resolve()
    return {
        "spark.master": config.spark.master,
        "spark.jars": ",".join(map(str, delta_jars())),
        "spark.driver.memory": config.spark.driver_memory,
        "spark.driver.extraJavaOptions": f"-Dlog4j2.configurationFile={quiet.as_uri()} -Dderby.system.home=/dev/null",
    }


LAUNCHER_SAYS = (b"Using incubator modules", b"Setting default log level to", b"To adjust logging level use")


@contextmanager
def _quiet_launch() -> Iterator[None]:
    """Whatever Java prints for as long as it lives passes through, but for the three lines that say nothing to anyone."""
    readable, writable = os.pipe()
    terminal = os.dup(2)
    sys.stderr.flush()
    os.dup2(writable, 2)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(writable)  # Java has its own copy: the pipe ends when Java does
        Thread(target=_pass_on, args=(readable, terminal), daemon=True).start()


def _pass_on(readable: int, terminal: int) -> None:
    with open(readable, "rb") as lines:
        for line in lines:
            if not any(phrase in line for phrase in LAUNCHER_SAYS):
                os.write(terminal, line)
    os.close(terminal)
