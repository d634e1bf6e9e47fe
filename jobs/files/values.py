"""Values of columns that others wrote: plain Arrow types, casts between them, and ids as text."""

from __future__ import annotations

from uuid import UUID

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from jobs.errors import SchemaError, first_line


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type of the values themselves: no dictionaries, views, run lengths, extensions, large or fixed sizes."""
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType) and not _is_uuid(kind):
        return plain_type(kind.storage_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if is_bytes(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    if is_list(kind) or pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        return pa.list_(plain_type(kind.value_type))
    return kind


def is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def cast(array: pa.Array, kind: pa.DataType, what: str) -> pa.Array:
    """`array` as `kind`; numbers become text as ids do. `what` names the column in an error.

    Raises:
        SchemaError: a value has no such form.
    """
    if array.type == kind:
        return array
    if array.null_count == len(array):
        return pa.nulls(len(array), kind)
    if isinstance(array, pa.ExtensionArray):
        return cast(array.storage, kind, what) if not _is_uuid(array.type) else as_ids(array)[0].cast(kind)
    if pa.types.is_string(kind) and is_number(array.type):
        return as_ids(array)[0]
    if pa.types.is_run_end_encoded(array.type):
        return cast(pc.run_end_decode(array), kind, what)
    try:
        return array.cast(kind, safe=False)
    except pa.ArrowException as error:
        raise SchemaError(
            f"{what} cannot be read as {kind} ({first_line(error)}); expected values of one type"
        ) from error


def is_id_type(kind: pa.DataType) -> bool:
    """Can a column of this type hold ids: text, whole numbers, or floats, as pandas makes them where one is null."""
    kind = plain_type(kind)
    return (
        bool(pa.types.is_string(kind) or pa.types.is_binary(kind) or pa.types.is_null(kind))
        or is_number(kind)
        or _is_uuid(kind)
    )


def as_ids(column: pa.Array) -> tuple[pa.StringArray, npt.NDArray[np.bool_]]:
    """Ids as text (3, 3.0 and "3" are one id), and which rows hold a value that is no id; null and NaN are null.

    No ids are 3.5, infinities, floats too large to be counted one by one (2^53 and more in float64), and bytes that are
    not UTF-8.
    """
    column = cast(column, plain_type(column.type), "ids")
    kind, n = column.type, len(column)
    if pa.types.is_null(kind):
        return pa.nulls(n, pa.string()), np.zeros(n, bool)
    if pa.types.is_integer(kind):
        return column.cast(pa.string()), np.zeros(n, bool)
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        return _text_ids(column.cast(pa.binary()))
    if _is_uuid(kind):
        values = column.storage.to_pylist()
        return pa.array([None if v is None else str(UUID(bytes=v)) for v in values], pa.string()), np.zeros(n, bool)
    if not is_number(kind):
        raise SchemaError(f"ids have type {kind}; expected text or whole numbers")
    limit = {16: 2**11, 32: 2**24, 64: 2**53}[kind.bit_width] if pa.types.is_floating(kind) else None
    texts: list[str | None] = []
    wrong = np.zeros(n, bool)
    for row, value in enumerate(column.to_pylist()):
        if value is None or value != value:
            texts.append(None)
            continue
        whole = value not in (float("inf"), -float("inf")) and value == int(value)
        wrong[row] = not whole or (limit is not None and abs(value) >= limit)  # the limit itself may be rounded
        texts.append(str(int(value)) if whole else str(value))
    return pa.array(texts, pa.string()), wrong


def _text_ids(column: pa.BinaryArray) -> tuple[pa.StringArray, npt.NDArray[np.bool_]]:
    try:
        return column.cast(pa.string()), np.zeros(len(column), bool)  # checks that it is UTF-8
    except pa.ArrowInvalid:
        values = column.to_pylist()
        texts = [None if v is None else v.decode(errors="backslashreplace") for v in values]
        return pa.array(texts, pa.string()), np.array([v is not None and not _is_utf8(v) for v in values], bool)


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_uuid(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.UuidType)
