"""The Spark session of a command: with Delta, quiet, in UTC, with the Python of this environment on the workers.

Unless spark-submit started Java already, it is started here: with the Spark of this environment, with its settings in a
file that only this user may read (any user can read a command line), and with its temporary files in one folder that is
removed at the end.
"""

from __future__ import annotations

import atexit
import fcntl
import locale
import os
import shlex
import shutil
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pyspark import SparkContext
from pyspark.java_gateway import launch_gateway
from pyspark.sql import SparkSession

from jobs.config import Config
from jobs.failures import include_log_file
from jobs.spark.engine import EnvironmentProblem, delta_jars, prepare_environment

# For one machine only. The defaults of Spark and Delta suit a cluster: fifty tasks for a snapshot and ten thousand for
# a listing of files take seconds each on two cores.
LOCAL_CONF = {
    "spark.sql.shuffle.partitions": "4",
    "spark.databricks.delta.snapshotPartitions": "2",
    "spark.sql.sources.parallelPartitionDiscovery.parallelism": "4",
    "spark.driver.host": "127.0.0.1",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.ui.enabled": "false",
    # A path without a scheme is a local one, as in Python, also where HADOOP_CONF_DIR sets another file system.
    "spark.hadoop.fs.defaultFS": "file:///",
}
CONF = {
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.execution.arrow.pyspark.enabled": "true",
    # A barrier stage (TorchDistributor) for which there are too few slots fails in seconds instead of minutes.
    "spark.scheduler.barrier.maxConcurrentTasksCheck.interval": "2s",
    "spark.scheduler.barrier.maxConcurrentTasksCheck.maxFailures": "2",
    "spark.ui.showConsoleProgress": "false",
}
SCRATCH, LOCK, JAVA_LOG = "semantic-id-pipeline-", "lock", "spark.log"
PLAIN = frozenset(string.ascii_letters + string.digits + "._-/,")  # characters that a properties file takes unescaped
JAVA_END_SECONDS = 20  # to wait for Java to end


@dataclass(frozen=True)
class Session:
    spark: SparkSession
    start_seconds: float  # that Spark took to start; 0 for a session that existed


@contextmanager
def spark_session(config: Config) -> Iterator[Session]:
    """Start Spark for the duration of a block. A session that exists is used, and not stopped at the end."""
    existing = SparkSession.getActiveSession()
    if existing is not None:
        yield Session(existing, 0.0)
        return
    began = time.monotonic()
    # Under spark-submit Java runs already, with the master, memory and jars that it was started with.
    submitted = "PYSPARK_GATEWAY_PORT" in os.environ
    local = not submitted and one_machine(config.spark.master)
    conf = {**CONF, **(LOCAL_CONF if local else {})}
    if submitted:
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    else:
        conf |= _start_java(config, conf, local=local)
    builder = SparkSession.builder.appName("semantic-id-pipeline")
    for name, value in {**conf, **config.spark.conf}.items():
        builder = builder.config(name, value)
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    if not callable(spark._jvm.io.delta.tables.DeltaTable):  # type: ignore[union-attr]
        spark.stop()
        raise EnvironmentProblem(
            "Spark was started without the Delta jars; expected them on its class path. Give them to spark-submit: "
            '--jars "$(python -m jobs.spark.engine)"'
        )
    try:
        yield Session(spark, time.monotonic() - began)
    except BaseException:
        with suppress(Exception):  # Java may be gone; the first exception is the one to report
            spark.stop()
        raise
    spark.stop()


def one_machine(master: str) -> bool:
    """Whether everything runs in one JVM: `local` and `local[n]`, not `local-cluster`."""
    return master == "local" or master.startswith("local[")


