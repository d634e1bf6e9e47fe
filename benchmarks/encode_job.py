"""The encode job on Spark against one process of pyarrow and torch that reads the same files.

sid bench encode-job --json encode_job.json
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import typer

from benchmarks.fit import clustered
from jobs import encode, fit, load
from jobs.config import EncodeConfig
from jobs.embeddings.packed import pack
from jobs.encode_task import ENCODED, encode_group
from jobs.files.parquet import RowGroup, row_groups
from jobs.models.codebooks import codebook_files, worker_codebook
from jobs.models.registry import open_registry
from jobs.read_config import load_config
from jobs.spark.session import spark_session
from jobs.warehouse.delta_spark import Warehouse
from jobs.warehouse.root import warehouse_root
from jobs.warehouse.tables import ITEM_EMBEDDINGS
from tokenizer import RQGMM

DAY = date(2026, 1, 1)
REPEATS = 3  # the first of a JVM is slow


def encode_job(
    rows: int = 2_000_000,
    dim: int = 384,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Rows per second of the whole encode job, and of one process of pyarrow and torch that writes the same rows."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        typer.echo(f"writing and loading {rows:,} rows", err=True)
        _write(folder / "vectors.parquet", rows, dim)
        config = load_config(
            overrides=[f"load.source={folder / 'vectors.parquet'}", "fit.sample=20000"],
            warehouse=str(folder / "warehouse"),
        )
        root = warehouse_root(config.warehouse)
        registry = open_registry(config, root)
        with spark_session(config) as session:
            warehouse = Warehouse(session.spark, root)
            load.run(config, warehouse, DAY)
            groups = row_groups(warehouse.files(ITEM_EMBEDDINGS, warehouse.version(ITEM_EMBEDDINGS)))
            seconds: dict[str, list[float]] = {"job": [], "one process": [], "codes alone": []}
            for seed in range(REPEATS):  # a codebook version each, so that there is something to encode
                seeded = config.model_copy(update={"fit": config.fit.model_copy(update={"seed": seed})})
                codebook = fit.run(seeded, warehouse, registry, DAY, folder / "pictures").codebook
                seconds["job"].append(encode.run(seeded, warehouse, registry, codebook, DAY).seconds)
                rqgmm = worker_codebook(codebook_files(registry, codebook), codebook.hash)
                for name, work in (("one process", _one_process), ("codes alone", _codes_alone)):
                    began = time.perf_counter()
                    work(groups, rqgmm, folder / "codes.parquet")
                    seconds[name].append(time.perf_counter() - began)
    fastest = {name: min(times) for name, times in seconds.items()}
    figures = {
        "job_over_one_process": fastest["one process"] / fastest["job"],
        "job_over_codes_alone": fastest["codes alone"] / fastest["job"],
        "cold_job_over_one_process": fastest["one process"] / seconds["job"][0],
        "job_rows_per_second": rows / fastest["job"],
        "one_process_rows_per_second": rows / fastest["one process"],
        "codes_alone_rows_per_second": rows / fastest["codes alone"],
        "rows": rows,
        "dim": dim,
    }
    for name, value in figures.items():
        typer.echo(f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}")
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


def _write(path: Path, rows: int, dim: int) -> None:
    schema = pa.schema([("item_id", pa.int64()), ("text_embedding", pa.binary())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 50_000):
            x = clustered(min(50_000, rows - start), dim, seed=start).numpy()
            columns = {"item_id": range(start, start + len(x)), "text_embedding": pack(x, "float32")}
            writer.write_table(pa.table(columns, schema), row_group_size=25_000)


def _codes(groups: Sequence[RowGroup], rqgmm: RQGMM) -> Iterator[pa.RecordBatch]:
    for group in groups:
        yield from encode_group(group, None, rqgmm, 1, EncodeConfig(hold=1.0))


def _one_process(groups: Sequence[RowGroup], rqgmm: RQGMM, out: Path) -> None:
    """The rows of `semantic_ids` from the table's files with pyarrow and torch alone."""
    table = pa.Table.from_batches(_codes(groups, rqgmm)).sort_by(
        [(name, "ascending") for name in ("joined", "first_seen", "item_id")]
    )
    codes = table["joined"].combine_chunks()
    begins = np.flatnonzero(np.r_[True, pc.not_equal(codes[1:], codes[:-1]).to_numpy(zero_copy_only=False)])
    suffix = np.arange(len(codes)) - np.repeat(begins, np.diff(np.r_[begins, len(codes)]))
    with_suffix = pc.binary_join_element_wise(codes, pa.array(suffix).cast(pa.string()), "-")
    semantic_id = pc.if_else(pa.array(suffix == 0), codes, with_suffix)
    names = ("item_id", "codes", "confidence", "log_likelihood", "content_hash", "held", "alternates", "squared_error")
    columns = {
        **{name: table[name] for name in names},
        "suffix": suffix.astype(np.int32),
        "semantic_id": semantic_id,
        **{
            name: pa.array([value] * len(table)).dictionary_encode()
            for name, value in (("codebook_hash", "0" * 64), ("run_date", DAY))
        },
    }
    pq.write_table(pa.table(columns), out)


def _codes_alone(groups: Sequence[RowGroup], rqgmm: RQGMM, out: Path) -> None:
    """What the library computes of each row, written as it comes: no suffixes, so no sort."""
    with pq.ParquetWriter(out, ENCODED) as writer:
        for batch in _codes(groups, rqgmm):
            writer.write_batch(batch)


if __name__ == "__main__":
    typer.run(encode_job)
