"""load: raw vectors -> `item_embeddings` (fused, packed) and `rejected_embeddings` (with reasons).

Every input row ends in exactly one of the two, which is counted in the tables after each load. Parquet is read by the tasks themselves with pyarrow (any float width),
twice: first every row is judged, and only verdicts and hashes reach Spark; then those whose vector the table lacks are
packed and written. A night on which little changed moves few vectors. Of a Delta source Spark makes Parquet first.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema, to_arrow_schema

from jobs.config import MAX_DIM, Config, ConfigError
from jobs.embeddings.packed import Float32, pack, packed_as, read_packed, width_of
from jobs.errors import SchemaError, WarehouseError
from jobs.files.sources import Source, SourceReader, open_source, quoted, row_group_frame
from jobs.files.values import as_ids, is_id_type
from jobs.fingerprint import fingerprint
from jobs.warehouse.delta_rs import count_and_version
from jobs.warehouse.delta_spark import Warehouse
from jobs.warehouse.tables import ITEM_EMBEDDINGS, REJECTED_EMBEDDINGS

ROWS_PER_BATCH = 4096
COMPONENTS_PER_BATCH = 2**26  # of longer rows a batch has fewer
VECTORS_TO_INFER_FROM = 1000
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
    Recipes of older tables have no `order`: their blocks come as the columns of the source do.
    """

    item_id: str
    dims: Mapping[str, int]
    weights: Mapping[str, float]
    normalize: bool
    dtype: str
    order: tuple[str, ...] = ()  # of the blocks, wherever the source has the columns

    @property
    def dim(self) -> int:
        return sum(self.dims.values())

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Fusion:
        values = json.loads(text)
        return Fusion(**{**values, "order": tuple(values.get("order", ()))})


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
    note: str = ""  # what of the source was read, where it is not everything, and how packed bytes were read

    def summary(self) -> str:
        counts = (
            f"{self.rows_in:,} rows in = {self.rows_stored:,} stored + {self.rows_rejected:,} rejected "
            f"({self.new:,} new, {self.changed:,} changed)"
        )
        return f"{counts}; {self.note}" if self.note else counts


@dataclass(frozen=True)
class Recipe:
    """How rows of the source become embeddings: the fusion, and what the bytes of packed columns are."""

    fusion: Fusion
    packed: Mapping[str, str]


