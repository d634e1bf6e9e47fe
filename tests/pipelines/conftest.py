"""One warehouse for the story of nights (test_nightly.py) and for what people do after it (test_promote.py)."""

from __future__ import annotations

from datetime import date

import pytest
from house import House
from pyspark.sql import SparkSession

from pipelines.nightly import Night

DAY = date(2026, 1, 1)


@pytest.fixture(scope="session")
def house(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> House:
    return House(spark, tmp_path_factory.mktemp("house"))


@pytest.fixture(scope="session")
def first(house: House) -> Night:
    return house.night(DAY)
