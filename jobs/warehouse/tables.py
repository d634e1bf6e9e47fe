"""Every Delta table of the warehouse: name, key, columns, partitions and checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pyspark.sql import types as T


@dataclass(frozen=True)
class Table:
    """A declared table. `key` identifies a row; `checks` are Delta CHECK constraints by name."""

    name: str
    key: tuple[str, ...]
    schema: T.StructType
    partition_by: tuple[str, ...] = ()
    checks: Mapping[str, str] = field(default_factory=dict)
    change_feed: bool = False


STRING, BINARY, INT, LONG, FLOAT, BOOLEAN, DATE = (
    T.StringType(), T.BinaryType(), T.IntegerType(), T.LongType(), T.FloatType(), T.BooleanType(), T.DateType(),
)  # fmt: skip
VERSIONS = T.MapType(STRING, LONG)


def _columns(optional: tuple[str, ...] = (), /, **types: T.DataType) -> T.StructType:
    return T.StructType([T.StructField(name, kind, name in optional) for name, kind in types.items()])


ITEM_EMBEDDINGS = Table(
    "item_embeddings",
    ("item_id",),
    _columns(
        item_id=STRING,
        embedding=BINARY,
        dim=INT,
        modalities=T.ArrayType(STRING),
        content_hash=STRING,
        first_seen=DATE,
        run_date=DATE,
    ),
    checks={"packed": "octet_length(embedding) IN (4 * dim, 2 * dim)"},
    change_feed=True,
)
REJECTED_EMBEDDINGS = Table(
    "rejected_embeddings",
    ("run_date", "item_id", "occurrence"),
    _columns(("item_id",), item_id=STRING, occurrence=INT, reason=STRING, detail=STRING, excerpt=STRING, run_date=DATE),
    partition_by=("run_date",),
)
SEMANTIC_IDS = Table(
    "semantic_ids",
    ("codebook_version", "item_id"),
    _columns(
        codebook_version=INT, item_id=STRING, codes=T.ArrayType(INT), suffix=INT, semantic_id=STRING, confidence=FLOAT,
        log_likelihood=FLOAT, codebook_hash=STRING, content_hash=STRING, held=BOOLEAN, run_date=DATE,
    ),
    partition_by=("codebook_version",),
    checks={"suffix_counts_from_zero": "suffix >= 0", "confidence_is_a_probability": "confidence BETWEEN 0 AND 1"},
    change_feed=True,
)  # fmt: skip
# Nullable, as Delta cannot hold a column inside an array to NOT NULL.
UNCERTAIN_ITEM = (
    T.StructType()
    .add("item_id", STRING)
    .add("semantic_id", STRING)
    .add("confidence", FLOAT)
    .add("log_likelihood", FLOAT)
)
QUALITY_REPORTS = Table(
    "quality_reports",
    ("codebook_version", "run_id"),
    _columns(
        ("judged_against",),
        codebook_version=INT, run_id=STRING, codebook_hash=STRING, metrics=T.MapType(STRING, T.DoubleType()), passed=BOOLEAN,
        reasons=T.ArrayType(STRING), least_certain=T.ArrayType(UNCERTAIN_ITEM), judged_against=INT, table_versions=VERSIONS,
        run_date=DATE,
    ),
)  # fmt: skip
RELEASES = Table(
    "releases",
    ("release_id",),
    _columns(
        ("previous",),
        release_id=LONG, codebook_version=INT, codebook_hash=STRING, table_versions=VERSIONS, previous=LONG, status=STRING,
        at=T.TimestampType(),
    ),
)  # fmt: skip
CTR_EXAMPLES = Table(
    "ctr_examples",
    ("user_id", "item_id", "ts"),
    _columns(
        user_id=STRING,
        item_id=STRING,
        label=INT,
        ts=LONG,
        history=T.ArrayType(STRING),
        features=T.ArrayType(FLOAT),
        split=STRING,
    ),
    partition_by=("split",),
)
TABLES = (ITEM_EMBEDDINGS, REJECTED_EMBEDDINGS, SEMANTIC_IDS, QUALITY_REPORTS, RELEASES, CTR_EXAMPLES)
