"""The recipe of a table of embeddings: which columns of the source become its vectors, and how."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from jobs.config import MAX_DIM, ConfigError, LoadConfig
from jobs.embeddings.packed import infer_packed
from jobs.embeddings.vectors import is_vector, lengths_of
from jobs.errors import SchemaError
from jobs.files.sources import Source
from jobs.files.values import is_bytes, is_id_type
from tokenizer.fusion import Fusion

FUSION = "sid.fusion"  # property of item_embeddings: the recipe of its rows, `Recipe.to_json`
Sample = Callable[[str], pa.Array]  # the first vectors of a column, without nulls


@dataclass(frozen=True)
class Recipe:
    """How rows of a source become embeddings.

    Attributes:
        item_id: column of the ids.
        fusion: modalities, which are columns of vectors, their weights, order, scaling and the stored type.
        packed: what the components of a column of packed bytes are. It belongs to the source, not to the table.
    """

    item_id: str
    fusion: Fusion
    packed: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The recipe of the table, without `packed`; `Fusion.from_json` reads the fusion from it."""
        return json.dumps({**self.fusion.to_dict(), "item_id": self.item_id}, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Recipe:
        values = json.loads(text)
        return Recipe(values["item_id"], Fusion.from_dict(values))

    def makes_vectors_of(self, table: Recipe) -> bool:
        """Whether both give an item the same vector. A table from before the order was kept has any order of blocks."""
        parts = ["dims", "weights", "normalize", "dtype", *(["order"] if table.fusion.order is not None else [])]
        return all(getattr(self.fusion, part) == getattr(table.fusion, part) for part in parts)

    def packed_note(self) -> str:
        """Which columns are packed otherwise than most."""
        return ", ".join(f"{name} read as packed {dtype}" for name, dtype in self.packed.items() if dtype != "float32")


def resolve_recipe(load: LoadConfig, source: Source, table: Recipe | None, sample: Sample) -> Recipe:
    """The recipe of `table` if there is one (settings must agree with it), else that of the settings and the source.

    Raises:
        ConfigError: the settings contradict the source or the table.
        SchemaError: a column is missing, of a wrong type, or its dimension or bytes are ambiguous.
    """
    names = source.schema.names
    columns = list(load.modalities) or [name for name in names if name.endswith("_embedding")]
    _check_item_id(load.item_id, source)
    if not columns:
        raise SchemaError(
            f"no column of {source.location} ends in '_embedding'; it has {names}. "
            "Name them: load.modalities={col = 1.0}"
        )
    for column in columns:
        _check_vectors(column, source)
    for setting, values in (("load.dims", load.dims), ("load.packed_dtype", load.packed_dtype)):
        for column in values:
            if column not in columns:
                near = difflib.get_close_matches(column, columns, n=1, cutoff=0.4)
                hint = f"did you mean {near[0]}?" if near else f"expected one of {columns}"
                raise ConfigError(f"{setting} names {column!r}, which is no modality; {hint}")
    if table is not None and table.fusion.order is not None and set(table.fusion.order) == set(columns):
        columns = list(table.fusion.order)
    known_dims = {**({} if table is None else table.fusion.dims), **load.dims}
    dims, packed = {}, {}
    for column in columns:
        dims[column], dtype = _dim_and_dtype(load, source, column, known_dims.get(column), sample)
        if dtype is not None:
            packed[column] = dtype
    weights = {column: float(load.modalities.get(column, 1.0)) for column in columns}
    recipe = Recipe(load.item_id, Fusion(dims, weights, load.normalize, load.dtype, tuple(columns)), packed)
    if table is not None and not recipe.makes_vectors_of(table):
        raise ConfigError(
            f"item_embeddings was fused with {table.to_json()}, the settings now say {recipe.to_json()}; one table "
            "holds one recipe. Set load.* back, or start a new warehouse for the new recipe (--warehouse DIR)"
        )
    return recipe


def _check_item_id(column: str, source: Source) -> None:
    if column not in source.schema.names:
        raise SchemaError(
            f"column {column!r} is missing from {source.location}; it has {source.schema.names}. Set load.item_id"
        )
    if without := source.lacking.get(column):
        raise SchemaError(
            f"column {column!r} is missing from {without[0].rpartition('/')[2]}, one of {len(without)} such files of "
            f"{source.location}; expected it in each"
        )
    kind = source.schema.field(column).type
    if not is_id_type(kind):
        raise SchemaError(f"item id column {column!r} has type {kind}; expected integers or strings")


def _check_vectors(column: str, source: Source) -> None:
    if column not in source.schema.names:
        raise SchemaError(
            f"column {column!r} is missing from {source.location}; it has {source.schema.names}. Set load.modalities"
        )
    kind = source.schema.field(column).type
    if not is_vector(kind) and not _is_without_values(source, column):
        hint = " (Spark ML vectors: pyspark.ml.functions.vector_to_array)" if pa.types.is_struct(kind) else ""
        raise SchemaError(f"column {column!r} has type {kind}; expected a list of numbers or packed binary{hint}")


def _is_without_values(source: Source, column: str) -> bool:
    """Whether a column is null in all rows, or NaN, as pandas writes a column of None."""
    kind = source.schema.field(column).type
    if pa.types.is_null(kind):
        return True
    if not pa.types.is_floating(kind) or source.format == "delta":
        return False
    numbers = (batch.column(0).drop_null().to_numpy(zero_copy_only=False) for batch in source.batches([column]))
    return all(np.isnan(values).all() for values in numbers)


def _dim_and_dtype(
    load: LoadConfig, source: Source, column: str, dim: int | None, sample: Sample
) -> tuple[int, str | None]:
    """Dimension of a modality, and what its components are if it is packed.

    The dimension is `dim` if that is known, else the commonest of the sample if more than half of it have that.
    """
    kind = source.schema.field(column).type
    dtype: str | None = load.packed_dtype.get(column)
    if is_bytes(kind):
        if dtype is not None and dim is not None:
            return dim, dtype
        rows = sample(column).to_pylist()
        if dim is not None and not rows:
            return dim, dtype or "float32"  # of no vector
        dtype, dim = infer_packed(rows, column, dim, dtype)
    elif dtype is not None:
        raise ConfigError(f"load.packed_dtype names {column!r}, whose type is {kind}, not packed binary; leave it out")
    elif dim is None:
        dim = _commonest_length(sample(column) if is_vector(kind) else pa.array([], pa.list_(pa.float32())), column)
    if dim > MAX_DIM:
        raise SchemaError(f"column {column!r} has vectors of {dim} components; expected at most {MAX_DIM}")
    return dim, dtype


def _commonest_length(vectors: pa.Array, column: str) -> int:
    lengths = Counter(int(n) for n in lengths_of(vectors) if n > 0)
    if not lengths:
        raise SchemaError(
            f"column {column!r}: its rows hold no vector, so its dimension is unknown; "
            f"expected vectors. Leave it out of load.modalities, or set load.dims={{{column} = D}} if they come later"
        )
    dim, count = lengths.most_common(1)[0]
    if 2 * count <= lengths.total():
        raise SchemaError(
            f"column {column!r} mixes dimensions {dict(lengths.most_common(4))} (dimension: rows) and none has the "
            "majority; expected one dimension. Say which is right, the other rows are then rejected: "
            f"load.dims={{{column} = D}}"
        )
    return dim
