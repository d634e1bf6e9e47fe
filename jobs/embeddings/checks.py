"""Which rows of a source become embeddings, and why the others are rejected."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from jobs.embeddings.packed import pack
from jobs.embeddings.recipe import Recipe
from jobs.embeddings.vectors import is_vector, lengths_of, matrix_of
from jobs.files.values import as_ids, is_bytes
from tokenizer.fusion import Fusion
from tokenizer.packed import width_of

Mask = npt.NDArray[np.bool_]  # one truth value per row
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


class Rejections:
    """Why each row of a batch is rejected: `reason` is None for a good row. The first reason of a row stands."""

    def __init__(self, rows: int) -> None:
        self.reason: list[str | None] = [None] * rows
        self.detail = [""] * rows
        self.excerpt = [""] * rows

    @property
    def good(self) -> Mask:
        return np.array([reason is None for reason in self.reason], bool)

    def add(
        self, rows: npt.ArrayLike, reason: str, detail: Callable[[int], str], excerpt: Callable[[int], str]
    ) -> None:
        """Reject the rows where `rows` is true; `detail` and `excerpt` give text and value for the number of a row."""
        for row in np.flatnonzero(rows).tolist():
            if self.reason[row] is None:
                self.reason[row], self.detail[row] = reason, detail(row)
                self.excerpt[row] = excerpt(row)[:EXCERPT_CHARACTERS]


def check_rows(batch: pa.RecordBatch, recipe: Recipe) -> pa.RecordBatch:
    """One row of CHECKED per input row: packed embedding and its hash, or a reason; never both, never neither.

    What becomes of a row does not depend on the other rows.
    """
    fusion, rejections = recipe.fusion, Rejections(batch.num_rows)
    ids = _checked_ids(_column(batch, recipe.item_id), rejections)
    blocks, present = [], np.zeros((batch.num_rows, len(fusion.dims)), bool)
    for number, name in enumerate(fusion.dims):
        x, present[:, number] = _checked_vectors(_column(batch, name), name, recipe, rejections)
        blocks.append(fusion.block(name, x))
    rejections.add(
        ~present.any(1),
        "null_embedding",
        lambda _: "every modality is null; expected at least one vector",
        lambda _: "null",
    )
    stored = _checked_embeddings(fusion.join(blocks), fusion, rejections)
    good = rejections.good
    packed = pack(stored, fusion.dtype, good)
    columns = [
        pa.array(ids, pa.string()),
        packed,
        _names(present, list(fusion.dims), good),
        pa.array(_content_hashes(packed, good), pa.string()),
        pa.array(rejections.reason, pa.string()),
        pa.array(rejections.detail, pa.string()),
        pa.array(rejections.excerpt, pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=CHECKED)


def _column(batch: pa.RecordBatch, name: str) -> pa.Array:
    return batch.column(batch.schema.get_field_index(name))


def _checked_ids(column: pa.Array, rejections: Rejections) -> list[str | None]:
    texts, wrong = as_ids(column)
    ids: list[str | None] = texts.to_pylist()
    rejections.add(
        wrong,
        "wrong_item_id",
        lambda row: (
            f"item id is {str(ids[row])[:EXCERPT_CHARACTERS]}; expected text in UTF-8, or a whole number that its type "
            "holds exactly"
        ),
        lambda row: str(ids[row]),
    )
    rejections.add(
        np.array([not item_id for item_id in ids], bool),
        "null_item_id",
        lambda _: "item id is null or empty; expected an integer or a string",
        lambda _: "",
    )
    return ids


def _checked_vectors(
    column: pa.Array, name: str, recipe: Recipe, rejections: Rejections
) -> tuple[npt.NDArray[np.float32], Mask]:
    """Vectors (N, dim) of one modality, zeros where one is missing or wrong; and which rows have one of `dim`."""
    dim = recipe.fusion.dims[name]
    if not is_vector(column.type):  # a column without values has no type of its own
        column = pa.nulls(len(column), pa.list_(pa.float32()))
    dtype = recipe.packed.get(name, "float32") if is_bytes(column.type) else None
    width = 1 if dtype is None else width_of(dtype)
    lengths = lengths_of(column)
    present = lengths >= 0
    fits = lengths == dim * width

    def shown(row: int) -> str:
        return _excerpt(column[row].as_py())

    rejections.add(
        present & ~fits,
        "wrong_dimension",
        lambda row: f"{name} has {lengths[row] / width:g} components; expected {dim}",
        shown,
    )
    x = matrix_of(column, fits, dim, dtype)
    nans, infs = np.isnan(x).sum(1), np.isinf(x).sum(1)
    rejections.add(nans > 0, "nan", lambda row: f"{name} has {nans[row]} NaN; expected numbers", shown)
    rejections.add(infs > 0, "inf", lambda row: f"{name} has {infs[row]} infinities; expected finite numbers", shown)
    x[(nans > 0) | (infs > 0)] = 0.0
    rejections.add(
        fits & ~x.any(1),  # a row with NaN or Inf has its reason already
        "zero_norm",
        lambda _: f"{name} is all zeros and has no direction; expected a vector",
        shown,
    )
    return x, fits


def _checked_embeddings(
    fused: npt.NDArray[np.float64], fusion: Fusion, rejections: Rejections
) -> npt.NDArray[np.floating[Any]]:
    """The embeddings in the type of the table; rows that it cannot hold are rejected."""
    stored = fusion.rounded(fused)
    largest = np.finfo(fusion.dtype).max

    def shown(row: int) -> str:
        return _excerpt(fused[row].tolist())

    rejections.add(
        ~np.isfinite(stored).all(1),
        "inf",
        lambda row: (
            f"the embedding has a component of {np.abs(fused[row]).max():.4g}; expected at most {largest:.4g}, "
            f"the largest of {fusion.dtype} (load.dtype)"
        ),
        shown,
    )
    rejections.add(
        ~stored.any(1),
        "zero_norm",
        lambda _: f"the embedding is all zeros in {fusion.dtype}; expected larger components, or load.dtype float32",
        shown,
    )
    return stored


def _names(present: npt.NDArray[np.bool_], names: list[str], good: Mask) -> pa.Array:
    """The names of the modalities that each row has, by `present` (N, modalities); null where the row is not good."""
    present = present & good[:, None]
    ends = np.cumsum(present.sum(1), dtype=np.int32)
    values = pa.array(names, pa.string()).take(pa.array(np.nonzero(present)[1]))
    return pa.ListArray.from_arrays(np.concatenate([[0], ends]).astype(np.int32), values, mask=pa.array(~good))


def _content_hashes(packed: pa.Array, good: Mask) -> list[str | None]:
    data, width = memoryview(packed.buffers()[2]), packed.buffers()[2].size // max(1, len(packed))
    hashes: list[str | None] = [None] * len(packed)
    for row in np.flatnonzero(good).tolist():
        vector = data[row * width : (row + 1) * width]
        hashes[row] = hashlib.blake2b(vector, digest_size=16, person=b"embedding").hexdigest()
    return hashes


def _excerpt(value: Any) -> str:
    if isinstance(value, bytes):
        return value[:24].hex(" ")
    shown = ", ".join("null" if v is None else f"{v:.4g}" for v in value[:8])
    return f"[{shown}{', ...' if len(value) > 8 else ''}]"
