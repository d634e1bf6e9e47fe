"""`ctr_examples` as the result of a log, IDs and settings: written anew where one of these differs, and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from torch import Tensor

from jobs.config import Config, ConfigError
from jobs.ctr.coverage import coverage_of
from jobs.ctr.examples import EXAMPLE_SETTINGS, EXAMPLES_RECIPE, build_examples, item_codes
from jobs.ctr.log import Log, examine, read_rows
from jobs.ctr.stream import ExampleRowGroup, row_groups
from jobs.errors import SchemaError
from jobs.files.sources import open_source
from jobs.fingerprint import fingerprint
from jobs.warehouse.delta_spark import Warehouse
from jobs.warehouse.tables import CTR_EXAMPLES, ITEM_EMBEDDINGS

SPLITS = ("train", "validation", "test")
MOST_TUPLES = 2**17  # tuples of codes that reach the driver
EXAMPLES_OF = "sid.examples"  # property of ctr_examples: what it is made of


def check_interactions(config: Config, warehouse: Warehouse) -> Log:
    """Examine the interactions before anything else runs, unless the examples of this warehouse are made of them.

    Raises:
        ConfigError: no interactions are named, or nothing is there.
        SchemaError: nothing can be learned from them.
    """
    if not config.train.interactions:
        raise ConfigError("train.interactions is empty; give a Parquet file of clicks: --set train.interactions=PATH")
    source = open_source(config.train.interactions)
    stored = warehouse.property(CTR_EXAMPLES, EXAMPLES_OF) or ""
    if stored.startswith("{") and (of := json.loads(stored))["key"] == examples_key(config, source.fingerprint):
        return Log.from_json(of["log"], source)
    try:
        return examine(source, config.train, warehouse.spark)
    except SchemaError as error:
        raise SchemaError(f"train.interactions {config.train.interactions}: {error}") from error


def check_ids(config: Config, warehouse: Warehouse, log: Log) -> None:
    """Whether the log is about the items of this catalogue, before a codebook is fitted.

    Raises:
        SchemaError: it is not.
    """
    if log.rows_used:
        coverage_of(log, warehouse.read(ITEM_EMBEDDINGS).select("item_id"), config.train)


def examples_key(config: Config, log_fingerprint: str) -> str:
    """The same for the same examples: recipe, log, settings."""
    settings = {name: value for name, value in config.train.model_dump(mode="json").items() if name in EXAMPLE_SETTINGS}
    return f"{EXAMPLES_RECIPE}-{log_fingerprint[:16]}-{fingerprint(settings)[:16]}"


def write_examples(config: Config, warehouse: Warehouse, published: DataFrame, log: Log, ids_key: str) -> int:
    """The version of `ctr_examples` made of this log, these IDs and settings; written where it is not there already."""
    stored = json.loads(warehouse.property(CTR_EXAMPLES, EXAMPLES_OF) or "{}") if log.seen_before else {}
    if stored.get("ids") != ids_key:
        if warehouse.exists(CTR_EXAMPLES):
            # Killed before the property is set again, the next run must not take these rows for those of the old log.
            warehouse.set_property(CTR_EXAMPLES, EXAMPLES_OF, "")
        with warehouse.staged(read_rows(log, warehouse.spark), "interactions") as rows:
            warehouse.replace(CTR_EXAMPLES, build_examples(rows, item_codes(published), log, config.train), "")
        of = {
            "key": examples_key(config, log.source.fingerprint),
            "log": log.to_json(),
            "ids": ids_key,
            "history": config.train.history,
        }
        warehouse.set_property(CTR_EXAMPLES, EXAMPLES_OF, json.dumps(of))
    return warehouse.version(CTR_EXAMPLES)


@dataclass(frozen=True)
class Split:
    """Of the training, validation or test split: impressions, clicks among them, and the first moment."""

    impressions: int
    clicks: int
    begins: int


@dataclass(frozen=True)
class Examples:
    """A version of `ctr_examples`.

    Attributes:
        key: `examples_key` of what it is made of.
        splits: By name.
        validation_from: First moment after the training split, in microseconds; None for a log without a clock.
    """

    version: int
    key: str
    groups: tuple[ExampleRowGroup, ...]
    splits: Mapping[str, Split]
    validation_from: int | None

    @property
    def impressions(self) -> int:
        return sum(split.impressions for split in self.splits.values())

    @property
    def clicks(self) -> int:
        return sum(split.clicks for split in self.splits.values())


def most_shown_codes(warehouse: Warehouse, version: int, levels: int) -> tuple[Tensor, Tensor]:
    """The tuples of codes that the training impressions show most often, MOST_TUPLES at most.

    Returns:
        Codes (N, L) int64 of semantic IDs, and how many training impressions show each (N,) int64.
    """
    impressions = warehouse.read(CTR_EXAMPLES, version).select(F.explode("impressions").alias("one"))
    alternates = (F.size("one.codes") / levels).cast("int")  # of a level, its own code first
    own = F.array(*(F.element_at("one.codes", level * alternates + 1) for level in range(levels)))
    in_training = impressions.where((F.col("one.split") == "train") & (F.size("one.codes") > 0))
    counted = in_training.groupBy(own.alias("codes")).count().orderBy(F.desc("count"), "codes").limit(MOST_TUPLES)
    table = counted.toArrow()
    codes, counts = table["codes"].combine_chunks().flatten(), table["count"]
    return (
        torch.from_numpy(codes.to_numpy(zero_copy_only=False).astype(np.int64)).reshape(-1, levels),
        torch.from_numpy(counts.to_numpy().astype(np.int64)),
    )


def read_examples(config: Config, warehouse: Warehouse, version: int, log: Log) -> Examples:
    """The version of `ctr_examples` that was made of a log.

    Raises:
        SchemaError: a split has only clicks, or none.
    """
    impressions = warehouse.read(CTR_EXAMPLES, version).select(F.explode("impressions").alias("one"))
    counted = impressions.groupBy("one.split").agg(F.count(F.lit(1)), F.sum("one.label"), F.min("one.ts")).collect()
    splits = {str(row[0]): Split(*map(int, row[1:])) for row in counted}
    for name in SPLITS:
        split = splits.get(name, Split(0, 0, 0))
        if not 0 < split.clicks < split.impressions:
            raise SchemaError(
                f"the {name} split has {split.clicks:,} clicks in {split.impressions:,} examples; expected clicks and "
                f"non-clicks in each of {', '.join(SPLITS)}, which follow each other in time ({log.note}). Give a "
                "longer log"
            )
    return Examples(
        version=version,
        key=examples_key(config, log.source.fingerprint),
        groups=row_groups(warehouse.files(CTR_EXAMPLES, version)),
        splits=splits,
        validation_from=splits["validation"].begins if log.has_clock else None,
    )
