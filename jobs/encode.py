"""encode: `item_embeddings` + one codebook -> `semantic_ids` of that codebook version.

Only items that this version has not encoded yet, or whose vector changed, are computed. A published ID of a version
never changes; under a new version an unchanged item keeps its former codes while they serve it nearly as well.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from jobs.config import Config
from jobs.packed import Float32, unpack
from jobs.registry import ModelVersion, Registry
from jobs.tables import ITEM_EMBEDDINGS, SEMANTIC_IDS, Warehouse
from tokenizer import RQGMM, load_codebook

ENCODED = "item_id STRING, content_hash STRING, first_seen DATE, codes ARRAY<INT>, kept_suffix INT, confidence FLOAT, log_likelihood FLOAT, held BOOLEAN"
ENCODED_ARROW = pa.schema(
    [
        ("item_id", pa.string()),
        ("content_hash", pa.string()),
        ("first_seen", pa.date32()),
        ("codes", pa.list_(pa.int32())),
        ("kept_suffix", pa.int32()),
        ("confidence", pa.float32()),
        ("log_likelihood", pa.float32()),
        ("held", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class EncodeResult:
    codebook_version: int
    encoded: int  # rows written now
    version: int  # of semantic_ids, after
    embeddings_version: int
    seconds: float = 0.0
    nothing_to_do: bool = False


def run(config: Config, warehouse: Warehouse, registry: Registry, model: ModelVersion, run_date: date) -> EncodeResult:
    """Bring `semantic_ids` of codebook `model` up to the newest `item_embeddings`, in one commit."""
    began = time.monotonic()
    embeddings_version = warehouse.version(ITEM_EMBEDDINGS)
    embeddings = warehouse.read(ITEM_EMBEDDINGS, embeddings_version)
    warehouse.create(SEMANTIC_IDS)
    published = warehouse.read(SEMANTIC_IDS)
    own = published.where(F.col("codebook_version") == model.version)
    pending = embeddings.join(own.select("item_id", "content_hash"), ["item_id", "content_hash"], how="left_anti")
    if pending.isEmpty():
        return EncodeResult(
            model.version,
            0,
            warehouse.version(SEMANTIC_IDS),
            embeddings_version,
            time.monotonic() - began,
            nothing_to_do=True,
        )

    parent = int(model.tags.get("started_from_version") or -1)
    files = codebook_files(registry, model)
    shared = warehouse.spark.sparkContext.broadcast(files)
    warehouse.spark.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", config.encode.rows_per_batch)
    # A shuffle would move every vector once more than needed, so the small side travels: codes of incumbents.
    vectors = _with_incumbents(pending, published, model.version, parent)
    encoded = vectors.mapInArrow(_encoder(shared, model.tags["codebook_hash"], config.encode.hold), ENCODED)
    with warehouse.staged(encoded, f"encode-{model.version}") as staged:
        rows = _published(staged, own, model, run_date)
        count = staged.count()
        version = warehouse.merge(SEMANTIC_IDS, rows, update=True)
    shared.unpersist()
    return EncodeResult(model.version, count, version, embeddings_version, time.monotonic() - began)


def codebook_files(registry: Registry, model: ModelVersion) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = registry.download(model, Path(scratch)) / "artifacts" / "codebook"
        return {file.name: file.read_bytes() for file in folder.iterdir()}


def _with_incumbents(pending: DataFrame, published: DataFrame, version: int, parent: int) -> DataFrame:
    """Vectors to encode, each with the codes it has now: of this version (kept for good), or of the parent version."""
    versions = published.where(F.col("codebook_version").isin(version, parent)).select(
        "item_id",
        F.col("content_hash").alias("published_hash"),
        F.col("codes").alias("incumbent_codes"),
        F.col("suffix").alias("incumbent_suffix"),
        (F.col("codebook_version") == version).alias("final"),
    )
    latest = versions.withColumn(
        "place", F.row_number().over(Window.partitionBy("item_id").orderBy(F.desc("final")))
    ).where("place = 1")
    unchanged = F.col("final") | (F.col("published_hash") == F.col("content_hash"))
    return pending.join(latest, "item_id", how="left").select(
        "item_id", "content_hash", "first_seen", "embedding", "dim",
        F.when(unchanged, F.col("incumbent_codes")).alias("incumbent_codes"),
        F.when(unchanged, F.col("incumbent_suffix")).alias("incumbent_suffix"),
        F.coalesce("final", F.lit(False)).alias("final"),
    )  # fmt: skip


_loaded: dict[str, RQGMM] = {}  # one codebook per worker process, by content hash


def worker_codebook(files: dict[str, bytes], codebook_hash: str) -> RQGMM:
    if codebook_hash not in _loaded:
        with tempfile.TemporaryDirectory() as scratch:
            for name, data in files.items():
                (Path(scratch) / name).write_bytes(data)
            _loaded[codebook_hash] = load_codebook(Path(scratch), expect_hash=codebook_hash).rqgmm
    return _loaded[codebook_hash]


def _encoder(
    shared: Any, codebook_hash: str, hold: float
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def encode(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        import torch

        from jobs.encode import worker_codebook  # the module's own cache, not a copy that travelled with this function

        torch.set_num_threads(1)  # Spark runs one task per core already
        rqgmm = worker_codebook(shared.value, codebook_hash)
        for batch in batches:
            if batch.num_rows:
                yield encode_batch(batch, rqgmm, hold)

    return encode


def encode_batch(batch: pa.RecordBatch, rqgmm: RQGMM, hold: float) -> pa.RecordBatch:
    """Codes, posterior and likelihood of a batch of packed vectors, incumbents kept where the rule says so."""
    import torch

    x = torch.tensor(unpack(batch.column("embedding"), rqgmm.dim))  # (n, D)
    best = rqgmm.assign(x)
    codes, confidence, log_likelihood = (
        best.codes.numpy().copy(),
        best.confidence.numpy().copy(),
        best.log_likelihood.numpy().copy(),
    )
    n = len(codes)
    held = np.zeros(n, bool)
    suffix: list[int | None] = [None] * n
    incumbents = batch.column("incumbent_codes").to_pylist()
    rows = np.flatnonzero([codes_ is not None for codes_ in incumbents])
    if len(rows):
        former = np.array([incumbents[row] for row in rows], np.int32)  # (m, L)
        final = np.array(batch.column("final").to_pylist(), bool)[rows]
        error, least = _squared_error(rqgmm, x[rows], former), _squared_error(rqgmm, x[rows], codes[rows])
        keep = final | (error <= hold * least)
        moved = (former != codes[rows]).any(1)
        chosen = rows[keep & moved]
        if len(chosen):
            scored = rqgmm.assign(x[chosen], torch.tensor(former[keep & moved]))
            codes[chosen], confidence[chosen] = scored.codes.numpy(), scored.confidence.numpy()
            log_likelihood[chosen] = scored.log_likelihood.numpy()
            held[chosen] = True
        suffixes = batch.column("incumbent_suffix").to_pylist()
        for row in rows[keep | ~moved]:
            suffix[row] = suffixes[row]
    flat = pa.array(codes.reshape(-1), pa.int32())
    offsets = pa.array(np.arange(0, codes.size + 1, codes.shape[1], dtype=np.int32))
    return pa.RecordBatch.from_arrays(
        [
            batch.column("item_id").cast(pa.string()),
            batch.column("content_hash").cast(pa.string()),
            batch.column("first_seen"),
            pa.ListArray.from_arrays(offsets, flat),
            pa.array(suffix, pa.int32()),
            pa.array(confidence, pa.float32()),
            pa.array(log_likelihood, pa.float32()),
            pa.array(held, pa.bool_()),
        ],
        schema=ENCODED_ARROW,
    )


def _squared_error(rqgmm: RQGMM, x: Any, codes: Any) -> Float32:
    import torch

    error: Float32 = (x - rqgmm.decode(torch.as_tensor(codes))).square().sum(1).numpy()
    return error


def _published(encoded: DataFrame, own: DataFrame, model: ModelVersion, run_date: date) -> DataFrame:
    """Rows of `semantic_ids`: newcomers get the next free suffix of their codes, by first day and id; incumbents keep theirs."""
    taken = own.select("codes", "suffix").unionByName(
        encoded.where("kept_suffix IS NOT NULL").select("codes", F.col("kept_suffix").alias("suffix"))
    )
    free = taken.groupBy("codes").agg((F.max("suffix") + 1).alias("free"))
    place = F.row_number().over(Window.partitionBy("codes").orderBy("first_seen", "item_id")) - 1
    newcomers = (
        encoded.where("kept_suffix IS NULL").join(free, "codes", how="left")
        .withColumn("suffix", (F.coalesce("free", F.lit(0)) + place).cast("int")).drop("free")
    )  # fmt: skip
    incumbents = encoded.where("kept_suffix IS NOT NULL").withColumn("suffix", F.col("kept_suffix"))
    rows = newcomers.unionByName(incumbents)
    return rows.select(
        F.lit(model.version).cast("int").alias("codebook_version"),
        "item_id",
        "codes",
        "suffix",
        _text(F.col("codes"), F.col("suffix")).alias("semantic_id"),
        "confidence",
        "log_likelihood",
        F.lit(model.tags["codebook_hash"]).alias("codebook_hash"),
        "content_hash",
        "held",
        F.lit(run_date).cast("date").alias("run_date"),
    )


def _text(codes: Column, suffix: Column) -> Column:
    """`12-87`, or `12-87-1` where the suffix is above 0; the SQL twin of tokenizer.text_of (a test holds them together)."""
    joined = F.concat_ws("-", F.transform(codes, lambda code: code.cast("string")))
    return F.when(suffix == 0, joined).otherwise(F.concat_ws("-", joined, suffix.cast("string")))
