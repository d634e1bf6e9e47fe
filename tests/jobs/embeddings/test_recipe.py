"""recipe: which columns of a source become vectors, their dimensions and packing; without Spark."""

from __future__ import annotations

from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data import topics, write_vectors

from jobs.config import ConfigError
from jobs.embeddings.checks import check_rows
from jobs.embeddings.packed import pack
from jobs.embeddings.recipe import Recipe, resolve_recipe
from jobs.errors import SchemaError
from jobs.files.sources import open_source
from jobs.read_config import load_config
from tokenizer import Fusion


def checked(path: Path, *overrides: str, table: Recipe | None = None) -> tuple[Recipe, dict[Any, dict[str, Any]]]:
    """The recipe for a source with settings, and its rows as they are checked, by item."""
    source = open_source(str(path))
    recipe = resolve_recipe(load_config(overrides=overrides).load, source, table, partial(source.first_values, rows=5))
    columns = [recipe.item_id, *recipe.fusion.dims]
    rows = [
        row
        for batch in source.batches(columns, as_written=[recipe.item_id])
        for row in check_rows(batch, recipe).to_pylist()
    ]
    return recipe, {row["item_id"]: row for row in rows}


def test_every_input_form_gives_the_same_rows(tmp_path: Path) -> None:
    x = topics(10, 4).astype(np.float16)
    halves = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1), pa.float16()), 4)
    forms: dict[str, pa.Array] = {
        "half": halves.cast(pa.list_(pa.float16())),
        "single": pa.array([list(row) for row in x.astype(np.float32)], pa.large_list(pa.float32())),
        "double": pa.array([list(row) for row in x.astype(np.float64)], pa.list_(pa.float64(), 4)),
        "packed": pack(x.astype(np.float32), "float32"),
        "packed, one size": pack(x.astype(np.float32), "float32").cast(pa.binary(16)),
        "packed half": pack(x.astype(np.float32), "float16"),
        "packed double": pa.array([row.astype("<f8").tobytes() for row in x], pa.large_binary()),
    }
    rows = {}
    for form, column in forms.items():
        path = tmp_path / f"{form}.parquet"
        pq.write_table(pa.table({"item_id": [f"item-{n}" for n in range(10)], "text_embedding": column}), path)
        rows[form] = checked(path)[1]
    assert len(rows["half"]) == 10
    assert all(row["reason"] is None for row in rows["half"].values())
    assert all(each == rows["half"] for each in rows.values())


