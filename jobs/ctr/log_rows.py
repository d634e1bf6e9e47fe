"""The rows of a log in one form: each is used, or has the reason for which it is dropped."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from jobs.ctr.log_columns import CLOCK, ITEM, LABEL, RATING, USER, Reading, is_text
from jobs.ctr.log_times import finite, scale, times
from jobs.errors import SchemaError
from jobs.files.values import as_ids

# ts: microseconds since 1970, or the position of a log with `order`
ROWS = pa.schema([("user_id", pa.string()), ("item_id", pa.string()), ("label", pa.int32()), ("ts", pa.int64())])


def checked_rows(batch: pa.RecordBatch, reading: Reading, time: tuple[pa.Array, str] | None = None) -> pa.RecordBatch:
    """The rows of a batch with the columns of ROWS and the `reason` for which a row is dropped, or null.

    `time` is what `times` says of the batch, where that is known already.

    Raises:
        SchemaError: a value that nothing can be made of; the message names it.
    """
    users, items = (ids(batch.column(name), name) for name in (USER, ITEM))
    moments, kind = time or times(batch.column(reading.time), reading.time)
    if kind == "number" and reading.unit:
        moments = scale(moments, reading.unit)
    if reading.outcome == LABEL:
        labels = clicks_of_labels(batch.column(LABEL))
    elif reading.outcome == RATING:
        labels = clicks_of_ratings(batch.column(RATING), reading.click_rating)
    else:
        labels = pa.repeat(pa.scalar(1, pa.int32()), len(batch))
    reason = pa.nulls(len(batch), pa.string())
    missing = {
        "null_user": users,
        "null_item": items,
        "null_time" if reading.time == CLOCK else "null_order": moments,
        f"null_{reading.outcome}": labels,
    }
    for why, column in missing.items():
        reason = pc.coalesce(reason, pc.if_else(column.is_null(), why, None))
    return pa.RecordBatch.from_pydict(
        {"user_id": users, "item_id": items, "label": labels, "ts": moments, "reason": reason}
    )


def ids(column: pa.Array, name: str) -> pa.StringArray:
    """Ids as text; null where there is none. Whole floats are integers: pandas writes them so where one is missing.

    Raises:
        SchemaError: a value that is no id.
    """
    text, wrong = as_ids(column)
    if wrong.any():
        raise SchemaError(
            f"column {name!r} holds {text[int(wrong.argmax())].as_py()!r} as {column.type}; expected ids that are text "
            "or exact whole numbers. Export them as integers or text"
        )
    return pc.if_else(pc.equal(text, ""), None, text)


def clicks_of_labels(column: pa.Array) -> pa.Array:
    """0 and 1 as int32; null where there is no label."""
    kind = column.type
    if pa.types.is_boolean(kind) or pa.types.is_null(kind):
        return column.cast(pa.int32())
    _no_text(column, LABEL, "numbers 0 and 1, or booleans")
    labels = _nan_to_null(column if pa.types.is_integer(kind) else column.cast(pa.float64()))
    other = labels.filter(pc.invert(pc.or_(pc.equal(labels, 0), pc.equal(labels, 1))))
    if other := other.drop_null():
        raise SchemaError(
            f"column 'label' holds {other[0].as_py():g}; expected 0 or 1. Write labels as 0 "
            "and 1, or, if the values are degrees, name the column `rating` and set train.click_rating"
        )
    return labels.cast(pa.int32())


def clicks_of_ratings(column: pa.Array, click: float) -> pa.Array:
    """1 where the rating is `click` or more, else 0, as int32; null where there is no finite rating."""
    _no_text(column, RATING, "numbers")
    ratings = finite(column.cast(pa.float64()))
    return pc.greater_equal(ratings, click).cast(pa.int32())


def _nan_to_null(numbers: pa.Array) -> pa.Array:
    return pc.if_else(pc.is_nan(numbers), None, numbers) if pa.types.is_floating(numbers.type) else numbers


def _no_text(column: pa.Array, name: str, expected: str) -> None:
    if is_text(column.type) and len(values := column.drop_null()):
        raise SchemaError(
            f"column {name!r} holds the text {values[0].as_py()!r}; expected {expected}. Convert it when you export it"
        )
