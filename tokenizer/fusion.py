"""From the vectors of an item's modalities to one embedding."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt

from tokenizer.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    Vectors = npt.ArrayLike | Tensor | Sequence[Any]
Precision = Literal["float32", "float16"]


@dataclass(frozen=True)
class Fusion:
    """The recipe from modality vectors to one embedding; part of every codebook that was fitted on such embeddings.

    Each modality is scaled to unit length and multiplied by the square root of its weight, a missing one is a block of
    zeros, the blocks stand side by side, and the whole is scaled to unit length. With `normalize` off lengths are left
    alone. The result is rounded to `dtype`, as it is stored.

        fusion = Fusion({"text": 384, "image": 1280}, weights={"text": 1.0, "image": 0.5})
        x = fusion(text=text, image=image)          # (N, 1664) float32; None where a modality is missing

    Attributes:
        dims: dimension of each modality.
        weights: weight of each modality; 1 where not given.
        order: of the blocks; alphabetical where not given. None is not known, as in codebooks made before it was kept:
            their recipe can be read, but fuses one modality only.
    """

    dims: Mapping[str, int]
    weights: Mapping[str, float] = field(default_factory=dict)
    normalize: bool = True
    dtype: Precision = "float32"
    order: Sequence[str] | None = ()

    def __post_init__(self) -> None:
        for name, dim in self.dims.items():
            if not isinstance(name, str) or isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
                raise DataError(
                    f"modality {name!r} has dimension {dim!r}; expected a name and an integer of at least 1"
                )
        if not self.dims:
            raise DataError("a fusion without modalities; expected at least one, such as Fusion({'text': 384})")
        unknown = sorted(set(self.weights) - set(self.dims))
        if unknown:
            raise DataError(f"weights name {unknown}; expected modalities among {sorted(self.dims)}")
        for name, weight in self.weights.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
                raise DataError(f"the weight of {name!r} is {weight!r}; expected a finite number above 0")
        if self.dtype not in ("float32", "float16"):
            raise DataError(f"dtype is {self.dtype!r}; expected float32 or float16")
        if self.order and sorted(self.order) != sorted(self.dims):
            raise DataError(f"order is {list(self.order)}; expected each of {sorted(self.dims)} once")
        # One order, which neither JSON nor the order of columns in a file can change.
        names = tuple(self.order or sorted(self.dims))
        object.__setattr__(self, "order", None if self.order is None and len(names) > 1 else names)
        object.__setattr__(self, "dims", {name: self.dims[name] for name in names})
        object.__setattr__(self, "weights", {name: float(self.weights.get(name, 1.0)) for name in self.dims})

    @property
    def dim(self) -> int:
        """D of the embedding."""
        return sum(self.dims.values())

    def __call__(self, **modalities: Vectors | None) -> Tensor:
        """(N, D) float32 of N items.

        Args:
            modalities: vectors (N, dim) of each modality; None where all items lack it, or a list with None for the
                items that do.

        Raises:
            DataError: an order that is not known, an unknown modality or another dimension, NaN or Inf, a vector of
                zeros, or an item without any modality.
        """
        if self.order is None:
            raise DataError(
                f"the recipe does not say in which order the blocks of {sorted(self.dims)} stand, as it was made "
                "before that was kept; expected an order. Name the columns as they were loaded: "
                "dataclasses.replace(fusion, order=[...])"
            )
        unknown = sorted(set(modalities) - set(self.dims))
        if unknown:
            raise DataError(f"{unknown} are no modalities of this fusion; expected some of {list(self.dims)}")
        given = {name: vectors for name, vectors in modalities.items() if vectors is not None}
        if not given:
            raise DataError(f"no modality is given; expected at least one of {list(self.dims)}")
        lengths = {name: len(vectors) for name, vectors in given.items()}  # type: ignore[arg-type]
        if len(set(lengths.values())) > 1:
            raise DataError(
                f"modalities have {lengths} rows; expected as many in each, None in place of a missing vector"
            )
        items = next(iter(lengths.values()))
        blocks, present = [], np.zeros(items, bool)
        for name in self.dims:
            x, known = self._matrix(name, given.get(name), items)
            blocks.append(self.block(name, x))
            present |= known
        if not present.all():
            raise DataError(
                f"item {int(np.flatnonzero(~present)[0])} has no modality at all; expected at least one vector. Leave "
                "such items out"
            )
        import torch

        fused = self.join(blocks)
        stored = self.rounded(fused)
        if not np.isfinite(stored).all():
            raise DataError(
                f"an embedding holds {np.abs(fused).max():.3g}, too large for {self.dtype}; expected less. "
                "Use normalize or float32"
            )
        return torch.from_numpy(stored.astype(np.float32))

    def block(self, name: str, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """(N, dim): what vectors x (N, dim) of one modality contribute; rows of zeros stay zeros."""
        scaled: npt.NDArray[Any] = x
        if self.normalize:
            norm = np.linalg.norm(x.astype(np.float64), axis=1)
            scaled = x / np.where(norm > 0, norm, 1.0)[:, None]
        block: npt.NDArray[np.float64] = np.sqrt(self.weights[name]) * scaled
        return block

    def join(self, blocks: Sequence[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
        """(N, D): the blocks of all modalities, in the order of `dims`, as one embedding; NaN for a row of zeros to
        normalise.
        """
        fused = np.concatenate(blocks, axis=1) if len(blocks) > 1 else blocks[0]
        if self.normalize:
            with np.errstate(invalid="ignore", divide="ignore"):
                fused = fused / np.linalg.norm(fused, axis=1, keepdims=True)
        return fused

    def rounded(self, x: npt.NDArray[np.float64]) -> npt.NDArray[np.floating[Any]]:
        """Embeddings x (N, D) as they are stored, rounded once to `dtype`; Inf where that cannot hold a component."""
        with np.errstate(over="ignore", invalid="ignore"):
            return x.astype(self.dtype)

    def _matrix(
        self, name: str, vectors: Vectors | None, items: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Vectors (N, dim) of a modality, zeros where one is missing, and which items have one."""
        dim = self.dims[name]
        x, known = np.zeros((items, dim), np.float32), np.zeros(items, bool)
        if vectors is None:
            return x, known
        if hasattr(vectors, "detach"):
            vectors = cast("Tensor", vectors).detach().cpu().numpy()
        known = np.ones(items, bool)
        if not isinstance(vectors, np.ndarray) or vectors.dtype == object:
            known = np.array([row is not None for row in vectors])  # type: ignore[union-attr]
        if not known.any():
            return x, known
        try:
            rows = np.asarray(vectors if known.all() else [row for row in vectors if row is not None], np.float64)  # type: ignore[union-attr]
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{name!r} does not hold vectors of numbers ({error}); expected shape ({items}, {dim}), None where "
                "one is missing"
            ) from error
        if rows.shape != (int(known.sum()), dim):
            raise DataError(
                f"{name!r} has shape {rows.shape}; expected ({items}, {dim}), None where a vector is missing"
            )
        with np.errstate(over="ignore"):
            x[known] = rows
        index = np.flatnonzero(known)
        broken = index[~np.isfinite(x[known]).all(axis=1)]
        if len(broken):
            raise DataError(
                f"{name!r} holds NaN, Inf or numbers too large for float32 in row {broken[0]}; expected finite ones, "
                "and None where a vector is missing"
            )
        zero = index[~x[known].any(axis=1)]
        if self.normalize and len(zero):
            raise DataError(
                f"{name!r} is all zeros in row {zero[0]} and has no direction; expected a vector, or None where it is "
                "missing"
            )
        return x, known

    def to_dict(self) -> dict[str, Any]:
        return {
            "dims": dict(self.dims),
            "weights": dict(self.weights),
            "normalize": self.normalize,
            "dtype": self.dtype,
            "order": list(self.order or ()),
        }

    @staticmethod
    def from_dict(recipe: Any) -> Fusion:
        """Of `to_dict`, or as a codebook of the pipeline has it; other keys, such as the name of an id column, are
        ignored.

        Raises:
            DataError: a key is missing or has a wrong value.
        """
        keys = ("dims", "weights", "normalize", "dtype")
        if not isinstance(recipe, Mapping) or not all(key in recipe for key in keys):
            raise DataError(f"a fusion is stored as {recipe!r}; expected {', '.join(keys)}")
        dims, weights, normalize, dtype = (recipe[key] for key in keys)
        if not (isinstance(dims, Mapping) and isinstance(weights, Mapping) and isinstance(normalize, bool)):
            raise DataError(
                f"a fusion is stored as {recipe!r}; expected dims and weights by name and normalize true or false"
            )
        order = recipe.get("order") or ()
        if not isinstance(order, Sequence) or isinstance(order, str):
            raise DataError(f"order is {order!r}; expected a list of modalities")
        return Fusion(dims, weights, normalize, dtype, tuple(order) or None)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Fusion:
        return Fusion.from_dict(json.loads(text))
