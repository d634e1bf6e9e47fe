"""packed: what the bytes of others are is inferred where it is certain, else refused; ours are read back exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from data import topics

from jobs.embeddings.packed import infer_packed, pack, unpack
from jobs.errors import SchemaError

X = np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32)


def bfloat16(x: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(x, "<f4").view("<u4") >> 16).astype("<u2")


def rows(x: np.ndarray) -> list[bytes]:
    return [row.tobytes() for row in x]


CERTAIN: dict[str, tuple[np.ndarray, str]] = {
    "float32": (X, "float32"),
    "float32, scaled to unit length": (X / np.linalg.norm(X, axis=1, keepdims=True), "float32"),
    "float32 that were float16": (X.astype("<f2").astype("<f4"), "float32"),
    "float32 that were bfloat16": ((bfloat16(X).astype("<u4") << 16).view("<f4"), "float32"),
    "float32, mostly zeros": (np.where(X > 1, X, 0), "float32"),
    "float32, counts": (np.abs(np.round(40 * X)), "float32"),
    "float64": (X + np.random.default_rng(1).normal(size=X.shape), "float64"),
    "float64 that were float32": (X.astype("<f8"), "float64"),
    "float64 that were float16": (X.astype("<f2").astype("<f8"), "float64"),
    "float16": (X.astype("<f2"), "float16"),
}


@pytest.mark.parametrize("name", CERTAIN)
def test_floats_that_can_be_one_thing_only_are_read_so(name: str) -> None:
    x, dtype = CERTAIN[name]
    assert infer_packed(rows(x), "v", None) == (dtype, 16)
    assert infer_packed(rows(x), "v", 16) == (dtype, 16)


UNCERTAIN: dict[str, np.ndarray] = {
    "int8": np.clip(np.round(40 * X), -128, 127).astype("i1"),
    "uint8": np.clip(np.round(40 * np.abs(X)), 0, 255).astype("u1"),
    "small uint8": np.clip(np.round(4 * np.abs(X)), 0, 255).astype("u1"),
    "bfloat16": bfloat16(X),
    "int32": np.round(1000 * X).astype("<i4"),
    "big-endian float32": X.astype(">f4"),
    "zeros": np.zeros((5, 16), "<f4"),
}


@pytest.mark.parametrize("name", UNCERTAIN)
def test_bytes_that_could_be_several_things_or_none_are_refused(name: str) -> None:
    with pytest.raises(SchemaError, match=r"Say what they are: load\.packed_dtype=\{v = 'float32'\}"):
        infer_packed(rows(UNCERTAIN[name]), "v", None)


@pytest.mark.parametrize("name", ["int8", "bfloat16"])
def test_a_dimension_does_not_make_bytes_floats(name: str) -> None:
    with pytest.raises(SchemaError, match=r"load\.packed_dtype"):
        infer_packed(rows(UNCERTAIN[name]), "v", 16)


def test_some_bad_rows_do_not_change_what_a_column_is() -> None:
    x = X.copy()
    x[:20] = np.nan
    x[20:30] = np.inf
    x[30:40] = 0
    mixed = [*rows(x), *rows(X[:50].astype("<f2")), *rows(X[:9].astype("<f8")), b"", b"odd"]
    for dim in (None, 16):
        assert infer_packed(mixed, "v", dim) == ("float32", 16)


@pytest.mark.parametrize(
    ("sample", "dim", "dtype", "message"),
    [
        (rows(X) + rows(X.astype("<f2")), None, None, r"64 \(200 rows\), 32 \(200 rows\) bytes and none has"),
        (rows(X) + rows(X.astype("<f2")), 16, None, "none has the majority"),
        (rows(X), 17, None, "none is 2, 4 or 8 times the dimension 17"),
        (rows(X[:, :3].astype("<f2")), None, "float32", "rows of 6 bytes, which are no float32 of 4 bytes each"),
        ([b""], None, None, "its first rows hold none"),
    ],
)
def test_what_does_not_fit_is_a_sentence(sample: list[bytes], dim: Any, dtype: Any, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        infer_packed(sample, "v", dim, dtype)


def test_a_named_dtype_is_taken_as_it_is() -> None:
    assert infer_packed(rows(UNCERTAIN["int8"]), "v", None, "int8") == ("int8", 16)


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
