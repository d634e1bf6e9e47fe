"""load: nothing is lost, each kind of bad row is named, a second run changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data import topics, write_vectors
from delta import DeltaTable
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import tokenizer
from jobs import load
from jobs.config import Config, ConfigError
from jobs.embeddings.packed import as_float_arrays, pack, unpack
from jobs.errors import SchemaError, WarehouseError
from jobs.load import Fusion, check_rows
from jobs.warehouse.delta_spark import Warehouse
from jobs.warehouse.tables import ITEM_EMBEDDINGS, REJECTED_EMBEDDINGS

DAY, NEXT_DAY = date(2026, 1, 1), date(2026, 1, 2)
Settings = Callable[..., Config]
ONE = Fusion("item_id", {"v": 3}, {"v": 1.0}, normalize=True, dtype="float32")
TWO = Fusion("item_id", {"v": 3, "w": 2}, {"v": 1.0, "w": 4.0}, normalize=True, dtype="float32")


def batch(fusion: Fusion, **columns: Any) -> pa.RecordBatch:
    n = len(next(iter(columns.values())))
    ids = columns.pop("item_id", [f"i{row}" for row in range(n)])
    arrays = [pa.array(ids), *(pa.array(columns[name], pa.list_(pa.float64())) for name in fusion.dims)]
    return pa.RecordBatch.from_arrays(arrays, names=["item_id", *fusion.dims])


@pytest.mark.parametrize(
    ("vector", "reason", "says"),
    [
        (None, "null_embedding", "expected at least one vector"),
        ([1.0, 2.0], "wrong_dimension", "v has 2 components; expected 3"),
        ([1.0, 2.0, 3.0, 4.0], "wrong_dimension", "v has 4 components; expected 3"),
        ([], "wrong_dimension", "v has 0 components; expected 3"),
        ([1.0, float("nan"), 3.0], "nan", "v has 1 NaN; expected numbers"),
        ([1.0, None, 3.0], "nan", "v has 1 NaN; expected numbers"),
        ([1.0, float("inf"), -float("inf")], "inf", "v has 2 infinities; expected finite numbers"),
        ([1.0, 1e300, 1.0], "inf", "v has 1 infinities"),
        ([0.0, 0.0, 0.0], "zero_norm", "all zeros"),
    ],
)
def test_each_kind_of_bad_vector_is_named_and_its_neighbours_survive(vector: Any, reason: str, says: str) -> None:
    checked = check_rows(batch(ONE, v=[[1.0, 0.0, 0.0], vector, [0.0, 2.0, 0.0]]), ONE).to_pylist()
    assert [row["reason"] for row in checked] == [None, reason, None]
    assert says in checked[1]["detail"]
    assert checked[1]["embedding"] is None
    assert all(checked[row]["embedding"] is not None for row in (0, 2))


@pytest.mark.parametrize("item_id", [None, ""])
def test_an_item_without_an_id_is_rejected(item_id: Any) -> None:
    checked = check_rows(batch(ONE, item_id=[item_id, "a"], v=[[1.0, 0, 0]] * 2), ONE).to_pylist()
    assert [row["reason"] for row in checked] == ["null_item_id", None]


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.none(),
            st.lists(st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True)), min_size=0, max_size=5),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_every_row_has_an_embedding_or_a_reason_never_both(vectors: list[Any]) -> None:
    checked = check_rows(batch(ONE, v=vectors), ONE).to_pylist()
    assert len(checked) == len(vectors)
    for row in checked:
        assert (row["embedding"] is None) != (row["reason"] is None)
        if row["embedding"] is not None:
            x = np.frombuffer(row["embedding"], "<f4")
            assert np.isfinite(x).all()
            assert np.linalg.norm(x) == pytest.approx(1.0, abs=1e-5)


def test_modalities_are_scaled_weighted_and_joined() -> None:
    v, w = np.array([3.0, 0.0, 4.0]), np.array([0.0, 5.0])
    row = check_rows(batch(TWO, v=[list(v)], w=[list(w)]), TWO).to_pylist()[0]
    whole = np.concatenate(
        [1.0 * v / 5.0, 2.0 * w / 5.0]
    )  # weight 4 counts twice in length, four times in squared distance
    np.testing.assert_allclose(np.frombuffer(row["embedding"], "<f4"), whole / np.linalg.norm(whole), rtol=1e-6)
    assert row["modalities"] == ["v", "w"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_library_fuses_to_the_bytes_that_load_stores(dtype: str) -> None:
    """By the recipe as a codebook has it: the blocks in the order of the columns, not of their names."""
    recipe = Fusion("item_id", {"w": 5, "v": 3}, {"w": 0.5, "v": 1.0}, True, dtype, ("w", "v"))
    generator = np.random.default_rng(0)
    w, v = (generator.normal(size=(40, dim)).astype(np.float32) for dim in (5, 3))
    images = [None if row % 7 == 3 else list(vector) for row, vector in enumerate(v)]
    stored = check_rows(batch(recipe, w=list(map(list, w)), v=images), recipe)["embedding"].to_pylist()
    fused = tokenizer.Fusion.from_json(recipe.to_json())(w=w, v=images).numpy().astype(dtype)
    assert [row.tobytes() for row in fused] == stored


def test_a_missing_modality_is_a_block_of_zeros() -> None:
    row = check_rows(batch(TWO, v=[[0.0, 3.0, 4.0]], w=[None]), TWO).to_pylist()[0]
    np.testing.assert_allclose(np.frombuffer(row["embedding"], "<f4"), [0, 0.6, 0.8, 0, 0], rtol=1e-6)
    assert row["modalities"] == ["v"]


def test_without_normalisation_lengths_are_left_alone() -> None:
    raw = Fusion("item_id", {"v": 3}, {"v": 1.0}, normalize=False, dtype="float32")
    row = check_rows(batch(raw, v=[[1.0, 20.0, 255.0]]), raw).to_pylist()[0]
    np.testing.assert_array_equal(np.frombuffer(row["embedding"], "<f4"), [1, 20, 255])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_pack_and_unpack_agree(dtype: str) -> None:
    x = topics(7, 5)
    column = pack(x, dtype)
    np.testing.assert_allclose(
        unpack(column, 5), x, rtol=0 if dtype == "float32" else 1e-3, atol=0 if dtype == "float32" else 1e-3
    )
    np.testing.assert_array_equal(unpack(column.slice(2, 3), 5), unpack(column, 5)[2:5])


def test_unpack_refuses_rows_of_another_length() -> None:
    with pytest.raises(SchemaError, match=r"hold \[20\] bytes; expected 16 \(float32\) or 8"):
        unpack(pack(topics(2, 5), "float32"), 4)


def test_the_verdict_of_a_packed_row_does_not_depend_on_its_neighbours() -> None:
    x = topics(6, 3).astype(np.float16)
    rows = [row.tobytes() for row in x]
    rows[2] = x[2].astype(np.float32).tobytes()
    for of in (range(6), [1, 2], [2]):
        columns = [pa.array(["a"] * len(of)), pa.array([rows[n] for n in of], pa.binary())]
        packed = pa.RecordBatch.from_arrays(columns, names=["item_id", "v"])
        reasons = check_rows(packed, ONE, {"v": "float16"})["reason"].to_pylist()
        assert reasons == ["wrong_dimension" if n == 2 else None for n in of]


@pytest.mark.parametrize(
    ("value", "reason", "says"),
    [
        (65504.0, None, ""),
        (70000.0, "inf", "a component of 7e+04; expected at most 6.55e+04, the largest of float16"),
        (-1e30, "inf", "a component of 1e+30"),
        (1e-9, "zero_norm", "all zeros in float16"),
    ],
)
def test_what_float16_cannot_hold_is_rejected(value: float, reason: str | None, says: str) -> None:
    raw = Fusion("item_id", {"v": 3}, {"v": 1.0}, normalize=False, dtype="float16")
    checked = check_rows(batch(raw, v=[[0.0, value, 0.0], [1.0, 2.0, 3.0]]), raw).to_pylist()
    assert [row["reason"] for row in checked] == [reason, None]
    assert says in checked[0]["detail"]
    assert (checked[0]["embedding"] is None) == (reason is not None)


def test_a_weight_that_exceeds_float32_is_rejected() -> None:
    raw = Fusion("item_id", {"v": 3}, {"v": 1e40}, normalize=False, dtype="float32")
    assert check_rows(batch(raw, v=[[1e20, 0.0, 0.0]]), raw)["reason"].to_pylist() == ["inf"]


@pytest.mark.parametrize(
    ("column", "reasons"),
    [
        (pa.array([[1, 2, 255], None], pa.list_(pa.uint8())), [None, "null_embedding"]),
        (pa.array([["1.5", "2", "3"], ["1", None, "2"]]).cast(pa.list_(pa.decimal128(5, 2))), [None, "nan"]),
        (pa.array([[2**60, 1, 0], [1, None, 2]], pa.large_list(pa.int64())), [None, "nan"]),
        (pa.array([[None] * 3, []], pa.list_(pa.null())), ["nan", "wrong_dimension"]),
        (pa.nulls(2), ["null_embedding"] * 2),
        (pa.nulls(2, pa.float64()), ["null_embedding"] * 2),
    ],
)
def test_lists_of_any_numbers_are_vectors(column: pa.Array, reasons: list[Any]) -> None:
    rows = pa.RecordBatch.from_arrays([pa.array(["a", "b"]), column], names=["item_id", "v"])
    assert check_rows(rows, ONE)["reason"].to_pylist() == reasons


def test_ids_that_are_none_are_rejected_and_shown() -> None:
    ids = pa.array([3.0, 3.5, float("nan"), 1e300])
    rows = pa.RecordBatch.from_arrays([ids, pa.array([[1.0, 0.0, 0.0]] * 4)], names=["item_id", "v"])
    checked = check_rows(rows, ONE).to_pylist()
    assert [row["reason"] for row in checked] == [None, "wrong_item_id", "null_item_id", "wrong_item_id"]
    assert [row["item_id"] for row in checked[:3]] == ["3", "3.5", None]
    assert "item id is 3.5; expected text in UTF-8, or a whole number" in checked[1]["detail"]


# ---- with Spark ----


def stored(warehouse: Warehouse) -> list[Any]:
    return [tuple(row) for row in warehouse.read(ITEM_EMBEDDINGS).orderBy("item_id").collect()]


def rejected(warehouse: Warehouse) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in warehouse.read(REJECTED_EMBEDDINGS).orderBy("item_id", "occurrence").collect():
        found.setdefault(row["reason"], []).append(row["item_id"])
    return found


def test_duplicates_bad_rows_and_good_rows_add_up(tmp_path: Path, warehouse: Warehouse, settings: Settings) -> None:
    good = topics(20, 4)
    rows: list[Any] = [*good, good[3], good[4], good[5] + 1, [np.nan] * 4, None]
    ids = [*range(20), 3, 3, 5, 100, 101]
    rows[21] = good[3]  # item 3 three times with one vector; item 5 twice with two
    path = write_vectors(tmp_path / "v.parquet", ids, text_embedding=rows)
    result = load.run(settings(f"load.source={path}"), warehouse, DAY)
    assert (result.rows_in, result.rows_stored, result.rows_rejected) == (25, 19, 6)
    assert rejected(warehouse) == {
        "duplicate_identical": ["3", "3"],
        "duplicate_conflicting": ["5", "5"],
        "nan": ["100"],
        "null_embedding": ["101"],
    }
    assert result.reasons == {"duplicate_identical": 2, "duplicate_conflicting": 2, "nan": 1, "null_embedding": 1}
    assert len(stored(warehouse)) == result.rows_stored == result.new


def test_a_second_run_changes_nothing_and_a_changed_vector_is_replaced(
    tmp_path: Path, warehouse: Warehouse, settings: Settings
) -> None:
    x = topics(12, 4)
    config = settings(f"load.source={write_vectors(tmp_path / 'v.parquet', list(range(12)), text_embedding=x)}")
    first = load.run(config, warehouse, DAY)
    before = stored(warehouse)
    again = load.run(config, warehouse, NEXT_DAY)
    assert again.nothing_to_do
    assert (again.version, stored(warehouse)) == (first.version, before)

    x[0] = -x[0]
    write_vectors(tmp_path / "v.parquet", list(range(13)), text_embedding=[*x, x[1] + x[2]])
    changed = load.run(config, warehouse, NEXT_DAY)
    assert (changed.new, changed.changed, changed.rows_stored) == (1, 1, 13)
    days = {row["item_id"]: (row["first_seen"], row["run_date"]) for row in warehouse.read(ITEM_EMBEDDINGS).collect()}
    assert days["0"] == (DAY, NEXT_DAY)
    assert days["1"] == (DAY, DAY)
    assert days["12"] == (NEXT_DAY, NEXT_DAY)


@pytest.mark.parametrize("rows", [5, 3])
def test_a_source_that_changes_while_it_is_read_is_named(
    rows: int, tmp_path: Path, warehouse: Warehouse, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_vectors(tmp_path / "v.parquet", list(range(5)), text_embedding=topics(5, 4))

    def judged(frame: Any, split: Any = load.split_duplicates) -> Any:
        # Before the vectors are packed: others, or fewer.
        write_vectors(path, list(range(rows)), text_embedding=topics(5, 4)[:rows] * (-1 if rows == 5 else 1))
        return split(frame)

    monkeypatch.setattr(load, "split_duplicates", judged)
    with pytest.raises(SchemaError, match=r"v\.parquet changed while it was read"):
        load.run(settings(f"load.source={path}"), warehouse, DAY)
    assert stored(warehouse) == []
    monkeypatch.undo()
    assert load.run(settings(f"load.source={path}"), warehouse, DAY).new == rows


def test_rows_of_many_row_groups_are_stored_where_they_changed(
    tmp_path: Path, warehouse: Warehouse, settings: Settings
) -> None:
    x, ids = topics(50, 4), [f"i{row:02}" for row in range(50)]

    def write(rows: np.ndarray) -> Path:
        vectors = pa.array(list(rows), pa.list_(pa.float32()))
        pq.write_table(pa.table({"item_id": ids, "text_embedding": vectors}), tmp_path / "v.parquet", row_group_size=7)
        return tmp_path / "v.parquet"

    config = settings(f"load.source={write(x)}")
    assert load.run(config, warehouse, DAY).new == 50
    x[[0, 6, 7, 33, 49]] *= -1  # first and last of a group, one of the last
    write(x)
    assert load.run(config, warehouse, NEXT_DAY).changed == 5
    rows = warehouse.read(ITEM_EMBEDDINGS).orderBy("item_id").collect()
    assert [n for n, row in enumerate(rows) if row["run_date"] == NEXT_DAY] == [0, 6, 7, 33, 49]
    found = np.stack([np.frombuffer(row["embedding"], "<f4") for row in rows])
    np.testing.assert_allclose(found, x / np.linalg.norm(x, axis=1, keepdims=True), rtol=1e-6)


def test_every_input_form_gives_the_same_table(tmp_path: Path, warehouse: Warehouse, settings: Settings) -> None:
    x = topics(10, 4).astype(np.float16)
    ids = [f"item-{n}" for n in range(10)]
    forms: dict[str, pa.Array] = {
        "half": pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1), pa.float16()), 4).cast(
            pa.list_(pa.float16())
        ),
        "single": pa.array([list(row) for row in x.astype(np.float32)], pa.large_list(pa.float32())),
        "double": pa.array([list(row) for row in x.astype(np.float64)], pa.list_(pa.float64(), 4)),
        "packed": pack(x.astype(np.float32), "float32"),
        "packed, one size": pack(x.astype(np.float32), "float32").cast(pa.binary(16)),
        "packed half": pack(x.astype(np.float32), "float16"),
        "packed double": pa.array([row.astype("<f8").tobytes() for row in x], pa.large_binary()),
    }
    tables = {}
    for form, column in forms.items():
        path = tmp_path / f"{form}.parquet"
        pq.write_table(pa.table({"item_id": pa.array(ids), "text_embedding": column}), path)
        home = Warehouse(warehouse.spark, f"{warehouse.root}/{form}")
        load.run(settings(f"load.source={path}"), home, DAY)
        tables[form] = stored(home)
    assert len(tables["half"]) == 10
    assert all(table == tables["half"] for table in tables.values())


def test_a_delta_source_gives_the_rows_of_its_current_version(
    tmp_path: Path, warehouse: Warehouse, settings: Settings
) -> None:
    path = write_vectors(tmp_path / "v.parquet", list(range(10)), text_embedding=topics(10, 4))
    load.run(settings(f"load.source={path}"), warehouse, DAY)
    spark, folder = warehouse.spark, str(tmp_path / "a [delta] {1,2} 100%")
    frame = spark.read.parquet(str(path)).withColumnRenamed("item_id", "item.id")
    writer = frame.unionByName(frame.withColumn("item.id", frame["`item.id`"] + 100)).coalesce(1).write.format("delta")
    writer.option("delta.enableDeletionVectors", "true").save(folder)
    DeltaTable.forPath(spark, folder).delete("`item.id` >= 100")  # by a deletion vector: the file stays
    home = Warehouse(spark, f"{warehouse.root}/from_delta")
    result = load.run(settings(f"load.source={folder}", "load.item_id='item.id'"), home, DAY)
    assert (result.rows_in, result.rows_stored) == (10, 10)
    assert stored(home) == stored(warehouse)
    with pytest.raises(ConfigError, match=r"Set load\.source_format to delta or auto"):
        load.run(settings(f"load.source={folder}", "load.source_format=parquet"), home, DAY)


def test_a_folder_as_tools_leave_it_is_one_table(tmp_path: Path, warehouse: Warehouse, settings: Settings) -> None:
    def write(name: str, **columns: pa.Array) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), folder / name)

    folder, x = tmp_path / "in", topics(6, 4)
    no_rows = pa.array([], pa.float64())
    write("part-0.parquet", item_id=no_rows, text_embedding=no_rows)
    write(
        "part-1.parquet", item_id=pa.array([1.0, 2.0]), text_embedding=pa.array(list(x[:2]), pa.list_(pa.float32(), 4))
    )
    write(
        "part-2.parquet",
        item_id=pa.array(["a", "b"]).dictionary_encode(),
        image_embedding=pa.array([None, [0.0, 2.0]]),
        text_embedding=pa.array([list(x[2].astype(float)), None]),
    )
    write(
        "more.parquet/part-0",
        item_id=pa.array([7]),
        text_embedding=pa.array([None]),
        image_embedding=pa.array([[3, 4]]),
    )
    write("_temporary/0/part-1.parquet", item_id=pa.array([1.0]), text_embedding=pa.array([[5.0]]))
    (folder / "._part-1.parquet").write_bytes(b"AppleDouble")
    (folder / "notes.txt").write_text("made on Tuesday")
    result = load.run(settings(f"load.source={folder}"), warehouse, DAY)
    assert (result.rows_in, result.rows_stored, result.reasons) == (5, 5, {})
    assert result.note == "left out, not Parquet: notes.txt"
    rows = {row["item_id"]: row for row in warehouse.read(ITEM_EMBEDDINGS).collect()}
    assert {item: sorted(row["modalities"]) for item, row in rows.items()} == {
        "1": ["text_embedding"], "2": ["text_embedding"], "a": ["text_embedding"], "b": ["image_embedding"], "7": ["image_embedding"],
    }  # fmt: skip
    blocks = {item: np.frombuffer(row["embedding"], "<f4").tolist() for item, row in rows.items()}
    # more.parquet comes first, and with it text before image.
    assert blocks["b"] == [0, 0, 0, 0, 0, 1]
    np.testing.assert_allclose(blocks["7"], [0, 0, 0, 0, 0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(blocks["a"], [*x[2] / np.linalg.norm(x[2]), 0, 0], rtol=1e-6)


def test_of_daily_folders_the_newest_is_loaded_and_named(
    tmp_path: Path, warehouse: Warehouse, settings: Settings
) -> None:
    x = topics(6, 4)
    write_vectors(tmp_path / "in" / "dt=2026-01-01" / "p.parquet", list(range(6)), text_embedding=x)
    write_vectors(tmp_path / "in" / "dt=2026-01-02" / "p.parquet", list(range(5)), text_embedding=-x[:5])
    result = load.run(settings(f"load.source={tmp_path / 'in'}"), warehouse, DAY)
    assert (result.rows_in, result.rows_stored) == (5, 5)
    assert result.note == "snapshot dt=2026-01-02, the newest of 2 daily folders"
    everything = load.run(settings(f"load.source={tmp_path / 'in'}", "load.snapshots=all"), warehouse, DAY)
    assert (everything.rows_in, everything.reasons) == (11, {"duplicate_conflicting": 10})


def test_blocks_keep_their_order_when_the_columns_of_the_source_do_not(
    tmp_path: Path, warehouse: Warehouse, settings: Settings
) -> None:
    path, text, image = tmp_path / "v.parquet", topics(5, 4), topics(5, 3)
    write_vectors(path, list(range(5)), text_embedding=text, image_embedding=image)
    load.run(settings(f"load.source={path}"), warehouse, DAY)
    before = stored(warehouse)
    write_vectors(path, list(range(5)), image_embedding=image, text_embedding=text)
    result = load.run(settings(f"load.source={path}"), warehouse, NEXT_DAY)
    assert (result.changed, result.nothing_to_do) == (0, False)
    assert stored(warehouse) == before


def test_rows_that_do_not_reach_the_table_stop_the_load(
    tmp_path: Path, warehouse: Warehouse, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(
        f"load.source={write_vectors(tmp_path / 'v.parquet', list(range(5)), text_embedding=topics(5, 4))}"
    )

    def append(self: Warehouse, table: Any, rows: Any, write: Any = Warehouse.append) -> int:
        return write(self, table, rows.where("item_id <> '3'"))

    monkeypatch.setattr(Warehouse, "append", append)
    with pytest.raises(
        WarehouseError, match="5 rows were read, but 4 of them stand in item_embeddings and 0 in rejected"
    ):
        load.run(config, warehouse, DAY)
    monkeypatch.undo()
    result = load.run(config, warehouse, DAY)
    assert (result.rows_stored, result.new, result.nothing_to_do) == (5, 1, False)


def test_a_load_that_rejects_everything_says_why_and_leaves_no_recipe(
    tmp_path: Path, warehouse: Warehouse, settings: Settings
) -> None:
    path = write_vectors(tmp_path / "v.parquet", [5, 6, None], text_embedding=[[1.0, 2.0]] * 3)
    with pytest.raises(
        SchemaError,
        match=r"all 3 rows of .* were rejected \(wrong_dimension 2, null_item_id 1\); .* item '5': "
        "text_embedding has 2 components; expected 3",
    ):
        load.run(settings(f"load.source={path}", "load.dims={text_embedding = 3}"), warehouse, DAY)
    assert rejected(warehouse) == {"null_item_id": [None], "wrong_dimension": ["5", "6"]}
    assert load.run(settings(f"load.source={path}"), warehouse, DAY).rows_stored == 2


def test_the_float_view_shows_the_vectors(tmp_path: Path, warehouse: Warehouse, settings: Settings) -> None:
    x = topics(5, 4)
    load.run(
        settings(f"load.source={write_vectors(tmp_path / 'v.parquet', list(range(5)), text_embedding=x)}"),
        warehouse,
        DAY,
    )
    rows = as_float_arrays(warehouse.read(ITEM_EMBEDDINGS)).orderBy("item_id").collect()
    np.testing.assert_allclose(
        [row["embedding"] for row in rows], x / np.linalg.norm(x, axis=1, keepdims=True), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("override", "says"),
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
def test_a_missing_or_wrong_column_is_named(
    override: str, says: str, tmp_path: Path, warehouse: Warehouse, settings: Settings
) -> None:
    path = tmp_path / "v.parquet"
    others = {
        "name": ["a"], "nested": [[[1.0]]], "flags": [[True]], "ml": [{"type": 1, "values": [1.0]}], "day": [DAY], "yes": [True],
        "nothing": pa.array([None], pa.float64()), "packed": [b"\0\5\7\0\1\0"],
    }  # fmt: skip
    pq.write_table(pa.table({"item_id": [1], "text_embedding": [[1.0, 2.0]], **others}), path)
    with pytest.raises((SchemaError, ConfigError), match=says):
        load.run(settings(f"load.source={path}", override), warehouse, DAY)


def test_mixed_dimensions_without_a_majority_ask_which_is_right(
    tmp_path: Path, warehouse: Warehouse, settings: Settings
) -> None:
    path = write_vectors(
        tmp_path / "v.parquet", list(range(6)), text_embedding=[[1.0] * (2 + row % 2) for row in range(6)]
    )
    with pytest.raises(SchemaError, match=r"mixes dimensions \{2: 3, 3: 3\}"):
        load.run(settings(f"load.source={path}"), warehouse, DAY)
    result = load.run(settings(f"load.source={path}", "load.dims={text_embedding = 3}"), warehouse, DAY)
    assert (result.rows_stored, result.reasons) == (3, {"wrong_dimension": 3})


def test_an_empty_table_is_refused(tmp_path: Path, warehouse: Warehouse, settings: Settings) -> None:
    path = tmp_path / "v.parquet"
    pq.write_table(
        pa.table({"item_id": pa.array([], pa.int64()), "text_embedding": pa.array([], pa.list_(pa.float32()))}), path
    )
    with pytest.raises(SchemaError, match="has no rows"):
        load.run(settings(f"load.source={path}"), warehouse, DAY)


def test_a_source_that_is_not_there_or_not_parquet_is_named(
    tmp_path: Path, warehouse: Warehouse, settings: Settings
) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.parquet does not exist"):
        load.run(settings(f"load.source={tmp_path / 'nowhere.parquet'}"), warehouse, DAY)
    (tmp_path / "text.parquet").write_text("item_id,vector")
    with pytest.raises(SchemaError, match="not a readable Parquet file"):
        load.run(settings(f"load.source={tmp_path / 'text.parquet'}"), warehouse, DAY)


def test_a_table_keeps_its_recipe(tmp_path: Path, warehouse: Warehouse, settings: Settings) -> None:
    path = write_vectors(
        tmp_path / "v.parquet", list(range(5)), text_embedding=topics(5, 4), image_embedding=topics(5, 3)
    )
    load.run(settings(f"load.source={path}"), warehouse, DAY)
    with pytest.raises(ConfigError, match="one table holds one recipe"):
        load.run(settings(f"load.source={path}", "load.modalities={text_embedding = 1.0}"), warehouse, DAY)