def test_a_folder_as_tools_leave_it_is_one_table(tmp_path: Path) -> None:
    def write(name: str, **columns: pa.Array) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), tmp_path / name)

    x = topics(3, 4)
    no_rows = pa.array([], pa.float64())
    write("part-0.parquet", item_id=no_rows, text_embedding=no_rows)
    floats = pa.array(list(x[:2]), pa.list_(pa.float32(), 4))
    write("part-1.parquet", item_id=pa.array([1.0, 2.0]), text_embedding=floats)
    write(
        "part-2.parquet",
        item_id=pa.array(["a", "b"]).dictionary_encode(),
        image_embedding=pa.array([None, [0.0, 2.0]]),
        text_embedding=pa.array([list(x[2].astype(float)), None]),
    )
    write(
        "more.parquet/part-0",  # the first file, and with it text comes before image
        item_id=pa.array([7]),
        text_embedding=pa.array([None]),
        image_embedding=pa.array([[3, 4]]),
    )
    recipe, rows = checked(tmp_path)
    assert recipe.fusion.dims == {"text_embedding": 4, "image_embedding": 2}
    assert recipe.fusion.order == ("text_embedding", "image_embedding")
    assert [row["reason"] for row in rows.values()] == [None] * 5
    text, image = ["text_embedding"], ["image_embedding"]
    assert {item: row["modalities"] for item, row in rows.items()} == {
        "1": text,
        "2": text,
        "a": text,
        "b": image,
        "7": image,
    }
    blocks = {item: np.frombuffer(row["embedding"], "<f4").tolist() for item, row in rows.items()}
    assert blocks["b"] == [0, 0, 0, 0, 0, 1]
    np.testing.assert_allclose(blocks["7"], [0, 0, 0, 0, 0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(blocks["a"], [*x[2] / np.linalg.norm(x[2]), 0, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("load.item_id=sku", "column 'sku' is missing"),
        ("load.modalities={picture = 1.0}", "column 'picture' is missing"),
        ("load.modalities={name = 1.0}", "column 'name' has type string; expected a list of numbers"),
        ("load.modalities={nested = 1.0}", "column 'nested' has type list<item: list<item: double>>; expected a list"),
        ("load.modalities={flags = 1.0}", "column 'flags' has type list<item: bool>; expected a list of numbers"),
        ("load.modalities={ml = 1.0}", r"column 'ml' has type struct.*vector_to_array"),
        ("load.modalities={nothing = 1.0}", "column 'nothing': its rows hold no vector"),
        ("load.item_id=day", r"item id column 'day' has type date32\[day\]; expected integers or strings"),
        ("load.item_id=yes", "item id column 'yes' has type bool; expected integers or strings"),
        (
            "load.dims={text_embeding = 2}",
            "load.dims names 'text_embeding', which is no modality; did you mean text_embedding?",
        ),
        ("load.packed_dtype={text_embedding = 'int8'}", "load.packed_dtype names 'text_embedding', whose type is list"),
        (
            "load.modalities={packed = 1.0}",
            "column 'packed' has rows of 6 bytes, which look like vectors under no float type",
        ),
    ],
)
def test_a_missing_or_wrong_column_is_named(override: str, message: str, tmp_path: Path) -> None:
    others = {
        "name": ["a"],
        "nested": [[[1.0]]],
        "flags": [[True]],
        "ml": [{"type": 1, "values": [1.0]}],
        "day": [date(2026, 1, 1)],
        "yes": [True],
        "nothing": pa.array([None], pa.float64()),
        "packed": [b"\0\5\7\0\1\0"],
    }
    pq.write_table(pa.table({"item_id": [1], "text_embedding": [[1.0, 2.0]], **others}), tmp_path / "v.parquet")
    with pytest.raises((SchemaError, ConfigError), match=message):
        checked(tmp_path / "v.parquet", override)


def test_mixed_dimensions_without_a_majority_ask_which_is_right(tmp_path: Path) -> None:
    vectors = [[1.0] * (2 + row % 2) for row in range(4)]
    path = write_vectors(tmp_path / "v.parquet", list(range(4)), text_embedding=vectors)
    with pytest.raises(SchemaError, match=r"mixes dimensions \{2: 2, 3: 2\}"):
        checked(path)
    _, rows = checked(path, "load.dims={text_embedding = 3}")
    assert [row["reason"] for row in rows.values()] == ["wrong_dimension", None] * 2


# ---- the recipe of a table ----

TEXT_IMAGE = Fusion({"text_embedding": 4, "image_embedding": 3}, order=("text_embedding", "image_embedding"))


def test_blocks_keep_their_order_when_the_columns_of_the_source_do_not(tmp_path: Path) -> None:
    text, image = topics(5, 4), topics(5, 3)
    first, second = tmp_path / "first.parquet", tmp_path / "second.parquet"
    table, rows = checked(write_vectors(first, list(range(5)), text_embedding=text, image_embedding=image))
    assert table == Recipe("item_id", TEXT_IMAGE)
    write_vectors(second, list(range(5)), image_embedding=image, text_embedding=text)
    assert checked(second, table=table) == (table, rows)
    assert checked(second)[0] != table


@pytest.mark.parametrize(
    "override",
    [
        "load.modalities={text_embedding = 1.0}",
        "load.normalize=false",
        "load.dtype=float16",
        "load.dims={image_embedding = 2}",
    ],
)
def test_a_table_keeps_its_recipe(override: str, tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "v.parquet", [1, 2], text_embedding=topics(2, 4), image_embedding=topics(2, 3))
    with pytest.raises(ConfigError, match="one table holds one recipe"):
        checked(path, override, table=Recipe("item_id", TEXT_IMAGE))
    assert (
        checked(path, table=Recipe("sku", TEXT_IMAGE))[0].item_id == "item_id"
    )  # may have another name in each source


def test_recipes_of_every_release_are_read() -> None:
    """As the property `sid.fusion` has them: text that must not change, since tables of earlier releases hold it."""
    former = (
        '{"dims": {"image": 3, "text": 4}, "dtype": "float32", "item_id": "id", "normalize": true, '
        '"order": ["text", "image"], "weights": {"image": 0.5, "text": 1.0}}'
    )
    recipe = Recipe.from_json(former)
    assert recipe == Recipe("id", Fusion({"text": 4, "image": 3}, {"image": 0.5}, order=("text", "image")))
    assert recipe.to_json() == former
    unordered = Recipe.from_json(former.replace('["text", "image"]', "[]"))
    assert recipe.makes_vectors_of(unordered)
    assert not Recipe("id", Fusion({"text": 4, "image": 3}, {"image": 0.5}, order=("image", "text"))).makes_vectors_of(
        recipe
    )
