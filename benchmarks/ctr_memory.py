"""Memory of training DMQN on logs of growing size: peak resident memory of a process that reads one pass of batches.

sid bench ctr-memory --json ctr_memory.json --picture docs/ctr_memory.png
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer

from benchmarks.ctr.example_rows import default_model, rows_of
from benchmarks.memory import draw, peak_mib, printed_numbers
from jobs.config import Config
from jobs.ctr.artefact import new_model
from jobs.ctr.batch import UserBatch
from jobs.ctr.stream import COLUMNS, ExampleStream, row_groups
from jobs.ctr.training import train
from tokenizer.kernels import without_denormals

HISTORY = 10_000
SHORTEST, LONGEST = 20, 2 * HISTORY  # impressions of a user, half of them clicks
USERS = 100  # of a row group, which then has 25 MiB, more than those that Spark writes
VALIDATION_BATCHES = 20
CHILD = "import sys; from benchmarks.ctr_memory import measure; measure(sys.argv[1], int(sys.argv[2]))"


def write_log(folder: Path, impressions: int) -> int:
    """Files of `ctr_examples` with this many impressions, a row group each; their bytes in memory, as Arrow.

    Half of the impressions are clicks, so half as many behaviours. Of a user's impressions the last tenth are the test
    split, the tenth before it the validation split. One row group is in memory at a time.
    """
    random = np.random.default_rng(0)
    written = users = in_memory = files = 0
    while written < impressions:
        lengths = np.exp(random.uniform(np.log(SHORTEST), np.log(LONGEST), size=USERS)).astype(np.int64)
        lengths = np.diff(np.minimum(lengths.cumsum(), impressions - written), prepend=0)
        lengths = lengths[lengths > 0]
        user = users + np.repeat(np.arange(len(lengths)), lengths)
        ts = np.concatenate([np.arange(length) for length in lengths])
        tenth = 10 * ts // np.repeat(lengths, lengths)
        split = pa.array(["train", "validation", "test"]).take(pa.array(np.maximum(0, tenth - 7)))
        label = random.integers(2, size=len(user))
        rows = rows_of(user, ts, label, np.ones(len(user), bool), split, HISTORY, seed=files)
        pq.write_table(pa.Table.from_batches([rows]), folder / f"{files:06}.parquet", row_group_size=len(rows))
        written, users, files = written + len(user), users + len(lengths), files + 1
        in_memory += rows.select(COLUMNS).nbytes
    return in_memory


def measure(folder: str, every: int) -> None:
    """Print the peak MiB of this process before and after a pass of training, and its seconds."""
    before, began = peak_mib(), time.perf_counter()
    config = Config().train
    inputs, shape = default_model(HISTORY)
    groups = row_groups(sorted(map(str, Path(folder).glob("*.parquet"))))

    def stream(split: str, *, shuffle: bool = False) -> ExampleStream:
        return ExampleStream(groups, split, inputs, config.batch_positions, shuffle=shuffle)

    def batches(epoch: int) -> Iterator[UserBatch]:
        """Every k-th batch; the others are read and made too."""
        for number, batch in enumerate(stream("train", shuffle=True).at(epoch)):
            if number % every == 0:
                yield batch

    torch.manual_seed(0)
    with without_denormals():
        train(
            new_model(inputs, shape),
            batches,
            list(islice(stream("validation"), VALIDATION_BATCHES)),
            epochs=1,
            learning_rate=config.learning_rate,
            progress=lambda progress: print(f"  {progress}", file=sys.stderr),
        )
    print(before, peak_mib(), time.perf_counter() - began)


def ctr_memory(
    impressions: Annotated[str, typer.Option(help="Sizes of the logs, with commas.")] = "1e6,3e6,1e7",
    every: Annotated[int, typer.Option(min=1, help="Train every k-th batch; the others are only read.")] = 10,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw memory against impressions to this file.")] = None,
) -> None:
    """Peak memory of a training pass over logs of growing size, with histories of up to 10,000 behaviours."""
    rows = []
    typer.echo("impressions | MiB: peak of training | imports alone | the rows as Arrow | seconds")
    for size in (int(float(text)) for text in impressions.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            in_memory = write_log(Path(folder), size) / 2**20
            before, trained, seconds = printed_numbers(CHILD, folder, str(every))
        rows.append(
            {
                "impressions": size,
                "training_mib": trained,
                "imports_mib": before,
                "arrow_mib": in_memory,
                "seconds": seconds,
            }
        )
        typer.echo(f"{size:>11,} | {trained:,.0f} | {before:,.0f} | {in_memory:,.0f} | {seconds:,.0f}")
    if picture is not None:
        lines = {
            "peak while training from Parquet": [row["training_mib"] for row in rows],
            "imports alone": [row["imports_mib"] for row in rows],
            "the rows themselves, as Arrow": [row["arrow_mib"] for row in rows],
        }
        millions = [row["impressions"] / 1e6 for row in rows]
        draw(picture, millions, lines, title="Memory of training DMQN", size_label="million impressions")
    if json_file is not None:
        setting = {"every": every, "history": HISTORY, "threads": torch.get_num_threads()}
        json_file.write_text(json.dumps({"rows": rows, **setting}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(ctr_memory)
