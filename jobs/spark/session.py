"""The one Spark session of a command: Delta on, quiet, in UTC, with the environment's own python on the workers.

Unless spark-submit started it, Java is started here: with this environment's Spark, with its settings in a file that only
this user may read (a command line is everybody's), and with its temporary files in one folder that is removed at the end.
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

# Right for tables of some files on one machine, wrong for a cluster, where Spark's and Delta's own defaults are good:
# fifty tasks per snapshot and ten thousand for a listing cost seconds each when there are two cores.
LOCAL_CONF = {
    "spark.sql.shuffle.partitions": "4",
    "spark.databricks.delta.snapshotPartitions": "2",
    "spark.sql.sources.parallelPartitionDiscovery.parallelism": "4",
    "spark.driver.host": "127.0.0.1",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.ui.enabled": "false",
    # A path without a scheme is local, as it is for Python, whatever HADOOP_CONF_DIR says.
    "spark.hadoop.fs.defaultFS": "file:///",
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
SCRATCH, LOCK, JAVA_LOG = "semantic-id-pipeline-", "lock", "spark.log"
PLAIN = frozenset(string.ascii_letters + string.digits + "._-/,")  # in a properties file
JAVA_ENDS_WITHIN = 20  # seconds


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
    conf = {**CONF, **(LOCAL_CONF if local else {})}
    if submitted:
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    else:
        conf |= _launched(config, conf, local=local)
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
        with suppress(Exception):  # of a Java that is gone; what went wrong before is what counts
            spark.stop()
        raise
    spark.stop()


def one_machine(master: str) -> bool:
    """Is everything in one JVM: `local` and `local[n]`, not `local-cluster`."""
    return master == "local" or master.startswith("local[")


def _launched(config: Config, conf: Mapping[str, str], *, local: bool) -> dict[str, str]:
    """Start Java with `conf` and the user's properties, if this process has not yet. Returns what only counts at its start."""
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
    # The user's come last, so that they win; without ours Java would be loud and leave files.
    asked = config.spark.conf.get("spark.driver.extraJavaOptions", "")
    java = {"spark.driver.extraJavaOptions": f"{options} {asked}".strip()}
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
            for_java["LC_ALL"] = "C.UTF-8"  # else no file whose name has an é is one that Java can open
        atexit.register(_end, os.getpid())
        with _environment(for_java), ExitStack() as until_started:
            until_started.callback(properties.unlink)  # Java has read it
            popen = {}
            if (
                local
            ):  # what Java and its Python workers print goes into the trace file of a failure, not on the console
                popen["stderr"] = until_started.enter_context(open(scratch / JAVA_LOG, "wb"))
                include_log_file(scratch / JAVA_LOG)
            SparkContext._ensure_initialized(gateway=launch_gateway(popen_kwargs=popen))  # type: ignore[no-untyped-call]
    return start


def _write_private(path: Path, properties: Mapping[str, str]) -> None:
    """A Java properties file that only this user may read."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as file:
        for name, value in properties.items():
            file.write(f"{_escaped(name)}={_escaped(value)}\n")


def _escaped(text: str) -> str:
    """As keys and values stand in a Java properties file: UTF-16 units as \\uXXXX, but for the plainest characters."""
    raw = text.encode("utf-16-be")
    units = [raw[i] << 8 | raw[i + 1] for i in range(0, len(raw), 2)]
    return "".join(chr(unit) if chr(unit) in PLAIN else f"\\u{unit:04x}" for unit in units)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables for a child process that is started meanwhile."""
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
    """The folder for the temporary files of this process's Java. Those of killed commands are removed."""
    parent = Path(tempfile.gettempdir())
    for left in parent.glob(f"{SCRATCH}*/{LOCK}"):
        with suppress(OSError), open(left, "rb") as lock:  # another user's, or in use
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=parent))
    # Locked before it has its name: a lock that can be taken is one whose holder is dead.
    held = os.open(folder / "new", os.O_WRONLY | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    os.rename(folder / "new", folder / LOCK)
    (folder / "conf").mkdir()
    return folder


def _end(owner: int) -> None:
    """End Java, and remove what it leaves behind."""
    if os.getpid() != owner:  # a child that was forked
        return
    gateway = SparkContext._gateway
    process = getattr(gateway, "proc", None)
    if gateway is not None and process is not None:
        with suppress(Exception):  # it may have died long before
            gateway.shutdown()
        with suppress(OSError):
            process.stdin.close()  # which tells Java to end
        with suppress(subprocess.TimeoutExpired):
            process.wait(JAVA_ENDS_WITHIN)
    shutil.rmtree(_scratch(), ignore_errors=True)
