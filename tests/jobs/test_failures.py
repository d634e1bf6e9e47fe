"""Exceptions as the libraries really raise them, and what a person reads instead."""

from __future__ import annotations

import ast
import errno
import importlib
import inspect
import os
import pkgutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from pyspark.sql import SparkSession

from jobs import failures
from jobs.config import ConfigError
from jobs.errors import SchemaError, WarehouseError
from jobs.failure_rules import EXIT_CODES, UNUSABLE, WRONG_DATA, WRONG_SETTINGS
from jobs.failures import Failure, about, failure
from jobs.files.parquet import row_groups

ROOT = Path(__file__).parents[2]


def caught(action: Callable[[], object]) -> BaseException:
    with pytest.raises(BaseException) as info:  # noqa: PT011 - whatever the library raises is what the test is about
        action()
    return info.value


def reported(action: Callable[[], object], root: Path | str = "") -> Failure:
    result = failure(caught(action), str(root))
    assert "\n" not in result.sentence
    assert len(result.sentence) < 700
    return result


def test_every_exception_of_ours_has_an_exit_code() -> None:
    without = []
    for package in ("jobs", "tokenizer", "pipelines"):
        for module in pkgutil.walk_packages([str(ROOT / package)], f"{package}."):
            if module.name.endswith(("__main__", "_model")):
                continue
            for name, kind in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
                if issubclass(kind, Exception) and kind.__module__ == module.name:
                    parents = {parent.__name__ for parent in kind.__mro__}
                    without += [] if parents & EXIT_CODES.keys() else [f"{module.name}.{name}"]
    assert without == []


def test_what_turns_exceptions_into_sentences_needs_the_standard_library_only() -> None:
    for name in ("failures", "failure_rules", "exceptions", "redaction"):
        tree = ast.parse((ROOT / "jobs" / f"{name}.py").read_text())
        imports = {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        imports |= {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert imports <= sys.stdlib_module_names | {"jobs"}


def test_our_own_sentences_stand_as_they_are() -> None:
    assert failure(ConfigError("a; b")) == Failure("a; b", 2, traced=False)
    assert failure(SchemaError("a; b")) == Failure("a; b", 4, traced=False)
    assert failure(WarehouseError("a; b")) == Failure("a; b", 5, traced=False)


def test_our_own_sentence_counts_when_something_else_fails_on_the_way_out() -> None:
    def close_twice() -> None:
        try:
            raise SchemaError("two columns are missing")
        finally:
            raise ConnectionRefusedError(111, "Connection refused")

    assert reported(close_twice) == Failure("two columns are missing", WRONG_DATA, traced=False)


def test_ctrl_c_is_130_whatever_follows_it() -> None:
    def interrupted() -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise ConnectionRefusedError(111, "Connection refused")

    result = reported(interrupted)
    assert (result.code, result.traced) == (130, False)
    assert result.sentence.startswith("stopped by Ctrl-C")


def test_a_fault_of_ours_is_called_one() -> None:
    result = reported(lambda: {}["levels"])
    assert (result.code, result.traced) == (UNUSABLE, True)
    assert "a fault of the program (KeyError: 'levels')" in result.sentence


# ---- the operating system, and Python itself ----


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "no space left to write table item_embeddings"),
        (errno.EDQUOT, "no space left to write table item_embeddings"),
        (errno.EFBIG, "no space left to write table item_embeddings"),
        (errno.EACCES, "may not read or write table item_embeddings"),
        (errno.EROFS, "mounted read-only"),
        (errno.EIO, "the system refused to read or write table item_embeddings"),
    ],
)
def test_errors_of_the_system_name_the_table(number: int, message: str) -> None:
    error = OSError(number, os.strerror(number), "/w/item_embeddings/part-1.parquet")
    result = failure(error, "/w")
    assert result.code == UNUSABLE
    assert message in result.sentence
    assert "(file part-1.parquet) in /w" in result.sentence
    assert "its last commit" in result.sentence


def test_paths_that_are_not_what_they_must_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert reported(lambda: tmp_path.read_text()).sentence.startswith(f"{tmp_path} is a folder; expected a file")
    assert reported(lambda: (tmp_path / "file" / "x").read_text()).sentence.startswith(
        f"{tmp_path}/file/x is a file where"
    )
    assert reported(lambda: (tmp_path / "gone").read_text()).sentence.startswith(f"{tmp_path}/gone does not exist")


