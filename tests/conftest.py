"""One real Spark session for the whole test run; every test that uses it is an integration test."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from jobs.config import Config
from jobs.read_config import load_config
from jobs.spark.session import spark_session
from jobs.warehouse.delta_spark import Warehouse


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    # The tables are tiny, so compiling is what takes the time: of Java's bytecode, and of generated code per query.
    config = load_config(
        overrides=[
            "spark.master=local[2]",
            "spark.driver_memory=2g",
            "spark.conf.spark.sql.shuffle.partitions=2",
            "spark.conf.spark.driver.extraJavaOptions=-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
            "spark.conf.spark.sql.codegen.wholeStage=false",
            "spark.conf.spark.databricks.delta.snapshotPartitions=1",
        ]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # py4j leaves sockets to the garbage collector
        with spark_session(config) as session:
            yield session.spark


@pytest.fixture
def warehouse(spark: SparkSession, tmp_path: Path) -> Warehouse:
    root = tmp_path / "warehouse"
    root.mkdir()
    return Warehouse(spark, str(root))


@pytest.fixture
def settings(warehouse: Warehouse) -> Callable[..., Config]:
    """Configuration for the test's warehouse with `section.key=value` overrides."""
    return lambda *overrides: load_config(overrides=overrides, warehouse=warehouse.root)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever uses the session is an integration test, marked so, and runs after the quick ones."""
    for item in items:
        if "spark" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.spark)
    items.sort(key=lambda item: item.get_closest_marker("spark") is not None)
