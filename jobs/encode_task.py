"""What a task of encode does: row groups of `item_embeddings` -> rows with codes, read with pyarrow.

An item with previous codes keeps them if they are final, or if their squared error is within `encode.hold` of the best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from jobs.config import EncodeConfig
from jobs.embeddings.packed import Float32, unpack
from jobs.files.parquet import RowGroup
from jobs.models.codebooks import worker_codebook
from jobs.models.versions import CodebookVersion
from tokenizer import RQGMM, Alternates

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX_ORDER = ("joined", "first_seen", "item_id")  # suffixes count items with equal codes in this order
BATCHES_A_RUN = 8  # batches that a task sorts together
ALTERNATE = pa.struct([("codes", pa.list_(pa.int32())), ("weights", pa.list_(pa.int16()))])
ENCODED = pa.schema(
    [
        ("codebook_version", pa.int32()),
        ("item_id", pa.string()),
        ("content_hash", pa.string()),
        ("first_seen", pa.date32()),
        ("codes", pa.list_(pa.int32())),
        ("joined", pa.string()),  # the codes as text, by which items with equal codes are found
        ("kept_suffix", pa.int32()),
        ("confidence", pa.float32()),
        ("log_likelihood", pa.float32()),
        ("held", pa.bool_()),
        ("alternates", pa.list_(ALTERNATE)),
        ("squared_error", pa.float32()),
    ]
)


def group_encoder(
    shared: Any, codebook: CodebookVersion, config: EncodeConfig
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """The function for `mapInArrow` that encodes row groups with a codebook whose files are broadcast in `shared`."""
    version, codebook_hash = codebook.number, codebook.hash

    def encode(work: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        import torch

        from jobs.encode_task import encode_group  # the worker's own module, not a pickled copy

        torch.set_num_threads(1)  # Spark runs one task per core already
        rqgmm = worker_codebook(shared.value, codebook_hash)
        for batch in work:
            for row in range(len(batch)):
                group = RowGroup(*(batch.column(name)[row].as_py() for name in ("uri", "index", "rows")))
                pending = batch.column("pending")[row].values
                yield from _sorted_runs(encode_group(group, pending, rqgmm, version, config))

    return encode


def _sorted_runs(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The batches, every BATCHES_A_RUN of them sorted by SUFFIX_ORDER.

    Spark then merges a few sorted runs, with a quarter of the comparisons of a full sort.
    """
    while run := list(islice(batches, BATCHES_A_RUN)):
        yield from pa.Table.from_batches(run).sort_by([(name, "ascending") for name in SUFFIX_ORDER]).to_batches()


def encode_group(
    group: RowGroup, pending: pa.StructArray | None, rqgmm: RQGMM, version: int, config: EncodeConfig
) -> Iterator[pa.RecordBatch]:
    """Encode the items of a row group that are in `pending`, or all of them if it is None."""
    positions = None  # position of each row in `pending`, null if it is not pending
    if pending is not None:
        ids = pa.Table.from_batches(group.batches(["item_id"], config.rows_per_batch))["item_id"].combine_chunks()
        positions = pc.index_in(ids, value_set=pending.field("item_id"))
        if positions.null_count == len(positions):
            return
    first = 0
    for batch in group.batches(["item_id", "embedding", "content_hash", "first_seen"], config.rows_per_batch):
        incumbents = None
        if pending is not None and positions is not None:
            own = positions.slice(first, len(batch))
            first += len(batch)
            batch, incumbents = batch.filter(own.is_valid()), pending.take(own.drop_null())
        if len(batch):
            yield encode_batch(batch, incumbents, rqgmm, version, config)


