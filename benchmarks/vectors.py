"""Rows to measure on: a column of vectors of any Parquet file, or a .npy, prepared as `load` does it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from jobs.config import ConfigError
from jobs.embeddings.vectors import is_vector, lengths_of, matrix_of
from jobs.files.values import is_bytes
from tokenizer.packed import width_of

HELD_OUT = 0.1


class WrongVectors(ConfigError):
    """The file or the flags do not give usable vectors."""


@dataclass(frozen=True, eq=False)
class Split:
    """train (n, D) and held_out (m, D), float32."""

    train: Tensor
    held_out: Tensor


def split(x: Tensor, seed: int) -> Split:
    """A random tenth of the rows is held out."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    held = max(1, int(len(x) * HELD_OUT))
    return Split(x[order[held:]].contiguous(), x[order[:held]].contiguous())


def read_vectors(file: Path, columns: list[str], *, normalize: bool = True, pca: int = 0) -> tuple[Tensor, int]:
    """(N, D) float32 and the number of rows left out as no usable vector.

    Several columns are fused with weight 1 each, a missing one as zeros; a row that lacks all of them is left out.
    `pca` keeps that many principal components, unscaled, after normalisation.

    Raises:
        WrongVectors: no such file or column, or a column without vectors.
    """
    if not file.exists():
        raise WrongVectors(f"{file} does not exist; expected a Parquet file or folder, or a .npy")
    blocks = (
        [_numbers(np.load(file, allow_pickle=False), file.name)] if file.suffix == ".npy" else _columns(file, columns)
    )
    scaled = [_unit(block) if normalize else block for block in blocks]
    present = np.stack([np.isfinite(block).all(1) & block.any(1) for block in blocks], axis=1)
    x = np.concatenate(
        [np.where(here[:, None], block, 0) for block, here in zip(scaled, present.T, strict=True)], axis=1
    )
    broken = ~present.any(1)
    x = x[~broken]
    if not len(x):
        raise WrongVectors(f"{file} holds no finite vector that is not zero; expected one per row")
    if normalize:
        x = _unit(x)
    if pca:
        x = _principal(x, pca)
    return torch.tensor(x, dtype=torch.float32), int(broken.sum())


def _columns(file: Path, columns: list[str]) -> list[np.ndarray]:
    table = pq.read_table(file)
    chosen = columns or [name for name in table.column_names if name.endswith("_embedding")][:1]
    if not chosen:
        raise WrongVectors(f"{file} has columns {table.column_names}; say which one with --column")
    missing = [name for name in chosen if name not in table.column_names]
    if missing:
        raise WrongVectors(f"column {missing[0]!r} is missing from {file}; it has {table.column_names}")
    return [_matrix(table[name].combine_chunks(), name) for name in chosen]


def _matrix(column: pa.Array, name: str) -> np.ndarray:
    """(N, D) with NaN where the row is null or not of the commonest dimension; packed columns are float32."""
    if not is_vector(column.type):
        raise WrongVectors(
            f"column {name!r} has type {column.type}; expected a list of numbers or packed little-endian float32"
        )
    dtype = "float32" if is_bytes(column.type) else None
    width = 1 if dtype is None else width_of(dtype)
    lengths = lengths_of(column)
    sizes = Counter(lengths[(lengths > 0) & (lengths % width == 0)].tolist())
    if not sizes:
        raise WrongVectors(f"column {name!r} holds no vector; expected one per row")
    size = sizes.most_common(1)[0][0]
    usable = lengths == size
    x = matrix_of(column, usable, size // width, dtype)
    x[~usable] = np.nan
    return x


def _numbers(array: np.ndarray, name: str) -> np.ndarray:
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise WrongVectors(f"{name} has shape {array.shape} of {array.dtype}; expected numbers of shape (N, D)")
    return array.astype(np.float64)


def _unit(x: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    unit: np.ndarray = np.divide(x, norm, out=np.zeros_like(x), where=norm > 0)
    return unit


def _principal(x: np.ndarray, components: int) -> np.ndarray:
    if components > x.shape[1]:
        raise WrongVectors(
            f"--pca is {components} and the vectors have {x.shape[1]} dimensions; expected at most as many"
        )
    centred = x - x.mean(0)
    _, vectors = np.linalg.eigh(centred.T @ centred)  # ascending
    principal: np.ndarray = centred @ vectors[:, ::-1][:, :components]
    return principal
