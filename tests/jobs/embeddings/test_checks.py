"""checks: each kind of bad row is named, its neighbours survive, and good rows are fused as the library does it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from data import topics
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from jobs.embeddings.checks import check_rows
from jobs.embeddings.recipe import Recipe
from tokenizer import Fusion
from tokenizer.fusion import Precision

ONE = Recipe("item_id", Fusion({"v": 3}))
TWO = Recipe("item_id", Fusion({"v": 3, "w": 2}, {"v": 1.0, "w": 4.0}))


def batch(recipe: Recipe, **columns: Any) -> pa.RecordBatch:
    n = len(next(iter(columns.values())))
    ids = columns.pop("item_id", [f"i{row}" for row in range(n)])
    arrays = [pa.array(ids), *(pa.array(columns[name], pa.list_(pa.float64())) for name in recipe.fusion.dims)]
    return pa.RecordBatch.from_arrays(arrays, names=["item_id", *recipe.fusion.dims])


@pytest.mark.parametrize(
    ("vector", "reason", "message"),
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
def test_each_kind_of_bad_vector_is_named_and_its_neighbours_survive(vector: Any, reason: str, message: str) -> None:
    checked = check_rows(batch(ONE, v=[[1.0, 0.0, 0.0], vector, [0.0, 2.0, 0.0]]), ONE).to_pylist()
    assert [row["reason"] for row in checked] == [None, reason, None]
    assert message in checked[1]["detail"]
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
def test_the_library_fuses_to_the_bytes_that_load_stores(dtype: Precision) -> None:
    """By the recipe as a codebook has it, blocks not in the order of their names, and as NumPy does it in float64."""
    recipe = Recipe("item_id", Fusion({"w": 5, "v": 3}, {"w": 0.5, "v": 1.0}, dtype=dtype, order=("w", "v")))
    generator = np.random.default_rng(0)
    w, v = (generator.normal(size=(2000, dim)).astype(np.float32) for dim in (5, 3))
    present = np.arange(2000) % 7 != 3
    images = [list(vector) if here else None for here, vector in zip(present, v, strict=True)]
    stored = check_rows(batch(recipe, w=list(map(list, w)), v=images), recipe)["embedding"].to_pylist()
    fused = Fusion.from_json(recipe.to_json())(w=w, v=images).numpy().astype(dtype)
    assert [row.tobytes() for row in fused] == stored
    blocks = [x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in (w, v)]
    whole = np.concatenate([np.sqrt(0.5) * blocks[0], np.where(present[:, None], blocks[1], 0.0)], axis=1)
    expected = (whole / np.linalg.norm(whole, axis=1, keepdims=True)).astype(dtype)
    assert [row.tobytes() for row in expected] == stored


def test_an_embedding_is_rounded_once() -> None:
    """By way of float32 the value would be halfway between two of float16, and round to the even one below it."""
    above_half = 1 + 2**-11 + 2**-30
    recipe = Recipe("item_id", Fusion({"v": 1}, {"v": above_half**2}, normalize=False, dtype="float16"))
    stored = check_rows(batch(recipe, v=[[1.0]]), recipe)["embedding"][0].as_py()
    assert np.frombuffer(stored, "<f2").tolist() == [1 + 2**-10]
    assert recipe.fusion(v=[[1.0]]).tolist() == [[1 + 2**-10]]


def test_a_missing_modality_is_a_block_of_zeros() -> None:
    row = check_rows(batch(TWO, v=[[0.0, 3.0, 4.0]], w=[None]), TWO).to_pylist()[0]
    np.testing.assert_allclose(np.frombuffer(row["embedding"], "<f4"), [0, 0.6, 0.8, 0, 0], rtol=1e-6)
    assert row["modalities"] == ["v"]


def test_without_normalisation_lengths_are_left_alone() -> None:
    raw = Recipe("item_id", Fusion({"v": 3}, normalize=False))
    row = check_rows(batch(raw, v=[[1.0, 20.0, 255.0]]), raw).to_pylist()[0]
    np.testing.assert_array_equal(np.frombuffer(row["embedding"], "<f4"), [1, 20, 255])


def test_the_verdict_of_a_packed_row_does_not_depend_on_its_neighbours() -> None:
    halves = Recipe("item_id", ONE.fusion, {"v": "float16"})
    x = topics(6, 3).astype(np.float16)
    rows = [row.tobytes() for row in x]
    rows[2] = x[2].astype(np.float32).tobytes()
    for of in (range(6), [1, 2], [2]):
        columns = [pa.array(["a"] * len(of)), pa.array([rows[n] for n in of], pa.binary())]
        packed = pa.RecordBatch.from_arrays(columns, names=["item_id", "v"])
        reasons = check_rows(packed, halves)["reason"].to_pylist()
        assert reasons == ["wrong_dimension" if n == 2 else None for n in of]


@pytest.mark.parametrize(
    ("value", "reason", "message"),
    [
        (65504.0, None, ""),
        (70000.0, "inf", "a component of 7e+04; expected at most 6.55e+04, the largest of float16"),
        (-1e30, "inf", "a component of 1e+30"),
        (1e-9, "zero_norm", "all zeros in float16"),
    ],
)
def test_what_float16_cannot_hold_is_rejected(value: float, reason: str | None, message: str) -> None:
    raw = Recipe("item_id", Fusion({"v": 3}, normalize=False, dtype="float16"))
    checked = check_rows(batch(raw, v=[[0.0, value, 0.0], [1.0, 2.0, 3.0]]), raw).to_pylist()
    assert [row["reason"] for row in checked] == [reason, None]
    assert message in checked[0]["detail"]
    assert (checked[0]["embedding"] is None) == (reason is not None)


def test_a_weight_that_exceeds_float32_is_rejected() -> None:
    raw = Recipe("item_id", Fusion({"v": 3}, {"v": 1e40}, normalize=False))
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


def test_a_task_that_checks_rows_loads_neither_torch_nor_spark() -> None:
    """Half a gigabyte and seconds in each worker."""
    code = "import sys, jobs.embeddings.checks; print(*{'torch', 'pyspark'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "\n"