def run(config: Config, warehouse: Warehouse, run_date: date) -> LoadResult:
    """Load the source of `config.load`; rows that did not change are not written again.

    Raises:
        ConfigError, SchemaError: the source, a column or the recipe is not what was asked for, or every row was rejected.
        WarehouseError: the tables do not hold afterwards what was put into them.
    """
    began = time.monotonic()
    source = opened(config)
    if source.format == "parquet" and source.rows == 0:
        raise SchemaError(_without_rows(source))
    recipe = resolve_recipe(config, warehouse, source)
    inputs = fingerprint([source.fingerprint, config.digest("load")])
    done = warehouse.property(ITEM_EMBEDDINGS, "sid.last_load")
    if done is not None and json.loads(done)["fingerprint"] == inputs:
        last = LoadResult(**json.loads(done)["result"])
        version = warehouse.version(ITEM_EMBEDDINGS)
        return replace(last, new=0, changed=0, version=version, seconds=time.monotonic() - began, nothing_to_do=True)

    warehouse.create(ITEM_EMBEDDINGS)
    try:
        with (
            _as_parquet(source, recipe.fusion, warehouse) as files,
            warehouse.staged(_judged(files, recipe, warehouse), "load") as judged,
        ):
            rows_in = judged.count()
            if rows_in == 0:
                raise SchemaError(_without_rows(source))
            good, rejected = split_duplicates(judged)
            reasons = _reject(_numbered(rejected, run_date), warehouse, run_date)
            rows_rejected = sum(reasons.values())
            if rows_rejected == rows_in:
                raise SchemaError(_nothing_left(source, reasons, warehouse, run_date))
            good = good.cache()
            try:
                if _stored_fusion(warehouse) is None:
                    warehouse.set_property(ITEM_EMBEDDINGS, "sid.fusion", recipe.fusion.to_json())
                new, changed = _store(good, files, recipe, warehouse, run_date)
                stored = warehouse.read(ITEM_EMBEDDINGS).select("item_id", "content_hash")
                rows_stored = good.join(stored, ["item_id", "content_hash"], how="left_semi").count()
            finally:
                good.unpersist()
    except PySparkException as error:
        # Of a Delta table one version is read, which does not change.
        if source.format == "parquet" and opened(config).fingerprint != source.fingerprint:
            raise SchemaError(f"load.source {source.location} changed while it was read; {UNCHANGED}") from error
        if sentence := re.search(r"\bSchemaError: (.*)", str(error)):  # of a task
            raise SchemaError(sentence[1]) from error
        raise
    if rows_in != rows_stored + rows_rejected:
        raise WarehouseError(
            f"{rows_in} rows were read, but {rows_stored} of them stand in item_embeddings and {rows_rejected} in "
            "rejected_embeddings; expected every row in one of the two. Does another command write to this warehouse? Run load again"
        )
    note = "; ".join(filter(None, [source.note, _packed_note(recipe)]))
    result = LoadResult(rows_in, rows_stored, rows_rejected, new, changed, reasons, version=-1, note=note)
    warehouse.set_property(
        ITEM_EMBEDDINGS, "sid.last_load", json.dumps({"fingerprint": inputs, "result": asdict(result)})
    )
    return replace(result, version=warehouse.version(ITEM_EMBEDDINGS), seconds=time.monotonic() - began)


def opened(config: Config) -> Source:
    """The source of `config.load`: its schema and footers, no rows."""
    load = config.load
    if not load.source:
        raise ConfigError(
            "load.source is empty; give a Parquet file or folder, or a Delta table: --set load.source=PATH"
        )
    return open_source(load.source, load.source_format, setting="load.source_format", snapshots=load.snapshots)


def _without_rows(source: Source) -> str:
    return f"load.source {source.location} has no rows; expected at least one item. Is the export finished?"


def _nothing_left(source: Source, reasons: Mapping[str, int], warehouse: Warehouse, run_date: date) -> str:
    counts = ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items(), key=lambda each: -each[1]))
    rows = warehouse.read(REJECTED_EMBEDDINGS).where(F.col("run_date") == F.lit(run_date))
    row = rows.orderBy(F.col("item_id").asc_nulls_last(), "occurrence").first()
    assert row is not None
    return (
        f"all {sum(reasons.values()):,} rows of load.source {source.location} were rejected ({counts}); expected items that "
        f"can be stored. For example item {row['item_id']!r}: {row['detail']}. rejected_embeddings has them all"
    )


