"""A warehouse of few items in a folder of its own, and nights on it: real Spark, Delta and MLflow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from data import topics, write_vectors
from pyspark.sql import SparkSession

from jobs.config import Config
from jobs.models.registry import Registry, open_registry
from jobs.read_config import load_config
from jobs.warehouse.delta_spark import Warehouse
from jobs.warehouse.tables import SEMANTIC_IDS
from pipelines import nightly
from pipelines.nightly import Night
from tokenizer import Iteration

ITEMS, DIM = 400, 12


class Progress:
    """Prints nothing and keeps the names of the stages that began."""

    def __init__(self) -> None:
        self.began: list[str] = []

    @contextmanager
    def step(self, name: str, why: str) -> Iterator[None]:
        self.began.append(name)
        yield

    def done(self, name: str, facts: str) -> None: ...
    def iteration(self, step: Iteration) -> None: ...
    def note(self, text: str) -> None: ...


class House:
    """One warehouse and what a night needs of it."""

    def __init__(self, spark: SparkSession, root: Path) -> None:
        self.root = root
        self.warehouse = Warehouse(spark, str(root))
        self.x = topics(ITEMS + 60, DIM, groups=40, spread=0.3)
        self.settings = [
            f"load.source={root}/in/vectors.parquet",
            f"train.interactions={root}/in/clicks.parquet",
            "fit.components=16",
            "train.epochs=1",
            "train.width=8",
            "train.history=10",
        ]
        self.config = self.configured()
        self.registry: Registry = open_registry(self.config, str(root))
        self.write(ITEMS)
        generator = np.random.default_rng(0)
        n = 4000
        pq.write_table(
            pa.table(
                {
                    "user_id": generator.integers(60, size=n),
                    "item_id": generator.integers(ITEMS + 5, size=n),  # five items have no vector
                    "timestamp": np.sort(generator.integers(1000, size=n)),
                    "rating": generator.integers(1, 6, size=n).astype(float),
                }
            ),
            root / "in" / "clicks.parquet",
        )

    def configured(self, *more: str) -> Config:
        return load_config(overrides=[*self.settings, *more], warehouse=str(self.root))

    def write(self, items: int) -> None:
        write_vectors(self.root / "in" / "vectors.parquet", list(range(items)), text_embedding=self.x[:items])

    def night(self, day: date, *more: str) -> Night:
        return self.run(self.configured(*more), day, Progress())

    def run(self, config: Config, day: date, progress: Progress) -> Night:
        return nightly.run(config, self.warehouse, self.registry, day, self.root / "pictures", progress)

    def ids(self, version: int) -> dict[str, Any]:
        rows = self.warehouse.read(SEMANTIC_IDS).where(f"codebook_version = {version}").collect()
        assert len({row["item_id"] for row in rows}) == len(rows)
        return {row["item_id"]: row for row in rows}
