"""Warehouses that tests copy: each is made once and only read afterwards, so no test sees what another one wrote."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest
from pyspark.sql import SparkSession
from warehouse import ITEMS, WITHOUT_TRAINING, SmallWarehouse

from pipelines.nightly import Night


@pytest.fixture(scope="session")
def first(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> tuple[SmallWarehouse, Night]:
    """A warehouse after its first night, and that night. Read only."""
    small = SmallWarehouse.new(spark, tmp_path_factory.mktemp("first") / "warehouse")
    return small, small.night(date(2026, 1, 1))


@pytest.fixture(scope="session")
def refitted(
    first: tuple[SmallWarehouse, Night], tmp_path_factory: pytest.TempPathFactory
) -> tuple[SmallWarehouse, Night]:
    """A copy of it after a second night, of fifty more items and a refit, and that night. Read only."""
    small = first[0].copy(tmp_path_factory.mktemp("refitted") / "warehouse")
    small.write_items(ITEMS + 50)
    return small, small.night(date(2026, 2, 10), WITHOUT_TRAINING)


@pytest.fixture
def small(first: tuple[SmallWarehouse, Night], tmp_path: Path) -> SmallWarehouse:
    """A copy of the warehouse after its first night, to change."""
    return first[0].copy(tmp_path / "warehouse")
