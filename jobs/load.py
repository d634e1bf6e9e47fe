"""load: raw vectors -> `item_embeddings` (fused, packed) and `rejected_embeddings` (with reasons).

Every input row ends in exactly one of the two. Parquet is read by the tasks themselves with pyarrow (any float width),
twice: first every row is judged, and only verdicts and hashes reach Spark; then those whose vector the table lacks are
packed and written. A night on which little changed moves few vectors. Of a Delta source Spark makes Parquet first.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema, to_arrow_schema

from jobs.config import Config, ConfigError
from jobs.packed import Float32, pack
from jobs.sources import RowGroup, filesystem_of
from jobs.sources import open_source as open_files
from jobs.tables import ITEM_EMBEDDINGS, REJECTED_EMBEDDINGS, SchemaError, Warehouse

ROWS_PER_BATCH = 4096
ROWS_TO_INFER_DIMENSION = 1000
BYTES_A_FILE = 2**27
UNCHANGED = "expected the source to stay as it is until load ends. Run it again"
EXCERPT_CHARACTERS = 120
CHECKED = pa.schema(
    [
        ("item_id", pa.string()),
        ("embedding", pa.binary()),
        ("modalities", pa.list_(pa.string())),
        ("content_hash", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("excerpt", pa.string()),
    ]
)
# Where a row stands in the source: which of its row groups, and which row of that.
JUDGED = pa.schema(
    [*(field for field in CHECKED if field.name != "embedding"), ("row_group", pa.int32()), ("row", pa.int32())]
)
STORED = to_arrow_schema(ITEM_EMBEDDINGS.schema)


@dataclass(frozen=True)
class Fusion:
    """The recipe from modality vectors to one embedding; stored with the table and in every codebook manifest.

    Each modality is scaled to unit length and multiplied by the root of its weight, a missing one is a block of zeros,
    the blocks are concatenated and the whole is scaled to unit length. With `normalize` off, lengths are left alone.
    """

    item_id: str
    dims: Mapping[str, int]
    weights: Mapping[str, float]
    normalize: bool
    dtype: str

    @property
    def dim(self) -> int:
        return sum(self.dims.values())

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Fusion:
        return Fusion(**json.loads(text))


@dataclass(frozen=True)
class LoadResult:
    rows_in: int
    rows_stored: int  # rows of the input that stand in the table afterwards
    rows_rejected: int
    new: int
    changed: int
    reasons: Mapping[str, int]
    version: int
    seconds: float = 0.0
    nothing_to_do: bool = False


@dataclass(frozen=True)
class Source:
    """What is to be read: for Parquet the row groups (path, index), for Delta a version."""

    path: str
    format: str
    schema: pa.Schema
    fingerprint: str
    row_groups: tuple[RowGroup, ...] = field(default=(), repr=False)
    version: int | None = None


def run(config: Config, warehouse: Warehouse, run_date: date) -> LoadResult:
    """Load the source of `config.load`; rows that did not change are not written again.

    Raises:
        ConfigError, SchemaError: the source, a column or the recipe is not what was asked for.
    """
    began = time.monotonic()
    source = open_source(config, warehouse)
    fusion = resolve_fusion(config, warehouse, source)
    done = warehouse.property(ITEM_EMBEDDINGS, "sid.last_load")
    if done is not None and json.loads(done)["fingerprint"] == source.fingerprint:
        last = LoadResult(**json.loads(done)["result"])
        version = warehouse.version(ITEM_EMBEDDINGS)
        return replace(last, new=0, changed=0, version=version, seconds=time.monotonic() - began, nothing_to_do=True)

    warehouse.create(ITEM_EMBEDDINGS)
    if warehouse.property(ITEM_EMBEDDINGS, "sid.fusion") is None:
        warehouse.set_property(ITEM_EMBEDDINGS, "sid.fusion", fusion.to_json())
    try:
        with (
            _as_parquet(source, fusion, warehouse) as files,
            warehouse.staged(_judged(files, fusion, warehouse), "load") as judged,
        ):
            rows_in = judged.count()
            if rows_in == 0:
                raise SchemaError(
                    f"load.source {source.path} has no rows; expected at least one item. Is the export finished?"
                )
            good, rejected = split_duplicates(judged)
            rejected = _numbered(rejected, run_date).cache()
            reasons = {row["reason"]: row["count"] for row in rejected.groupBy("reason").count().collect()}
            rows_rejected = sum(reasons.values())
            if rows_rejected or warehouse.exists(REJECTED_EMBEDDINGS):
                warehouse.replace(REJECTED_EMBEDDINGS, rejected, f"run_date = '{run_date}'")
            rejected.unpersist()
            new, changed = _store(good, files, fusion, warehouse, run_date)
    except PySparkException as error:
        # Of a Delta table one version is read, which does not change.
        if source.format == "parquet" and open_source(config, warehouse).fingerprint != source.fingerprint:
            raise SchemaError(f"load.source {source.path} changed while it was read; {UNCHANGED}") from error
        raise
    result = LoadResult(rows_in, rows_in - rows_rejected, rows_rejected, new, changed, reasons, version=-1)
    warehouse.set_property(
        ITEM_EMBEDDINGS, "sid.last_load", json.dumps({"fingerprint": source.fingerprint, "result": asdict(result)})
    )
    return replace(result, version=warehouse.version(ITEM_EMBEDDINGS), seconds=time.monotonic() - began)


def open_source(config: Config, warehouse: Warehouse) -> Source:
    """Find the source and read its schema and footers (no rows)."""
    load = config.load
    if not load.source:
        raise ConfigError(
            "load.source is empty; give a Parquet file or folder, or a Delta table: --set load.source=PATH"
        )
    settings = config.digest("load")
    if load.source_format == "delta":
        from delta import DeltaTable

        if not DeltaTable.isDeltaTable(warehouse.spark, load.source):
            raise ConfigError(
                f"load.source {load.source} is not a Delta table; expected one, since load.source_format is delta"
            )
        latest = DeltaTable.forPath(warehouse.spark, load.source).history(1).select("version").first()
        assert latest is not None
        version = int(latest["version"])
        frame = warehouse.spark.read.format("delta").option("versionAsOf", version).load(load.source)
        return Source(
            load.source,
            "delta",
            to_arrow_schema(frame.schema),
            _digest([load.source, version, settings]),
            version=version,
        )

    files = open_files(load.source, load.source_format, setting="load.source_format")
    return Source(load.source, "parquet", files.schema, _digest([files.fingerprint, settings]), files.row_groups)


def resolve_fusion(config: Config, warehouse: Warehouse, source: Source) -> Fusion:
    """The recipe of the table if it has one (the settings must agree with it), else the one the settings and source say."""
    load, names = config.load, source.schema.names
    columns = list(load.modalities) or [name for name in names if name.endswith("_embedding")]
    if load.item_id not in names:
        raise SchemaError(f"column {load.item_id!r} is missing from {source.path}; it has {names}. Set load.item_id")
    if not columns:
        raise SchemaError(
            f"no column of {source.path} ends in '_embedding'; it has {names}. Name them: load.modalities={{col = 1.0}}"
        )
    for column in columns:
        if column not in names:
            raise SchemaError(f"column {column!r} is missing from {source.path}; it has {names}. Set load.modalities")
        if not _is_vector(source.schema.field(column).type):
            raise SchemaError(
                f"column {column!r} has type {source.schema.field(column).type}; expected a list of numbers or packed binary"
            )
    kind = source.schema.field(load.item_id).type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise SchemaError(f"item id column {load.item_id!r} has type {kind}; expected integers or strings")
    weights = {column: float(load.modalities.get(column, 1.0)) for column in columns}

    stored = warehouse.property(ITEM_EMBEDDINGS, "sid.fusion")
    if stored is None:
        return Fusion(
            load.item_id, _dimensions(config, source, columns, warehouse), weights, load.normalize, load.dtype
        )
    fusion = Fusion.from_json(stored)
    asked = replace(fusion, item_id=load.item_id, weights=weights, normalize=load.normalize, dtype=load.dtype)
    asked = replace(asked, dims={column: load.dims.get(column, fusion.dims.get(column, 0)) for column in columns})
    if replace(asked, item_id=fusion.item_id) != fusion:
        raise ConfigError(
            f"item_embeddings was fused with {stored}, the settings now say {asked.to_json()}; one table holds one recipe. "
            "Set load.* back, or start a new warehouse for the new recipe (--warehouse DIR)"
        )
    return asked


def _dimensions(config: Config, source: Source, columns: list[str], warehouse: Warehouse) -> dict[str, int]:
    """Dimension of each modality: as configured, else the commonest in the first rows if more than half have it."""
    dims = dict(config.load.dims)
    unknown = [column for column in columns if column not in dims]
    if not unknown:
        return {column: dims[column] for column in columns}
    if source.format == "delta":
        sample = (
            warehouse.spark.read.format("delta").option("versionAsOf", source.version).load(source.path)
            .select(*unknown).limit(ROWS_TO_INFER_DIMENSION).toArrow()
        )  # fmt: skip
    else:
        first, rows = [], 0
        for batch in (b for g in source.row_groups for b in _batches(source.path, g.path, g.index, unknown)):
            first.append(batch)
            rows += batch.num_rows
            if rows >= ROWS_TO_INFER_DIMENSION:
                break
        sample = (
            pa.Table.from_batches(first)
            if first
            else pa.table({c: pa.array([], pa.list_(pa.float32())) for c in unknown})
        )
    for column in unknown:
        values = sample.column(column).combine_chunks()
        lengths = Counter(int(n) for n in _lengths(values) if n > 0)
        if not lengths:
            raise SchemaError(
                f"column {column!r}: the first {len(values)} rows hold no vector, so its dimension is unknown; "
                f"expected vectors. Set load.dims={{{column} = D}} if they come later"
            )
        if _is_packed(values.type):  # of bytes; float32 unless they come in odd pairs or load.dims says so
            lengths = Counter(n // (4 if n % 4 == 0 else 2) for n in lengths.elements())
        dim, count = lengths.most_common(1)[0]
        if 2 * count <= lengths.total():
            raise SchemaError(
                f"column {column!r} mixes dimensions {dict(lengths.most_common(4))} (dimension: rows) and none has the majority; "
                f"expected one dimension. Say which is right, the other rows are then rejected: load.dims={{{column} = D}}"
            )
        dims[column] = dim
    return {column: dims[column] for column in columns}


@contextmanager
def _as_parquet(source: Source, fusion: Fusion, warehouse: Warehouse) -> Iterator[Source]:
    """The source itself, or for the time being Parquet files of the rows of a Delta table."""
    if source.format == "parquet":
        yield source
        return
    frame = warehouse.spark.read.format("delta").option("versionAsOf", source.version).load(source.path)
    with warehouse.staging("source") as folder:
        frame.select(fusion.item_id, *fusion.dims).write.mode("overwrite").parquet(folder)
        yield replace(source, path=folder, row_groups=open_files(folder).row_groups)


# ---- rows: read and check (runs in the tasks) ----


def _judged(source: Source, fusion: Fusion, warehouse: Warehouse) -> DataFrame:
    """Every row of the source, without its vector: a hash of that, or why the row is rejected."""
    root, columns = source.path, [fusion.item_id, *fusion.dims]

    def judge(groups: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for group in (row for batch in groups for row in batch.to_pylist()):
            start = 0
            for batch in _batches(root, group["path"], group["index"], columns):
                end = start + len(batch)
                place = {
                    "row_group": pa.array(np.full(len(batch), group["row_group"], np.int32)),
                    "row": pa.array(np.arange(start, end, dtype=np.int32)),
                }
                yield _with(check_rows(batch, fusion), place, JUDGED)
                start = end

    groups = len(source.row_groups)
    work = _row_groups(source, warehouse, range(groups)).repartitionById(max(1, groups), F.col("task"))
    return work.mapInArrow(judge, from_arrow_schema(JUDGED))


def _packed(work: DataFrame, root: str, fusion: Fusion, run_date: date) -> DataFrame:
    """The rows of `item_embeddings` for the `pending` ones of each row group of `work`, which are in their order there."""
    columns = [fusion.item_id, *fusion.dims]

    def pack_pending(groups: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for group in (batch.slice(row, 1) for batch in groups for row in range(len(batch))):
            path, index, pending = (group.column(name)[0] for name in ("path", "index", "pending"))
            yield from pack_group(path.as_py(), index.as_py(), pending.values)

    def pack_group(path: str, index: int, pending: pa.StructArray) -> Iterator[pa.RecordBatch]:
        rows, start = pending.field("row").to_numpy(), 0
        for batch in _batches(root, path, index, columns):
            first, end = np.searchsorted(rows, (start, start + len(batch))).tolist()
            if first < end:
                # All of the batch is checked, as how wide packed numbers are is seen in a batch.
                checked = check_rows(batch, fusion).take(pa.array(rows[first:end] - start))
                yield _stored(checked, pending.slice(first, end - first), fusion, run_date)
            start += len(batch)
        if rows[-1] >= start:
            raise SchemaError(f"a row group has {start} rows, fewer than when it was judged; {UNCHANGED}")

    return work.mapInArrow(pack_pending, ITEM_EMBEDDINGS.schema)


def _stored(checked: pa.RecordBatch, pending: pa.StructArray, fusion: Fusion, run_date: date) -> pa.RecordBatch:
    for name in ("item_id", "content_hash"):
        if not checked.column(name).equals(pending.field(name)):
            raise SchemaError(f"a row has another {name} than when it was judged; {UNCHANGED}")
    n, today = len(checked), pa.scalar(run_date, pa.date32())
    added = {
        "dim": pa.array(np.full(n, fusion.dim, np.int32)),
        "first_seen": pending.field("first_seen").fill_null(today),
        "run_date": pa.repeat(today, n),
    }
    return _with(checked, added, STORED)


def _with(batch: pa.RecordBatch, added: Mapping[str, pa.Array], schema: pa.Schema) -> pa.RecordBatch:
    columns = [added[name] if name in added else batch.column(name) for name in schema.names]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _row_groups(source: Source, warehouse: Warehouse, task_of: Sequence[int | None]) -> DataFrame:
    """The row groups of the source that have a task, each with it."""
    places = [
        (group.path, group.index, number, task)
        for number, (group, task) in enumerate(zip(source.row_groups, task_of, strict=True))
        if task is not None
    ]
    return warehouse.spark.createDataFrame(places, "path STRING, index INT, row_group INT, task INT")


def _batches(root: str, path: str, row_group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    filesystem, _ = filesystem_of(root)
    file = pq.ParquetFile(path, filesystem=filesystem)
    return iter(file.iter_batches(ROWS_PER_BATCH, row_groups=[row_group], columns=columns))


def check_rows(batch: pa.RecordBatch, fusion: Fusion) -> pa.RecordBatch:
    """One output row per input row: packed embedding and its hash, or a reason; never both, never neither."""
    n = batch.num_rows
    ids = batch.column(batch.schema.get_field_index(fusion.item_id)).cast(pa.string()).to_pylist()
    verdicts = _Verdicts(n)
    verdicts.reject(
        np.array([not i for i in ids], bool),
        "null_item_id",
        lambda _: "item id is null or empty; expected an integer or a string",
        lambda _: "",
    )
    present = np.zeros((n, len(fusion.dims)), bool)
    blocks: list[Float32] = []
    for number, name in enumerate(fusion.dims):
        block, present[:, number] = _checked_modality(
            batch.column(batch.schema.get_field_index(name)), name, fusion, verdicts
        )
        blocks.append(block)
    verdicts.reject(
        ~present.any(1),
        "null_embedding",
        lambda _: "every modality is null; expected at least one vector",
        lambda _: "null",
    )

    fused = np.concatenate(blocks, axis=1) if len(blocks) > 1 else blocks[0]
    if fusion.normalize:
        with np.errstate(invalid="ignore", divide="ignore"):  # rejected rows only; good ones have a norm
            fused /= np.linalg.norm(fused, axis=1, keepdims=True)
    good = np.array([why is None for why in verdicts.reason], bool)
    packed = pack(fused.astype(np.float32), fusion.dtype, good)
    return pa.RecordBatch.from_arrays(
        [
            pa.array(ids, pa.string()),
            packed,
            _names(present, list(fusion.dims), good),
            pa.array(_content_hashes(packed, good), pa.string()),
            pa.array(verdicts.reason, pa.string()),
            pa.array(verdicts.detail, pa.string()),
            pa.array(verdicts.excerpt, pa.string()),
        ],
        schema=CHECKED,
    )


def _content_hashes(packed: pa.Array, good: Any) -> list[str | None]:
    data, width = memoryview(packed.buffers()[2]), packed.buffers()[2].size // max(1, len(packed))
    hashes: list[str | None] = [None] * len(packed)
    for row in np.flatnonzero(good).tolist():
        vector = data[row * width : (row + 1) * width]
        hashes[row] = hashlib.blake2b(vector, digest_size=16, person=b"embedding").hexdigest()
    return hashes


def _names(present: Any, names: list[str], good: Any) -> pa.Array:
    """The names of the modalities that each row has; null where it is not good."""
    present = present & good[:, None]
    ends = np.cumsum(present.sum(1), dtype=np.int32)
    values = pa.array(names, pa.string()).take(pa.array(np.nonzero(present)[1]))
    return pa.ListArray.from_arrays(np.concatenate([[0], ends]).astype(np.int32), values, mask=pa.array(~good))


class _Verdicts:
    """Why each row of a batch is rejected, if it is; the first reason found for a row stands."""

    def __init__(self, rows: int) -> None:
        self.reason: list[str | None] = [None] * rows
        self.detail = [""] * rows
        self.excerpt = [""] * rows

    def reject(self, rows: Any, why: str, what: Callable[[int], str], value: Callable[[int], str]) -> None:
        for row in np.flatnonzero(rows):
            if self.reason[row] is None:
                self.reason[row], self.detail[row] = why, what(row)
                self.excerpt[row] = value(row)[:EXCERPT_CHARACTERS]


def _checked_modality(column: pa.Array, name: str, fusion: Fusion, verdicts: _Verdicts) -> tuple[Float32, Any]:
    """The weighted block (n, dim) of one modality, zeros where it is missing or wrong, and which rows have it."""
    dim = fusion.dims[name]
    lengths = _lengths(column)
    here = lengths >= 0
    width = _packed_width(column.type, lengths, dim)
    fits = here & (lengths == dim * width)

    def shown(row: int) -> str:
        return _excerpt(column[int(row)].as_py())

    verdicts.reject(
        here & ~fits, "wrong_dimension", lambda r: f"{name} has {lengths[r] / width:g} components; expected {dim}", shown
    )  # fmt: skip
    x = _matrix(column, fits, dim, width)
    nans, infs = np.isnan(x).sum(1), np.isinf(x).sum(1)
    verdicts.reject(nans > 0, "nan", lambda r: f"{name} has {nans[r]} NaN; expected numbers", shown)
    verdicts.reject(infs > 0, "inf", lambda r: f"{name} has {infs[r]} infinities; expected finite numbers", shown)
    x[~np.isfinite(x).all(1)] = 0.0
    norm = np.linalg.norm(x.astype(np.float64), axis=1)
    verdicts.reject(
        fits & (norm == 0),  # a row with NaN or Inf has its reason already
        "zero_norm",
        lambda _: f"{name} is all zeros and has no direction; expected a vector",
        shown,
    )
    block = x / np.where(norm > 0, norm, 1.0)[:, None] if fusion.normalize else x
    return np.sqrt(fusion.weights[name]) * block, fits


def _is_vector(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return bool(pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))
    return _is_packed(kind)


def _lengths(column: pa.Array) -> Any:
    """Elements (bytes, if packed) of each row; -1 for null."""
    import pyarrow.compute as pc

    lengths = pc.binary_length(column) if _is_packed(column.type) else pc.list_value_length(column)
    return pc.fill_null(lengths, -1).to_numpy(zero_copy_only=False)


def _is_packed(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _packed_width(kind: pa.DataType, lengths: Any, dim: int) -> int:
    """1 for lists; bytes a component for packed ones: 4 unless the batch has rows of 2 or 8 dim bytes and none of 4 dim."""
    if not _is_packed(kind):
        return 1
    return next((width for width in (4, 2, 8) if (lengths == width * dim).any()), 4)


def _matrix(column: pa.Array, fits: Any, dim: int, width: int) -> Float32:
    """(N, dim) float32, zeros where a row does not fit; a null inside a list becomes NaN."""
    x = np.zeros((len(column), dim), np.float32)
    rows = np.flatnonzero(fits)
    if len(rows) == 0:
        return x
    chosen = column.take(pa.array(rows))
    if _is_packed(column.type):
        flat = np.frombuffer(b"".join(chosen.to_pylist()), {4: "<f4", 2: "<f2", 8: "<f8"}[width])
    else:
        flat = chosen.flatten().to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore"):  # a double beyond float32 becomes Inf, and is rejected as such
        x[rows] = flat.astype(np.float32).reshape(len(rows), dim)
    return x


def _excerpt(value: Any) -> str:
    if isinstance(value, bytes):
        return value[:24].hex(" ")
    shown = ", ".join("null" if v is None else f"{v:.4g}" for v in value[:8])
    return f"[{shown}{', ...' if len(value) > 8 else ''}]"


# ---- tables ----


def split_duplicates(judged: DataFrame) -> tuple[DataFrame, DataFrame]:
    """Good rows with one row per item id, and rejected rows.

    Identical copies of an item: the first is kept. Different vectors under one id: all are rejected, since which is right
    is not ours to guess.
    """
    valid, place = judged.where(F.col("reason").isNull()), F.struct("row_group", "row")
    items = valid.groupBy("item_id").agg(
        F.count(F.lit(1)).alias("copies"),
        F.min("content_hash").alias("content_hash"),
        F.max("content_hash").alias("largest_hash"),
        F.min(place).alias("first"),
    )
    good = items.where("content_hash = largest_hash").select(
        "item_id", "content_hash", F.col("first.row_group").alias("row_group"), F.col("first.row").alias("row")
    )
    offenders = items.where("copies > 1").select("item_id", "copies", "first")
    several = valid.join(offenders, "item_id").withColumn(
        "vectors", F.size(F.collect_set("content_hash").over(Window.partitionBy("item_id")))
    )
    conflicting = F.col("vectors") > 1
    refused = several.where(conflicting | (place != F.col("first"))).select(
        "item_id",
        F.when(conflicting, "duplicate_conflicting").otherwise("duplicate_identical").alias("reason"),
        F.when(
            conflicting,
            F.format_string(
                "item id occurs %d times with %d different vectors; expected one row per item", "copies", "vectors"
            ),
        )
        .otherwise(F.format_string("item id occurs %d times with the same vector; the first is kept", "copies"))
        .alias("detail"),
        F.col("content_hash").alias("excerpt"),
    )
    bad = judged.where(F.col("reason").isNotNull()).select("item_id", "reason", "detail", "excerpt")
    return good, bad.unionByName(refused)


def _numbered(rejected: DataFrame, run_date: date) -> DataFrame:
    order = Window.partitionBy("item_id").orderBy("reason", "detail", "excerpt")
    return rejected.select(
        "item_id",
        F.row_number().over(order).alias("occurrence"),
        "reason",
        "detail",
        "excerpt",
        F.lit(run_date).cast("date").alias("run_date"),
    )


def _store(good: DataFrame, source: Source, fusion: Fusion, warehouse: Warehouse, run_date: date) -> tuple[int, int]:
    """Upsert the rows whose content changed; returns (new, changed)."""
    stored = warehouse.read(ITEM_EMBEDDINGS).select("item_id", F.col("content_hash").alias("stored_hash"), "first_seen")
    pending = (
        good.join(stored, "item_id", how="left").where("stored_hash IS NULL OR stored_hash <> content_hash").cache()
    )
    try:
        counts = pending.groupBy("row_group").agg(F.count(F.lit(1)), F.count("stored_hash")).collect()
        rows, changed = (sum(int(group[column]) for group in counts) for column in (1, 2))
        if not rows:
            return 0, 0
        files = math.ceil(rows * fusion.dim * np.dtype(fusion.dtype).itemsize / BYTES_A_FILE)
        tasks = max(files, warehouse.cores)
        groups = _row_groups(source, warehouse, _tasks({group[0]: group[1] for group in counts}, source, tasks))
        by_group = pending.groupBy("row_group").agg(
            F.sort_array(F.collect_list(F.struct("row", "item_id", "content_hash", "first_seen"))).alias("pending")
        )
        work = by_group.join(F.broadcast(groups), "row_group").repartitionById(tasks, F.col("task"))
        packed = _packed(work, source.path, fusion, run_date)
        if changed:
            with warehouse.staged(packed, "changed") as staged:  # a MERGE reads its source twice
                warehouse.merge(ITEM_EMBEDDINGS, staged, update=True)
        else:  # a MERGE would shuffle the vectors to find what is known already: none of them is stored
            warehouse.append(ITEM_EMBEDDINGS, packed.repartition(1) if files == 1 else packed)
        return rows - changed, changed
    finally:
        pending.unpersist()


def _tasks(rows: Mapping[int, int], source: Source, tasks: int) -> list[int | None]:
    """For each row group its task, so that all get about as many of the `rows` (by row group), in order; None without rows."""
    total, before = sum(rows.values()), 0
    found: list[int | None] = []
    for group in range(len(source.row_groups)):
        found.append(before * tasks // total if group in rows else None)
        before += rows.get(group, 0)
    return found


def _digest(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]
