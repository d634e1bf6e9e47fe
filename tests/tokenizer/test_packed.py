"""Vectors as bytes: each type of component is read, and stored rows by their size."""

from __future__ import annotations

import numpy as np
import pytest

from tokenizer import DataError
from tokenizer.packed import decode, unpack_row


@pytest.mark.parametrize(
    ("data", "dtype", "expected"),
    [
        (b"\x00\x00\x80\x3f\x00\x00\x00\xc0", "float32", [1.0, -2.0]),
        (b"\x00\x3c\x00\xc0", "float16", [1.0, -2.0]),
        (b"\x80\x3f\x00\xc0", "bfloat16", [1.0, -2.0]),
        (b"\x00\x00\x00\x00\x00\x00\xf0\x3f", "float64", [1.0]),
        (b"\x01\xfe", "int8", [1.0, -2.0]),
        (b"\x01\xfe", "uint8", [1.0, 254.0]),
    ],
)
def test_each_dtype_is_read(data: bytes, dtype: str, expected: list[float]) -> None:
    assert decode(data, dtype).tolist() == expected


@pytest.mark.parametrize("dtype", ["<f4", "<f2"])
def test_a_stored_row_is_read_by_its_size(dtype: str) -> None:
    x = np.array([1.0, -2.5, 0.125], dtype)
    assert unpack_row(x.tobytes(), 3).dtype == np.float32
    assert unpack_row(x.tobytes(), 3).tolist() == x.tolist()


@pytest.mark.parametrize("size", [0, 6, 11, 16])
def test_a_row_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(DataError, match=rf"{size} bytes; expected 20 \(float32\) or 10 \(float16\), for dimension 5"):
        unpack_row(bytes(size), 5)