def _start_java(config: Config, conf: Mapping[str, str], *, local: bool) -> dict[str, str]:
    """Start Java with `conf` and the user's properties, unless this process has started it.

    Returns the properties that have an effect only at the start.
    """
    prepare_environment(config.spark.master if local else "")
    scratch = _scratch()
    quiet = Path(__file__).with_name("log4j2.properties").resolve()
    options = f'-Dlog4j2.configurationFile={quiet.as_uri()} -Dderby.system.home=/dev/null "-Djava.io.tmpdir={scratch}"'
    start = {
        "spark.master": config.spark.master,
        "spark.jars": ",".join(map(str, delta_jars())),
        "spark.driver.memory": config.spark.driver_memory,
        **({"spark.sql.warehouse.dir": (scratch / "spark-warehouse").as_uri()} if local else {}),
    }
    # The user's options come last and win; without ours Java prints much and leaves files.
    user_options = config.spark.conf.get("spark.driver.extraJavaOptions", "")
    java = {"spark.driver.extraJavaOptions": f"{options} {user_options}".strip()}
    if SparkContext._gateway is None:
        properties = scratch / "spark.properties"
        _write_private(properties, {**conf, **start, **config.spark.conf, **java})
        given = os.environ.get("PYSPARK_SUBMIT_ARGS", "").removesuffix("pyspark-shell").strip()
        for_java = {"PYSPARK_SUBMIT_ARGS": f"--properties-file {shlex.quote(str(properties))} {given} pyspark-shell"}
        if local:
            for_java["SPARK_CONF_DIR"] = str(scratch / "conf")
        else:
            for_java["PYSPARK_SUBMIT_ARGS"] = f"--load-spark-defaults {for_java['PYSPARK_SUBMIT_ARGS']}"
        if "spark.local.dir" not in config.spark.conf and "SPARK_LOCAL_DIRS" not in os.environ:
            for_java["SPARK_LOCAL_DIRS"] = str(scratch)
        if "utf" not in locale.getencoding().lower():
            for_java["LC_ALL"] = "C.UTF-8"  # without it Java cannot open a file whose name has an é
        atexit.register(_stop_java, os.getpid())
        with _environment(for_java), ExitStack() as until_started:
            until_started.callback(properties.unlink)  # Java has read it
            popen = {}
            if local:  # the output of Java and its Python workers goes to the trace file of a failure
                popen["stderr"] = until_started.enter_context(open(scratch / JAVA_LOG, "wb"))
                include_log_file(scratch / JAVA_LOG)
            gateway = launch_gateway(popen_kwargs=popen)  # type: ignore[no-untyped-call]
            SparkContext._ensure_initialized(gateway=gateway)
    return start


def _write_private(path: Path, properties: Mapping[str, str]) -> None:
    """Write a Java properties file that only this user may read."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as file:
        for name, value in properties.items():
            file.write(f"{_escaped(name)}={_escaped(value)}\n")


def _escaped(text: str) -> str:
    """A key or value for a Java properties file: UTF-16 units as \\uXXXX, except for PLAIN characters."""
    raw = text.encode("utf-16-be")
    units = [raw[i] << 8 | raw[i + 1] for i in range(0, len(raw), 2)]
    return "".join(chr(unit) if chr(unit) in PLAIN else f"\\u{unit:04x}" for unit in units)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the child processes that the block starts."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@cache
def _scratch() -> Path:
    """The folder for temporary files of this process's Java. Folders of killed commands are removed."""
    parent = Path(tempfile.gettempdir())
    for lock_file in parent.glob(f"{SCRATCH}*/{LOCK}"):
        with suppress(OSError), open(lock_file, "rb") as lock:  # it may be another user's, or in use
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock_file.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=parent))
    # Locked before it gets its name, so a lock file that is not locked belongs to a process that has ended.
    descriptor = os.open(folder / "new", os.O_WRONLY | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.rename(folder / "new", folder / LOCK)
    (folder / "conf").mkdir()
    return folder


def _stop_java(owner: int) -> None:
    """Stop Java and remove its temporary files."""
    if os.getpid() != owner:  # a forked child process
        return
    gateway = SparkContext._gateway
    process = getattr(gateway, "proc", None)
    if gateway is not None and process is not None:
        with suppress(Exception):  # Java may have ended before
            gateway.shutdown()
        with suppress(OSError):
            process.stdin.close()  # the signal for Java to end
        with suppress(subprocess.TimeoutExpired):
            process.wait(JAVA_END_SECONDS)
    shutil.rmtree(_scratch(), ignore_errors=True)
