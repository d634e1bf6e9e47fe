"""A small warehouse in a folder of its own, and nights on it: real Spark, Delta and MLflow."""

from __future__ import annotations

import shutil
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
from jobs.warehouse.releases import Release, current_release
from jobs.warehouse.tables import SEMANTIC_IDS, TABLES
from pipelines import nightly
from pipelines.nightly import Night
from tokenizer import Iteration

ITEMS, DIM, CLICKS = 400, 12, 4000
WITHOUT_TRAINING = "train.interactions="


class Progress:
    """Prints nothing and keeps the names of the stages that began, and their notes."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self.notes: list[str] = []

    @contextmanager
    def step(self, name: str, why: str) -> Iterator[None]:
        self.began.append(name)
        yield

    def done(self, name: str, facts: str) -> None: ...
    def iteration(self, step: Iteration) -> None: ...
    def note(self, text: str) -> None:
        self.notes.append(text)


class SmallWarehouse:
    """A warehouse at `root` with what a night needs: vectors, clicks, settings, registry.

    Its input files may be another warehouse's; `write_items` writes vectors of its own.
    """

    def __init__(self, spark: SparkSession, root: Path, vectors: Path, clicks: Path) -> None:
        self.root, self.vectors, self.clicks = root, vectors, clicks
        self.tables = Warehouse(spark, str(root))
        self.x = topics(ITEMS + 60, DIM, groups=40, spread=0.3)
        self.tracking_uri = ""
        self.registry: Registry = open_registry(self.config(), str(root))

    @classmethod
    def new(cls, spark: SparkSession, root: Path) -> SmallWarehouse:
        """Without tables, beside the vectors of ITEMS items and CLICKS interactions of 60 users."""
        (root / "in").mkdir(parents=True)
        generator = np.random.default_rng(0)
        columns = {
            "user_id": generator.integers(60, size=CLICKS),
            "item_id": generator.integers(ITEMS + 5, size=CLICKS),  # five items have no vector
            "timestamp": np.sort(generator.integers(1000, size=CLICKS)),
            "rating": generator.integers(1, 6, size=CLICKS).astype(float),
        }
        clicks = root / "in" / "clicks.parquet"
        pq.write_table(pa.table(columns), clicks)
        small = cls(spark, root, root / "in" / "vectors.parquet", clicks)
        small.write_items(ITEMS)
        return small

    def copy(self, root: Path) -> SmallWarehouse:
        """A copy of tables, codebooks and registry at `root`. It reads the same input files."""
        shutil.copytree(self.root, root)
        return SmallWarehouse(self.tables.spark, root, self.vectors, self.clicks)

    def config(self, *settings: str) -> Config:
        own = [
            f"load.source={self.vectors}",
            f"train.interactions={self.clicks}",
            f"mlflow.tracking_uri={self.tracking_uri}",
            "fit.components=16",
            "train.epochs=1",
            "train.width=8",
            "train.history=10",
        ]
        return load_config(overrides=[*own, *settings], warehouse=str(self.root))

    def write_items(self, items: int) -> None:
        """The vectors that the next night loads: those of the first `items`."""
        self.vectors = self.root / "in" / "vectors.parquet"
        write_vectors(self.vectors, list(range(items)), text_embedding=self.x[:items])

    def night(self, day: date, *settings: str, progress: Progress | None = None) -> Night:
        config, pictures = self.config(*settings), self.root / "pictures"
        return nightly.run(config, self.tables, self.registry, day, pictures, progress or Progress())

    @property
    def release(self) -> Release:
        release = current_release(str(self.root))
        assert release is not None
        return release

    def versions(self) -> dict[str, int]:
        """The newest version of each table."""
        return {table.name: self.tables.version(table) for table in TABLES}

    def ids(self, codebook: int) -> dict[str, Any]:
        """Rows of `semantic_ids` under a codebook version, by item."""
        rows = self.tables.read(SEMANTIC_IDS).where(f"codebook_version = {codebook}").collect()
        assert len({row["item_id"] for row in rows}) == len(rows)
        return {row["item_id"]: row for row in rows}