def resolve_recipe(config: Config, warehouse: Warehouse, source: Source) -> Recipe:
    """The recipe of the table if it has one (the settings must agree with it), else the one the settings and source say."""
    load, names = config.load, source.schema.names
    columns = list(load.modalities) or [name for name in names if name.endswith("_embedding")]
    if load.item_id not in names:
        raise SchemaError(
            f"column {load.item_id!r} is missing from {source.location}; it has {names}. Set load.item_id"
        )
    if without := source.lacking.get(load.item_id):
        raise SchemaError(
            f"column {load.item_id!r} is missing from {without[0].rpartition('/')[2]}, one of {len(without)} such files of "
            f"{source.location}; expected it in each"
        )
    if not columns:
        raise SchemaError(
            f"no column of {source.location} ends in '_embedding'; it has {names}. Name them: load.modalities={{col = 1.0}}"
        )
    for column in columns:
        if column not in names:
            raise SchemaError(
                f"column {column!r} is missing from {source.location}; it has {names}. Set load.modalities"
            )
        kind = source.schema.field(column).type
        if not _is_vector(kind) and not _without_values(source, column):
            hint = " (Spark ML vectors: pyspark.ml.functions.vector_to_array)" if pa.types.is_struct(kind) else ""
            raise SchemaError(f"column {column!r} has type {kind}; expected a list of numbers or packed binary{hint}")
    kind = source.schema.field(load.item_id).type
    if not is_id_type(kind):
        raise SchemaError(f"item id column {load.item_id!r} has type {kind}; expected integers or strings")
    for setting, values in (("load.dims", load.dims), ("load.packed_dtype", load.packed_dtype)):
        for column in values:
            if column not in columns:
                near = difflib.get_close_matches(column, columns, n=1, cutoff=0.4)
                hint = f"did you mean {near[0]}?" if near else f"expected one of {columns}"
                raise ConfigError(f"{setting} names {column!r}, which is no modality; {hint}")
    weights = {column: float(load.modalities.get(column, 1.0)) for column in columns}

    stored = _stored_fusion(warehouse)
    known = {} if stored is None else stored.dims
    if stored is not None and set(stored.order) == set(columns):
        columns = list(stored.order)
    dims, packed = {}, {}
    for column in columns:
        dims[column], dtype = _read_as(config, source, column, load.dims.get(column, known.get(column)), warehouse)
        if dtype is not None:
            packed[column] = dtype
    fusion = Fusion(load.item_id, dims, weights, load.normalize, load.dtype, tuple(columns))
    if stored is not None and replace(fusion, item_id=stored.item_id, order=stored.order) != stored:
        raise ConfigError(
            f"item_embeddings was fused with {stored.to_json()}, the settings now say {fusion.to_json()}; one table holds one "
            "recipe. Set load.* back, or start a new warehouse for the new recipe (--warehouse DIR)"
        )
    return Recipe(fusion, packed)


def _stored_fusion(warehouse: Warehouse) -> Fusion | None:
    """The recipe of the rows of the table; a table without rows has none."""
    text = warehouse.property(ITEM_EMBEDDINGS, "sid.fusion")
    if text is None or (found := count_and_version(warehouse.root, ITEM_EMBEDDINGS)) is None or found[0] == 0:
        return None
    return Fusion.from_json(text)


def _read_as(
    config: Config, source: Source, column: str, dim: int | None, warehouse: Warehouse
) -> tuple[int, str | None]:
    """Dimension of a modality, and the dtype of its components if it is packed.

    The dimension is `dim` if that is known, else the commonest in the first vectors if more than half have it.
    """
    kind = source.schema.field(column).type
    dtype: str | None = config.load.packed_dtype.get(column)
    if _is_packed(kind):
        if dtype is not None and dim is not None:
            return dim, dtype
        values = _first_vectors(source, column, warehouse)
        if dim is not None and not len(values):
            return dim, dtype or "float32"  # of no vector
        dtype, dim = packed_as(values.to_pylist(), column, dim, dtype)
    else:
        if dtype is not None:
            raise ConfigError(
                f"load.packed_dtype names {column!r}, whose type is {kind}, not packed binary; leave it out"
            )
        if dim is None:
            dim = _commonest_length(_first_vectors(source, column, warehouse), column)
    if dim > MAX_DIM:
        raise SchemaError(f"column {column!r} has vectors of {dim} components; expected at most {MAX_DIM}")
    return dim, dtype


def _commonest_length(vectors: pa.Array, column: str) -> int:
    lengths = Counter(int(n) for n in _lengths(vectors) if n > 0)
    if not lengths:
        raise SchemaError(
            f"column {column!r}: its rows hold no vector, so its dimension is unknown; "
            f"expected vectors. Leave it out of load.modalities, or set load.dims={{{column} = D}} if they come later"
        )
    dim, count = lengths.most_common(1)[0]
    if 2 * count <= lengths.total():
        raise SchemaError(
            f"column {column!r} mixes dimensions {dict(lengths.most_common(4))} (dimension: rows) and none has the majority; "
            f"expected one dimension. Say which is right, the other rows are then rejected: load.dims={{{column} = D}}"
        )
    return dim