def test_no_memory() -> None:
    result = reported(lambda: bytearray(2**62))
    assert result.code == UNUSABLE
    assert "memory ran out" in result.sentence
    assert "spark.driver_memory" in result.sentence


def test_a_package_that_is_missing_is_named() -> None:
    assert "No module named 'no_such_package'" in reported(lambda: importlib.import_module("no_such_package")).sentence


def test_a_java_that_is_gone() -> None:
    from py4j.protocol import Py4JNetworkError

    result = failure(Py4JNetworkError("Answer from Java side is empty"))
    assert result.code == UNUSABLE
    assert "Spark's Java process is gone" in result.sentence


# ---- tables, read without Spark ----


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table of three commits in a warehouse at its parent."""
    folder = tmp_path / "semantic_ids"
    for number in range(3):
        write_deltalake(folder, pa.table({"item_id": [f"item {number}"]}), mode="append")
    return folder


def log_entry(table: Path, number: int) -> Path:
    return table / "_delta_log" / f"{number:020}.json"


DAMAGE: dict[str, Callable[[Path], object]] = {
    "an entry is missing": lambda table: log_entry(table, 1).unlink(),
    "the first entry is missing": lambda table: log_entry(table, 0).unlink(),
    "an entry is cut off": lambda table: log_entry(table, 2).write_bytes(log_entry(table, 2).read_bytes()[:40]),
    "an entry is garbage": lambda table: log_entry(table, 1).write_bytes(bytes(range(255, 0, -1))),
    "every entry is empty": lambda table: [log_entry(table, n).write_bytes(b"") for n in range(3)],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_log_is_said_of_its_table(table: Path, damage: str) -> None:
    DAMAGE[damage](table)

    def read() -> None:
        with about(str(table)):
            DeltaTable(table).to_pyarrow_table()

    result = reported(read, table.parent)
    assert result.code == UNUSABLE
    assert result.sentence.startswith("the log of table semantic_ids ")
    assert "Put back a copy" in result.sentence


def test_missing_and_damaged_files_of_a_table_are_named(table: Path) -> None:
    file = next(table.glob("*.parquet"))
    file.write_bytes(file.read_bytes()[:50])
    damaged = reported(lambda: row_groups([str(file)]), table.parent)
    assert damaged.sentence.startswith(f"table semantic_ids (file {file.name}) in {table.parent} cannot be read")
    file.unlink()
    missing = f"a file of table semantic_ids (file {file.name}) in {table.parent} is missing"
    assert reported(lambda: row_groups([str(file)]), table.parent).sentence.startswith(missing)
    assert reported(lambda: DeltaTable(table).to_pyarrow_table(), table.parent).sentence.startswith(missing)


# ---- MLflow's store ----


@pytest.mark.parametrize("content", [b"not a database at all" * 100, b"SQLite format 3\0" + bytes(range(256)) * 40])
def test_a_store_that_is_no_database(tmp_path: Path, content: bytes) -> None:
    from sqlalchemy import create_engine
    from sqlalchemy import inspect as tables_of

    (tmp_path / "mlflow.db").write_bytes(content)
    engine = create_engine(f"sqlite:///{tmp_path}/mlflow.db")
    result = reported(lambda: tables_of(engine).get_table_names(), tmp_path)
    engine.dispose()
    assert result.code == UNUSABLE
    assert result.sentence.startswith(f"MLflow's store {tmp_path}/mlflow.db is damaged")


def test_a_store_that_is_locked(tmp_path: Path) -> None:
    from sqlalchemy import create_engine, text

    other = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    engine = create_engine(f"sqlite:///{tmp_path}/mlflow.db", connect_args={"timeout": 0})

    def write() -> None:
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE t (a INTEGER)"))

    result = reported(write, tmp_path)
    other.close()
    engine.dispose()
    assert result.code == UNUSABLE
    assert "is locked by another process" in result.sentence


# ---- Spark ----


@pytest.fixture
def fails(spark: SparkSession) -> Callable[..., Failure]:
    def run(
        task: Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]], write_to: Path | None = None
    ) -> Failure:
        rows = spark.range(2).mapInArrow(task, "id BIGINT")
        return reported(rows.collect if write_to is None else lambda: rows.write.format("delta").save(str(write_to)))

    return run


def test_an_error_of_ours_in_a_task_arrives_as_itself(fails: Callable[..., Failure], tmp_path: Path) -> None:
    def refuse(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        from tokenizer.errors import CodebookError

        raise CodebookError("the codebook has hash 1234; expected 5678")
        yield

    expected = Failure("the codebook has hash 1234; expected 5678", WRONG_DATA)
    assert fails(refuse) == expected
    assert fails(refuse, tmp_path / "t") == expected


def test_what_happens_to_tasks_is_a_sentence(fails: Callable[..., Failure]) -> None:
    def full(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        raise OSError(28, "No space left on device", "/x/y")
        yield

    def hungry(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        bytearray(2**62)
        yield

    def killed(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        import os

        os.kill(os.getpid(), 9)
        yield

    def faulty(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        yield {}["levels"]  # type: ignore[misc]

    assert "no space left to write /x/y" in fails(full).sentence
    assert "a fault of the program (KeyError: 'levels')" in fails(faulty).sentence
    assert "memory ran out" in fails(hungry).sentence
    assert "a worker process of Spark died" in fails(killed).sentence


@pytest.mark.parametrize("damage", ["an entry is missing", "an entry is cut off", "every entry is empty"])
def test_a_log_that_spark_cannot_read(spark: SparkSession, table: Path, damage: str) -> None:
    DAMAGE[damage](table)

    def read() -> None:
        with about(str(table)):
            spark.read.format("delta").load(str(table)).collect()

    result = reported(read, table.parent)
    assert result.code == UNUSABLE
    assert result.sentence.startswith("the log of table semantic_ids ")


def test_files_that_spark_does_not_find(spark: SparkSession, table: Path) -> None:
    gone = next(table.glob("*.parquet"))
    gone.unlink()
    result = reported(lambda: spark.read.format("delta").load(str(table)).collect(), table.parent)
    assert result.sentence.startswith(f"a file of table semantic_ids (file {gone.name}) in {table.parent} is missing")


# ---- what is printed and written ----


def test_the_trace_is_in_a_file_below_the_warehouse_without_credentials(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = caught(lambda: {}["password=hunter2hunter2"])
    error.__dict__["warehouse"] = (str(tmp_path), True)
    assert failures.report(error, "sid load") == UNUSABLE
    sentence, trace = capsys.readouterr().err.splitlines()
    assert "fault of the program" in sentence
    file = Path(trace.removeprefix("The full trace is in "))
    assert file.parent == tmp_path / "_logs"
    assert "Traceback (most recent call last)" in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    assert "hunter2" not in file.read_text() + sentence


def test_a_command_that_only_reads_leaves_the_warehouse_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))

    def read() -> None:
        with failures.on_warehouse(str(tmp_path / "w"), write=False):
            raise KeyError("x")

    failures.report(caught(read))
    assert list((tmp_path / "w").iterdir()) == []
    assert str(next((tmp_path / "tmp").iterdir())) in capsys.readouterr().err


@pytest.mark.parametrize("entry", ["pipelines", "jobs"])
def test_both_entries_end_in_sentences_and_codes(entry: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", entry, "load", "--date", "20260131", "--set", "fit.levels=true"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == WRONG_SETTINGS
    assert done.stderr.splitlines() == [
        "sid: 2 settings are wrong:",
        "  1. fit.levels = True; expected a whole number from 1 to 16",
        "  2. date '20260131' is not a day of the calendar; expected YYYY-MM-DD, such as 2026-01-31",
    ]


def test_the_trace_file_ends_with_the_log_of_spark_s_java(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(failures, "_log_files", [])
    log = tmp_path / "spark.log"
    log.write_text("12:00:00 ERROR SparkContext: no such thing\n")
    failures.include_log_file(log)
    failures.include_log_file(tmp_path / "gone.log")
    with pytest.raises(KeyError) as info, failures.on_warehouse(str(tmp_path)):
        raise KeyError("levels")
    failures.report(info.value)
    assert "SparkContext" not in capsys.readouterr().err
    (trace,) = (tmp_path / "_logs").iterdir()
    assert trace.read_text().endswith(
        "Logged by Spark's Java process (spark.log):\n12:00:00 ERROR SparkContext: no such thing"
    )
