"""values: ids as text, of every type that others write them in."""

from __future__ import annotations

from decimal import Decimal
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow as pa
import pytest

from jobs.files.values import as_ids, is_id_type

UUID_5 = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([UUID(int=5).bytes], pa.binary(16)))


@pytest.mark.parametrize(
    ("column", "texts", "wrong"),
    [
        (pa.array([1, None, -3], pa.int32()), ["1", None, "-3"], []),
        (pa.array([2**64 - 1], pa.uint64()), ["18446744073709551615"], []),
        (pa.array([3.0, None, np.nan, 1e6, -0.0]), ["3", None, None, "1000000", "0"], []),
        (pa.array([3.5, np.inf]), ["3.5", "inf"], [0, 1]),
        (pa.array([2.0**53 - 1, 2.0**53, 2.0**53 + 2]), [str(2**53 - 1), str(2**53), str(2**53 + 2)], [1, 2]),
        (pa.array([16777216.0, 16777220.0], pa.float32()), ["16777216", "16777220"], [0, 1]),
        (pa.array([Decimal(7), None], pa.decimal128(38, 0)), ["7", None], []),
        (pa.array([Decimal("7.00"), Decimal("7.25")]), ["7", "7.25"], [1]),
        (pa.array(["a", "", None, "3.0", "a\0b", " x "]), ["a", "", None, "3.0", "a\0b", " x "], []),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"], []),
        (pa.array([7, 8]).dictionary_encode(), ["7", "8"], []),
        (pa.array(["long" * 9], pa.string_view()), ["long" * 9], []),
        (pa.array(["a"], pa.large_string()), ["a"], []),
        (pa.RunEndEncodedArray.from_arrays([2], pa.array(["a"])), ["a", "a"], []),
        (pa.array([b"a", b"\xff", None]), ["a", "\\xff", None], [1]),
        (pa.array([None, None], pa.null()), [None, None], []),
        (UUID_5, ["00000000-0000-0000-0000-000000000005"], []),
    ],
)
def test_ids_are_text(column: pa.Array, texts: list[Any], wrong: list[int]) -> None:
    ids, bad = as_ids(column)
    assert ids.to_pylist() == texts
    assert np.flatnonzero(bad).tolist() == wrong
    assert is_id_type(column.type)


@pytest.mark.parametrize(
    "kind", [pa.bool_(), pa.timestamp("us"), pa.date32(), pa.list_(pa.string()), pa.struct([("a", pa.int64())])]
)
def test_other_types_are_no_ids(kind: pa.DataType) -> None:
    assert not is_id_type(kind)