def _first_vectors(source: Source, column: str, warehouse: Warehouse) -> pa.Array:
    """The first rows of a column that are not null."""
    kind = source.schema.field(column).type
    if not _is_vector(kind):
        return pa.array([], pa.list_(pa.float32()))
    if source.format == "delta":
        frame = source.frame(warehouse.spark).select(quoted(column)).where(quoted(column).isNotNull())
        found = frame.limit(VECTORS_TO_INFER_FROM).toArrow().column(0).combine_chunks()
        return found.cast(kind) if _is_packed(kind) else found
    without = set(source.lacking.get(column, ()))
    first: list[pa.Array] = []
    reader = source.reader([column])
    for group in source.row_groups:
        if group.uri in without:
            continue
        for batch in reader.batches(group.uri, group.index):
            first.append(batch.column(0).drop_null())
            if sum(map(len, first)) >= VECTORS_TO_INFER_FROM:
                return pa.concat_arrays(first)[:VECTORS_TO_INFER_FROM]
    return pa.concat_arrays(first) if first else pa.array([], kind)


def _without_values(source: Source, column: str) -> bool:
    """Has a modality no value at all: null alone, or NaN alone, as pandas writes a column of None."""
    kind = source.schema.field(column).type
    if pa.types.is_null(kind):
        return True
    if not pa.types.is_floating(kind) or source.format == "delta":
        return False
    return all(len(_given(batch.column(0))) == 0 for batch in source.batches([column]))


def _given(numbers: pa.Array) -> Any:
    values = numbers.drop_null().to_numpy(zero_copy_only=False)
    return values[~np.isnan(values)]


def _packed_note(recipe: Recipe) -> str:
    return ", ".join(
        f"{column} read as packed {dtype}" for column, dtype in recipe.packed.items() if dtype != "float32"
    )


@contextmanager
def _as_parquet(source: Source, fusion: Fusion, warehouse: Warehouse) -> Iterator[Source]:
    """The source itself, or for the time being Parquet files of the rows of a Delta table."""
    if source.format == "parquet":
        yield source
        return
    with warehouse.staging("source") as folder:
        frame = source.frame(warehouse.spark).select(quoted(fusion.item_id), *map(quoted, fusion.dims))
        frame.write.mode("overwrite").parquet(folder)
        yield open_source(folder, "parquet")


# ---- rows: read and check (runs in the tasks) ----


