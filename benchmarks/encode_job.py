"""The encode job on Spark against one process of pyarrow and torch that reads the same files.

sid bench encode-job --json encode_job.json
"""

from __future__ import annotations

import json
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer

from benchmarks.fit import clustered
from jobs import encode, fit, load
from jobs.config import load_config
from jobs.encode import codebook_files, worker_codebook
from jobs.packed import pack, unpack
from jobs.registry import open_registry
from jobs.session import spark_session
from jobs.tables import ITEM_EMBEDDINGS, Warehouse, warehouse_root
from tokenizer import RQGMM

DAY = date(2026, 1, 1)


def encode_job(
    rows: int = 500_000,
    dim: int = 384,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Rows per second of the whole encode job, and of one process on the same files."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        typer.echo(f"writing and loading {rows:,} rows", err=True)
        _write(folder / "vectors.parquet", rows, dim)
        config = load_config(
            overrides=[f"load.source={folder / 'vectors.parquet'}", "fit.sample=20000"], warehouse=str(folder / "warehouse")
        )  # fmt: skip
        root = warehouse_root(config.warehouse)
        registry = open_registry(config, root)
        with spark_session(config) as session:
            warehouse = Warehouse(session.spark, root)
            load.run(config, warehouse, DAY)
            seconds = []
            for seed in (0, 1):  # two codebook versions: the second time the JVM and the Python workers are warm
                seeded = config.model_copy(update={"fit": config.fit.model_copy(update={"seed": seed})})
                model = fit.run(seeded, warehouse, registry, DAY, folder / "pictures").model
                seconds.append(encode.run(seeded, warehouse, registry, model, DAY).seconds)
            rqgmm = worker_codebook(codebook_files(registry, model), model.tags["codebook_hash"])
            files = warehouse.files(ITEM_EMBEDDINGS, warehouse.version(ITEM_EMBEDDINGS))
        alone = min(_one_process(files, rqgmm, folder / "codes.parquet") for _ in range(3))
    figures = {
        "job_over_one_process": alone / seconds[1],
        "cold_job_over_one_process": alone / seconds[0],
        "job_rows_per_second": rows / seconds[1],
        "one_process_rows_per_second": rows / alone,
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


def _one_process(files: list[str], rqgmm: RQGMM, out: Path) -> float:
    """Seconds to read the table's files, encode with codes, posterior and likelihood, and write them."""
    began = time.perf_counter()
    writer = None
    for file in files:
        for batch in pq.ParquetFile(file.removeprefix("file:")).iter_batches(
            8192, columns=["item_id", "content_hash", "embedding"]
        ):
            found = rqgmm.assign(torch.tensor(unpack(batch.column("embedding"), rqgmm.dim)))
            codes = pa.FixedSizeListArray.from_arrays(pa.array(found.codes.numpy().ravel()), rqgmm.n_levels)
            table = pa.table(
                {
                    "item_id": batch.column("item_id"),
                    "content_hash": batch.column("content_hash"),
                    "codes": codes,
                    "confidence": found.confidence.numpy(),
                    "log_likelihood": found.log_likelihood.numpy(),
                }
            )
            writer = writer or pq.ParquetWriter(out, table.schema)
            writer.write_table(table)
    assert writer is not None
    writer.close()
    return time.perf_counter() - began


if __name__ == "__main__":
    typer.run(encode_job)