def encode_batch(
    batch: pa.RecordBatch, incumbents: pa.StructArray | None, rqgmm: RQGMM, version: int, config: EncodeConfig
) -> pa.RecordBatch:
    """Encode a batch of packed vectors; returns rows of the schema ENCODED.

    `incumbents` has the present codes of each row. A row keeps them if they are final, or if their squared error is at
    most `config.hold` times that of the best codes.
    """
    import torch

    # (n, D), not copied. Through Arrow, since torch warns of read-only NumPy memory.
    flat = pa.array(unpack(batch.column("embedding"), rqgmm.dim).reshape(-1))
    x = torch.from_dlpack(flat).view(-1, rqgmm.dim)  # type: ignore[attr-defined]
    best = rqgmm.assign(x, alternates=config.alternates)
    soft = best.alternates
    codes, confidence, log_likelihood = best.codes.numpy(), best.confidence.numpy(), best.log_likelihood.numpy()
    squared_error = _squared_error(rqgmm, x, codes)
    kept_previous_codes = np.zeros(len(x), bool)
    kept_suffix = pa.nulls(len(x), pa.int32())
    if incumbents is not None:
        has_codes = incumbents.field("codes").is_valid()
        rows = np.flatnonzero(has_codes)  # (m,) rows with present codes
        former = incumbents.field("codes").flatten().to_numpy().reshape(len(rows), rqgmm.n_levels)  # (m, L)
        former_error = _squared_error(rqgmm, x[rows], former)
        final = incumbents.field("final").filter(has_codes).to_numpy(zero_copy_only=False)
        keep = final | (former_error <= config.hold * squared_error[rows])
        moved = (former != codes[rows]).any(1)
        held = rows[keep & moved]  # they keep codes that are not the best
        if len(held):
            scored = rqgmm.assign(x[held], torch.tensor(former[keep & moved]), alternates=config.alternates)
            codes[held], confidence[held] = scored.codes.numpy(), scored.confidence.numpy()
            log_likelihood[held] = scored.log_likelihood.numpy()
            squared_error[held] = former_error[keep & moved]
            kept_previous_codes[held] = True
            if soft is not None and scored.alternates is not None:
                soft.codes[held], soft.weights[held] = scored.alternates.codes, scored.alternates.weights
        same = np.zeros(len(x), bool)
        same[rows] = keep | ~moved
        kept_suffix = pc.if_else(pa.array(same), incumbents.field("suffix"), kept_suffix)
    columns = {
        "codebook_version": np.full(len(x), version, np.int32),
        "item_id": batch.column("item_id"),
        "content_hash": batch.column("content_hash"),
        "first_seen": batch.column("first_seen"),
        "codes": pa.FixedSizeListArray.from_arrays(codes.reshape(-1), rqgmm.n_levels).cast(pa.list_(pa.int32())),
        "joined": pc.binary_join_element_wise(*(pa.array(level).cast(pa.string()) for level in codes.T), "-"),
        "kept_suffix": kept_suffix,
        "confidence": confidence,
        "log_likelihood": log_likelihood,
        "held": kept_previous_codes,
        "alternates": pa.nulls(len(x), pa.list_(ALTERNATE)) if soft is None else _as_lists(soft),
        "squared_error": squared_error,
    }
    return pa.RecordBatch.from_pydict(columns, schema=ENCODED)


def _as_lists(soft: Alternates) -> pa.ListArray:
    """Per item a list with one struct per level."""
    items, levels, kept = soft.codes.shape
    parts = (soft.codes.numpy().reshape(-1), soft.weights.numpy().astype(np.int16).reshape(-1))
    ends = pa.array(np.arange(0, items * levels * kept + 1, kept, dtype=np.int32))
    of_level = pa.StructArray.from_arrays(
        [pa.ListArray.from_arrays(ends, pa.array(part)) for part in parts], fields=list(ALTERNATE)
    )
    return pa.ListArray.from_arrays(pa.array(np.arange(0, items * levels + 1, levels, dtype=np.int32)), of_level)


def _squared_error(rqgmm: RQGMM, x: Tensor, codes: npt.NDArray[np.int32]) -> Float32:
    """(n,): squared distance of each row of x (n, D) to its decoded codes (n, L)."""
    import torch

    error: Float32 = (x - rqgmm.decode(torch.tensor(codes))).square().sum(1).numpy()
    return error