def _judged(source: Source, recipe: Recipe, warehouse: Warehouse) -> DataFrame:
    """Every row of the source, without its vector: a hash of that, or why the row is rejected."""
    reader = _reader(source, recipe)

    def judge(groups: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for group in (row for batch in groups for row in batch.to_pylist()):
            start = 0
            for batch in reader.batches(group["uri"], group["index"]):
                end = start + len(batch)
                place = {
                    "row_group": pa.array(np.full(len(batch), group["row_group"], np.int32)),
                    "row": pa.array(np.arange(start, end, dtype=np.int32)),
                }
                yield _with(check_rows(batch, recipe.fusion, recipe.packed), place, JUDGED)
                start = end

    groups = len(source.row_groups)
    work = row_group_frame(warehouse.spark, source, range(groups)).repartitionById(max(1, groups), F.col("task"))
    return work.mapInArrow(judge, from_arrow_schema(JUDGED))


def _reader(source: Source, recipe: Recipe) -> SourceReader:
    fusion = recipe.fusion
    rows = max(1, min(ROWS_PER_BATCH, COMPONENTS_PER_BATCH // fusion.dim))
    return source.reader([fusion.item_id, *fusion.dims], rows, as_written=[fusion.item_id])


def _packed(work: DataFrame, source: Source, recipe: Recipe, run_date: date) -> DataFrame:
    """The rows of `item_embeddings` for the `pending` ones of each row group of `work`, which are in their order there."""
    reader = _reader(source, recipe)

    def pack_pending(groups: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for group in (batch.slice(row, 1) for batch in groups for row in range(len(batch))):
            uri, index, pending = (group.column(name)[0] for name in ("uri", "index", "pending"))
            yield from pack_group(uri.as_py(), index.as_py(), pending.values)

    def pack_group(uri: str, index: int, pending: pa.StructArray) -> Iterator[pa.RecordBatch]:
        rows, start = pending.field("row").to_numpy(), 0
        for batch in reader.batches(uri, index):
            first, end = np.searchsorted(rows, (start, start + len(batch))).tolist()
            if first < end:
                chosen = batch.take(pa.array(rows[first:end] - start))
                checked = check_rows(chosen, recipe.fusion, recipe.packed)
                yield _stored(checked, pending.slice(first, end - first), recipe.fusion, run_date)
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


def check_rows(batch: pa.RecordBatch, fusion: Fusion, packed: Mapping[str, str] | None = None) -> pa.RecordBatch:
    """One output row per input row: packed embedding and its hash, or a reason; never both, never neither.

    What becomes of a row does not depend on the other rows. `packed` has the dtype of each column of packed bytes.
    """
    n = batch.num_rows
    texts, no_ids = as_ids(batch.column(batch.schema.get_field_index(fusion.item_id)))
    ids = texts.to_pylist()
    verdicts = _Verdicts(n)
    verdicts.reject(
        no_ids,
        "wrong_item_id",
        lambda r: (
            f"item id is {ids[r][:EXCERPT_CHARACTERS]}; expected text in UTF-8, or a whole number that its type holds exactly"
        ),
        lambda r: str(ids[r]),
    )
    verdicts.reject(
        np.array([not i for i in ids], bool),
        "null_item_id",
        lambda _: "item id is null or empty; expected an integer or a string",
        lambda _: "",
    )
    present = np.zeros((n, len(fusion.dims)), bool)
    blocks: list[Float32] = []
    for number, name in enumerate(fusion.dims):
        column = batch.column(batch.schema.get_field_index(name))
        dtype = (packed or {}).get(name, "float32") if _is_packed(column.type) else None
        block, present[:, number] = _checked_modality(column, name, dtype, fusion, verdicts)
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
    stored = _as_stored(fused, fusion, verdicts)
    good = np.array([why is None for why in verdicts.reason], bool)
    column = pack(stored, fusion.dtype, good)
    return pa.RecordBatch.from_arrays(
        [
            pa.array(ids, pa.string()),
            column,
            _names(present, list(fusion.dims), good),
            pa.array(_content_hashes(column, good), pa.string()),
            pa.array(verdicts.reason, pa.string()),
            pa.array(verdicts.detail, pa.string()),
            pa.array(verdicts.excerpt, pa.string()),
        ],
        schema=CHECKED,
    )


def _as_stored(fused: Any, fusion: Fusion, verdicts: _Verdicts) -> Any:
    """The fused vectors in the type of the table; rows that it cannot hold are rejected."""
    with np.errstate(over="ignore", invalid="ignore"):
        stored = fused.astype(fusion.dtype)
    largest = np.finfo(fusion.dtype).max

    def shown(row: int) -> str:
        return _excerpt(fused[row].tolist())

    verdicts.reject(
        ~np.isfinite(stored).all(1),
        "inf",
        lambda r: (
            f"the embedding has a component of {np.abs(fused[r]).max():.4g}; expected at most {largest:.4g}, "
            f"the largest of {fusion.dtype} (load.dtype)"
        ),
        shown,
    )
    verdicts.reject(
        ~stored.any(1),
        "zero_norm",
        lambda _: f"the embedding is all zeros in {fusion.dtype}; expected larger components, or load.dtype float32",
        shown,
    )
    return stored


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
        for row in np.flatnonzero(rows).tolist():
            if self.reason[row] is None:
                self.reason[row], self.detail[row] = why, what(row)
                self.excerpt[row] = value(row)[:EXCERPT_CHARACTERS]


def _checked_modality(
    column: pa.Array, name: str, dtype: str | None, fusion: Fusion, verdicts: _Verdicts
) -> tuple[Float32, Any]:
    """The weighted block (n, dim) of one modality, zeros where it is missing or wrong, and which rows have it.

    `dtype` is what the components of a packed column are; None for lists.
    """
    dim = fusion.dims[name]
    if not _is_vector(column.type):  # a column without values has no type of its own
        column = pa.nulls(len(column), pa.list_(pa.float32()))
    lengths = _lengths(column)
    here = lengths >= 0
    width = 1 if dtype is None else width_of(dtype)
    fits = here & (lengths == dim * width)

    def shown(row: int) -> str:
        return _excerpt(column[int(row)].as_py())

    verdicts.reject(
        here & ~fits, "wrong_dimension", lambda r: f"{name} has {lengths[r] / width:g} components; expected {dim}", shown
    )  # fmt: skip
    x = _matrix(column, fits, dim, dtype)
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
        value = kind.value_type
        return bool(
            pa.types.is_floating(value) or pa.types.is_integer(value) or pa.types.is_decimal(value)
            or pa.types.is_null(value)  # lists that are all empty
        )  # fmt: skip
    return _is_packed(kind)


def _lengths(column: pa.Array) -> Any:
    """Elements (bytes, if packed) of each row; -1 for null."""
    import pyarrow.compute as pc

    lengths = pc.binary_length(column) if _is_packed(column.type) else pc.list_value_length(column)
    return pc.fill_null(lengths, -1).to_numpy(zero_copy_only=False)


def _is_packed(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _matrix(column: pa.Array, fits: Any, dim: int, dtype: str | None) -> Float32:
    """(N, dim) float32, zeros where a row does not fit; a null inside a list becomes NaN."""
    x = np.zeros((len(column), dim), np.float32)
    rows = np.flatnonzero(fits)
    if len(rows) == 0:
        return x
    chosen = column.take(pa.array(rows))
    if dtype is not None:
        flat = read_packed(b"".join(chosen.to_pylist()), dtype)
    else:
        values = chosen.flatten()
        if pa.types.is_decimal(values.type) or pa.types.is_null(values.type):
            values = values.cast(pa.float64())
        flat = values.to_numpy(zero_copy_only=False)
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


def _reject(rejected: DataFrame, warehouse: Warehouse, run_date: date) -> dict[str, int]:
    """Replace the rejected rows of the day; returns how many the table holds of each reason."""
    if rejected.isEmpty() and not warehouse.exists(REJECTED_EMBEDDINGS):
        return {}
    warehouse.replace(REJECTED_EMBEDDINGS, rejected, f"run_date = '{run_date}'")
    rows = warehouse.read(REJECTED_EMBEDDINGS).where(F.col("run_date") == F.lit(run_date))
    return {row["reason"]: row["count"] for row in rows.groupBy("reason").count().collect()}


def _store(good: DataFrame, source: Source, recipe: Recipe, warehouse: Warehouse, run_date: date) -> tuple[int, int]:
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
        fusion = recipe.fusion
        files = math.ceil(rows * fusion.dim * np.dtype(fusion.dtype).itemsize / BYTES_A_FILE)
        tasks = max(files, warehouse.cores)
        task_of = _tasks({group[0]: group[1] for group in counts}, source, tasks)
        groups = row_group_frame(warehouse.spark, source, task_of)
        by_group = pending.groupBy("row_group").agg(
            F.sort_array(F.collect_list(F.struct("row", "item_id", "content_hash", "first_seen"))).alias("pending")
        )
        work = by_group.join(F.broadcast(groups), "row_group").repartitionById(tasks, F.col("task"))
        packed = _packed(work, source, recipe, run_date)
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
