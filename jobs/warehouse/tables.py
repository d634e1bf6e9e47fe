"""The declared tables of the warehouse: name, key, columns, partitions and checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pyspark.sql import types as T


@dataclass(frozen=True)
class Table:
    """A declared table, from which docs/tables.md is generated.

    `key` identifies a row; `checks` are Delta CHECK constraints by name; `properties` are further properties of the
    Delta table, from which its Parquet writer takes its settings too; `meaning` describes each column. With
    `change_feed` Delta also keeps which rows each version changed, for consumers that update an index of their own.
    """

    name: str
    key: tuple[str, ...]
    schema: T.StructType
    partition_by: tuple[str, ...] = ()
    checks: Mapping[str, str] = field(default_factory=dict)
    properties: Mapping[str, str] = field(default_factory=dict)
    change_feed: bool = False
    description: str = ""
    meaning: Mapping[str, str] = field(default_factory=dict)


SHORT, INT, LONG, FLOAT, BOOLEAN = T.ShortType(), T.IntegerType(), T.LongType(), T.FloatType(), T.BooleanType()
STRING, BINARY, DATE = T.StringType(), T.BinaryType(), T.DateType()
VERSIONS = T.MapType(STRING, LONG)


def _columns(optional: tuple[str, ...] = (), /, **types: T.DataType) -> T.StructType:
    """A schema; columns named in `optional` are nullable."""
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
    description="One fused vector per item; a row is replaced when its content changes.",
    meaning={
        "item_id": "the item",
        "embedding": "the fused vector: packed little-endian float32 or float16",
        "dim": "components of the vector",
        "modalities": "modalities that the item has; a missing one is a block of zeros",
        "content_hash": "hash of the vector's bytes",
        "first_seen": "day of the run that first stored the item",
        "run_date": "day of the run that last changed the vector",
    },
)
REJECTED_EMBEDDINGS = Table(
    "rejected_embeddings",
    ("run_date", "item_id", "occurrence"),
    _columns(("item_id",), item_id=STRING, occurrence=INT, reason=STRING, detail=STRING, excerpt=STRING, run_date=DATE),
    partition_by=("run_date",),
    description="Input rows that were not stored, each with its reason.",
    meaning={
        "item_id": "the item as the source names it",
        "occurrence": "counts rows of the same item and day from 1",
        "reason": "short name of what is wrong",
        "detail": "what is wrong with the value, in words",
        "excerpt": "the beginning of the value",
        "run_date": "day of the run",
    },
)
# The code of the ID and the most probable others, with weights in 1/255; of one level, or level by level.
ALTERNATE = T.StructType().add("codes", T.ArrayType(INT)).add("weights", T.ArrayType(SHORT))
SEMANTIC_IDS = Table(
    "semantic_ids",
    ("codebook_version", "item_id"),
    _columns(
        ("alternates", "squared_error"),
        codebook_version=INT,
        item_id=STRING,
        codes=T.ArrayType(INT),
        suffix=INT,
        semantic_id=STRING,
        confidence=FLOAT,
        log_likelihood=FLOAT,
        codebook_hash=STRING,
        content_hash=STRING,
        held=BOOLEAN,
        run_date=DATE,
        alternates=T.ArrayType(ALTERNATE),
        squared_error=FLOAT,
    ),
    partition_by=("codebook_version",),
    checks={"suffix_counts_from_zero": "suffix >= 0", "confidence_is_a_probability": "confidence BETWEEN 0 AND 1"},
    change_feed=True,
    description="The semantic ID of every item under every codebook version. IDs of a version that was released never "
    "change.",
    meaning={
        "codebook_version": "version in the MLflow registry",
        "item_id": "the item",
        "codes": "one component index a level",
        "suffix": "separates items with equal codes; 0 for the first",
        "semantic_id": "the text form, such as 12-87 or 12-87-1",
        "confidence": "posterior probability of the codes",
        "log_likelihood": "log of the sum of p(x, codes) over the codes of the last level, in nats",
        "codebook_hash": "content hash of the codebook",
        "content_hash": "of the vector that was encoded",
        "held": "whether the item keeps codes that are not the most probable ones of this codebook: after a refit, or "
        "after its vector changed",
        "run_date": "day of the run that wrote the row",
        "alternates": "the soft ID: per level the code and the most probable other codes with weights in 1/255; null "
        "in rows that a development version before 0.1.0 wrote",
        "squared_error": "squared distance of the vector to the sum of its components' means; null in rows that "
        "a development version before 0.1.0 wrote, until the next encode",
    },
)
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
        ("judged_against", "evaluated_at"),
        codebook_version=INT,
        run_id=STRING,
        codebook_hash=STRING,
        metrics=T.MapType(STRING, T.DoubleType()),
        passed=BOOLEAN,
        reasons=T.ArrayType(STRING),
        least_certain=T.ArrayType(UNCERTAIN_ITEM),
        judged_against=INT,
        table_versions=VERSIONS,
        run_date=DATE,
        evaluated_at=T.TimestampType(),
    ),
    description="The evaluation of a codebook version on given table versions, with the verdict of the gate.",
    meaning={
        "codebook_version": "version in the MLflow registry",
        "run_id": "digest of what was evaluated: codebook, table versions, settings of gate and evaluate",
        "codebook_hash": "content hash of the codebook",
        "metrics": "every metric by name",
        "passed": "whether the gate passed",
        "reasons": "limits that were not met",
        "least_certain": "items with the lowest confidence",
        "judged_against": "codebook version of the champion that it was compared with",
        "table_versions": "versions of the tables that were evaluated",
        "run_date": "day of the run",
        "evaluated_at": "time of the last evaluation with this result; `sid promote` reads the newest report",
    },
)
RELEASES = Table(
    "releases",
    ("release_id",),
    _columns(
        ("previous",),
        release_id=LONG,
        codebook_version=INT,
        codebook_hash=STRING,
        table_versions=VERSIONS,
        previous=LONG,
        status=STRING,
        at=T.TimestampType(),
    ),
    description="One row per release, only appended. Readers follow the row with the highest release_id.",
    meaning={
        "release_id": "counts from 1",
        "codebook_version": "version in the MLflow registry",
        "codebook_hash": "content hash of the codebook",
        "table_versions": "versions of the tables that belong to the release",
        "previous": "release that was current before",
        "status": "promoted or rolled back",
        "at": "time of the release, UTC",
    },
)
BEHAVIOUR = T.StructType([*T.StructType().add("item_id", STRING).add("ts", LONG), *ALTERNATE])
IMPRESSION = T.StructType(
    [
        *T.StructType().add("item_id", STRING).add("label", INT).add("ts", LONG).add("known", INT).add("split", STRING),
        *T.StructType().add("features", T.ArrayType(FLOAT)).add("shown", INT),
        *ALTERNATE,
    ]
)
CTR_EXAMPLES = Table(
    "ctr_examples",
    ("user_id", "part"),
    _columns(
        user_id=STRING,
        part=INT,
        last=BOOLEAN,
        length_bucket=INT,
        behaviours=T.ArrayType(BEHAVIOUR),
        impressions=T.ArrayType(IMPRESSION),
    ),
    partition_by=("length_bucket",),
    # Training holds some row groups at a time. By default a row group has 128 MiB, and no fewer than 100 rows, which of
    # users with long histories is more.
    properties={"parquet.block.size": str(2**24), "parquet.page.size.row.check.min": "1"},
    description="Training examples of the CTR model, one row per user and part: a user with very many impressions has "
    "several. The history of an impression is `behaviours[max(0, known - train.history) : known]`.",
    meaning={
        "user_id": "the user",
        "part": "counts from 0; each part has the behaviours that its impressions need",
        "last": "whether it is the last part of the user, which also has the behaviours after the last impression",
        "length_bucket": "floor of log2(1 + behaviours + impressions)",
        "behaviours": "clicks in order of time; `codes` and `weights` (in 1/255) are the alternates of the item's "
        "semantic ID, level by level, empty without one",
        "impressions": "what to learn from, in order of time; `known` behaviours happened strictly before, `features` "
        "are as of then, `shown` counts the item's rows in the training split",
    },
)
USER_INTERESTS = Table(
    "user_interests",
    ("ctr_version", "user_id"),
    _columns(
        ctr_version=INT,
        user_id=STRING,
        codebook_hash=STRING,
        model_digest=STRING,
        history_hash=LONG,
        interests=BINARY,
        checksum=LONG,
    ),
    partition_by=("ctr_version",),
    description="Cached interests of every user under the CTR champion, and under the one before it.",
    meaning={
        "ctr_version": "version of the CTR model in the MLflow registry",
        "user_id": "the user",
        "codebook_hash": "content hash of the codebook whose codes the model reads",
        "model_digest": "SHA-256 of the model's tensors",
        "history_hash": "xxhash64 of the behaviours that the interests were computed from",
        "interests": "the tensors of the interests as little-endian float32, one after the other",
        "checksum": "CRC-32 of all the other columns but `ctr_version`",
    },
)
TABLES = (
    ITEM_EMBEDDINGS,
    REJECTED_EMBEDDINGS,
    SEMANTIC_IDS,
    QUALITY_REPORTS,
    RELEASES,
    CTR_EXAMPLES,
    USER_INTERESTS,
)
