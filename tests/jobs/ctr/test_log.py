"""Interactions as pandas, polars, DuckDB and Spark write them: every row is used or counted, every time is right to the
second, and what cannot be learned from is one sentence."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs.config import TrainConfig
from jobs.ctr.log import Log, conclude
from jobs.ctr.log_columns import plan_reading
from jobs.ctr.log_rows import checked_rows
from jobs.ctr.log_survey import Survey, survey
from jobs.errors import SchemaError
from jobs.files.sources import Source

FIRST = datetime(2026, 1, 31, 12, 0, 5, tzinfo=UTC)
SECONDS = [
    1_769_860_805,
    1_769_947_205,
    1_770_033_605,
    1_770_120_005,
    1_770_206_405,
    1_770_292_805,
]  # six days from FIRST
MICROSECONDS = [second * 1_000_000 for second in SECONDS]
MOMENTS = [FIRST + timedelta(days=n) for n in range(6)]
NAIVE = [moment.replace(tzinfo=None) for moment in MOMENTS]
INDIA = [moment.astimezone(timezone(timedelta(hours=5, minutes=30))) for moment in MOMENTS]
NAN = float("nan")


def log(**columns: Any) -> pa.RecordBatch:
    """Six rows of a good log, with other columns in place of its own; None leaves one out."""
    good: dict[str, Any] = {
        "user_id": ["a", "a", "a", "b", "b", "b"],
        "item_id": ["1", "2", "3", "1", "2", "3"],
        "timestamp": SECONDS,
        "label": [0, 1, 1, 0, 0, 1],
    }
    return pa.RecordBatch.from_pydict(
        {name: values for name, values in {**good, **columns}.items() if values is not None}
    )


def examined(*batches: pa.RecordBatch, **settings: Any) -> tuple[Log, dict[str, list[Any]]]:
    """What `examine` says of a log of these batches, and its usable rows."""
    train = TrainConfig(interactions="clicks.parquet", **settings)
    reading = plan_reading(batches[0].schema, train)
    seen = Survey()
    for batch in batches:
        seen += Survey(**json.loads(json.dumps(asdict(survey(batch, reading)))))  # as tasks hand it over
    result = conclude(seen, reading, Source("clicks.parquet", "parquet", batches[0].schema, "f"), train)
    rows = pa.Table.from_batches([checked_rows(batch, result.reading) for batch in batches])
    used = rows.filter(rows["reason"].is_null())
    assert result.rows_in == result.rows_used + sum(result.dropped.values()) == sum(map(len, batches))
    assert used.num_rows == result.rows_used
    return result, used.to_pydict()


def refusal(*batches: pa.RecordBatch, **settings: Any) -> str:
    with pytest.raises(SchemaError) as caught:
        examined(*batches, **settings)
    return str(caught.value)


# ---- labels and ratings ----


@pytest.mark.parametrize(
    "labels",
    [
        pa.array([False, True, True, False, False, True]),
        pa.array([0, 1, 1, 0, 0, 1], pa.int8()),
        pa.array([0, 1, 1, 0, 0, 1], pa.uint64()),
        pa.array([0, 1, 1, 0, 0, 1], pa.float32()),
        pa.array([Decimal(n) for n in (0, 1, 1, 0, 0, 1)]),
    ],
    ids=lambda labels: str(labels.type),
)
def test_labels_are_zeros_ones_and_booleans(labels: pa.Array) -> None:
    result, rows = examined(log(label=labels))
    assert rows["label"] == [0, 1, 1, 0, 0, 1]
    assert result.dropped == {}


def test_null_and_nan_labels_are_dropped_and_counted() -> None:
    result, rows = examined(log(label=[1.0, NAN, None, 0.0, 1.0, 0.0]))
    assert rows["label"] == [1, 0, 1, 0]
    assert result.dropped == {"null_label": 2}
    assert result.account() == "6 in = 4 used + 2 dropped (null_label 2)"


def test_null_nan_and_infinite_ratings_are_dropped_and_counted() -> None:
    result, rows = examined(log(label=None, rating=[5.0, NAN, None, 3.9, 4.0, float("inf")]))
    assert rows["label"] == [1, 0, 1]
    assert result.dropped == {"null_rating": 3}
    assert "a rating of 4 or more is a click" in result.note


def test_boolean_labels_may_be_null() -> None:
    result, rows = examined(log(label=pa.array([True, None, False, True, None, False])))
    assert rows["label"] == [1, 0, 1, 0]
    assert result.dropped == {"null_label": 2}


@pytest.mark.parametrize("odd", [0.5, -1, 2])
def test_a_label_that_is_neither_0_nor_1_is_refused_with_its_value(odd: float) -> None:
    message = refusal(log(label=[0, 1, 1, odd, 0, 1]))
    assert f"column 'label' holds {odd:g}; expected 0 or 1" in message


@pytest.mark.parametrize(("name", "text"), [("rating", "5,0"), ("rating", "5"), ("label", "1"), ("label", "yes")])
def test_text_labels_and_ratings_are_refused_with_their_value(name: str, text: str) -> None:
    message = refusal(log(**{"label": None, name: [None, text, *[None] * 4]}))
    assert f"column '{name}' holds the text '{text}'; expected" in message


def test_label_wins_over_rating_and_says_so() -> None:
    result, rows = examined(log(rating=["5,0"] * 6))
    assert rows["label"] == [0, 1, 1, 0, 0, 1]
    assert "labels as given, ratings are not used" in result.note


def test_without_label_and_rating_every_row_is_a_click() -> None:
    result, rows = examined(log(label=None))
    assert result.positives_only
    assert rows["label"] == [1] * 6


def test_a_log_of_clicks_alone_is_refused_before_anything_is_built() -> None:
    assert "every one of the 6 rows is a click by column 'label'" in refusal(log(label=[1] * 6))
    message = refusal(log(label=None, rating=[1, 2, 3, 1, 2, 3]))
    assert (
        "every one of the 6 rows is no click by column 'rating' (a rating of 4 or more is a click: train.click_rating)"
        in message
    )


# ---- ids ----


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (pa.array([7, 12, None, 7, 12, 3]), ["7", "12", "7", "12", "3"]),
        (pa.array([7.0, 12.0, NAN, 7.0, 12.0, 3.0]), ["7", "12", "7", "12", "3"]),
        (pa.array([7, 12, None, 7, 12, 3], pa.float32()), ["7", "12", "7", "12", "3"]),
        (pa.array(["007", "a b", None, " x", "12.0", "ü"]), ["007", "a b", " x", "12.0", "ü"]),
        (pa.array(["x", "", None, "y", "x", "y"]), ["x", "y", "x", "y"]),
        (pa.array([Decimal(7), Decimal(12), None, Decimal(7), Decimal(12), Decimal(3)]), ["7", "12", "7", "12", "3"]),
        (pa.array(["x", "y", None, "x", "y", "x"]).dictionary_encode(), ["x", "y", "x", "y", "x"]),
        (pa.array([b"x", b"y", None, b"x", b"y", b"x"]), ["x", "y", "x", "y", "x"]),
    ],
    ids=["int", "float with NaN", "float32", "text", "empty text", "decimal", "category", "bytes"],
)
@pytest.mark.parametrize("name", ["user_id", "item_id"])
def test_ids_become_the_text_of_what_they_were(name: str, ids: pa.Array, expected: list[str]) -> None:
    result, rows = examined(log(**{name: ids}))
    assert rows[name] == expected
    assert result.dropped == {f"null_{name[:4]}": 6 - len(expected)}


@pytest.mark.parametrize("broken", [12.5, 2.0**53 + 2, float("inf")])
def test_ids_that_are_no_exact_whole_numbers_are_refused(broken: float) -> None:
    assert "column 'item_id' holds " in refusal(log(item_id=[1.0, 2.0, broken, 1.0, 2.0, 3.0]))


def test_ids_of_another_type_are_refused_by_name() -> None:
    assert "column 'item_id' of the interactions has type list<" in refusal(log(item_id=[["1"]] * 6))
    assert "column 'user_id' of the interactions has type bool" in refusal(log(user_id=[True] * 6))


# ---- times ----


@pytest.mark.parametrize(
    "times",
    [
        *(pa.array(NAIVE, pa.timestamp(unit)) for unit in ("s", "ms", "us", "ns")),
        pa.array(MOMENTS, pa.timestamp("us", "UTC")),
        pa.array(INDIA, pa.timestamp("ns", "Asia/Kolkata")),
        pa.array([moment.isoformat() for moment in NAIVE]),
        pa.array([moment.isoformat(sep=" ") for moment in NAIVE]),
        pa.array([moment.isoformat() for moment in INDIA]),
        pa.array([moment.isoformat() + "Z" for moment in NAIVE]),
        pa.array([moment.isoformat() + ".000000000" for moment in NAIVE]),
        pa.array([f" {moment.isoformat(sep=' ')} UTC" for moment in NAIVE]),
        pa.array([NAIVE[0].isoformat(), *(moment.isoformat() for moment in INDIA[1:])]),
        *(pa.array([second * factor for second in SECONDS]) for factor in (1, 10**3, 10**6, 10**9)),
        *(pa.array([float(second * factor) for second in SECONDS]) for factor in (1, 10**3, 10**6, 10**9)),
        pa.array([str(second) for second in SECONDS]),
        pa.array([f"{second}.0" for second in SECONDS]),
        pa.array([Decimal(second) for second in SECONDS]),
        pa.array(SECONDS, pa.uint32()),
    ],
    ids=lambda times: f"{times.type} {times[0]}",
)
def test_every_way_to_write_a_time_is_read_right_to_the_second(times: pa.Array) -> None:
    result, rows = examined(log(timestamp=times))
    assert rows["ts"] == MICROSECONDS
    assert "2026-01-31 12:00:05 to 2026-02-05 12:00:05 UTC" in result.note


@pytest.mark.parametrize(
    "days",
    [
        pa.array([date(2026, 1, 31), date(2026, 2, 1), date(2026, 2, 2)] * 2, pa.date32()),
        pa.array([date(2026, 1, 31), date(2026, 2, 1), date(2026, 2, 2)] * 2, pa.date64()),
        pa.array(["2026-01-31", "2026-02-01", "2026-02-02"] * 2),
        pa.array([20260131, 20260201, 20260202] * 2),
        pa.array(["20260131", "20260201", "20260202"] * 2),
    ],
    ids=lambda days: f"{days.type} {days[0]}",
)
def test_days_are_their_midnight(days: pa.Array) -> None:
    _, rows = examined(log(timestamp=days))
    assert rows["ts"] == [1_769_817_600_000_000, 1_769_904_000_000_000, 1_769_990_400_000_000] * 2


@pytest.mark.parametrize(
    ("factor", "unit"), [(1, "seconds"), (10**3, "milliseconds"), (10**6, "microseconds"), (10**9, "nanoseconds")]
)
def test_the_unit_of_numbers_is_said(factor: int, unit: str) -> None:
    result, _ = examined(log(timestamp=[second * factor for second in SECONDS]))
    assert f"timestamp read as {unit}, 2026-01-31 12:00:05 to" in result.note


def test_the_unit_is_one_for_the_whole_log_not_for_each_batch() -> None:
    """A batch of an early hour alone could be taken for another unit."""
    early, late = log(timestamp=[0, 0, 0, 1, 1, 1]), log(timestamp=[second * 1000 for second in SECONDS])
    message = refusal(early, late)
    assert "mixes units: by their size its numbers are 1 (seconds) and 1769860805000 (milliseconds)" in message
    _, rows = examined(log(timestamp=[0] * 6), late)
    assert rows["ts"] == [0] * 6 + MICROSECONDS


def test_numbers_that_only_look_like_days_are_seconds() -> None:
    _, rows = examined(log(timestamp=[20_260_131, 20_260_231, 20_260_301, 20_260_132, 20_260_399, 20_260_200]))
    assert rows["ts"][:2] == [20_260_131_000_000, 20_260_231_000_000]


def test_fractions_of_a_second_keep_the_order() -> None:
    _, rows = examined(log(timestamp=[1_769_860_805 + n / 8 for n in range(6)]))
    assert rows["ts"] == [1_769_860_805_000_000 + n * 125_000 for n in range(6)]
    nanoseconds = pa.array([1_769_860_805_000_000_000 + n * 1000 for n in range(6)], pa.timestamp("ns"))
    _, rows = examined(log(timestamp=nanoseconds))
    assert rows["ts"] == [1_769_860_805_000_000 + n for n in range(6)]


@pytest.mark.parametrize(
    "times",
    [
        pa.array([float(SECONDS[0]), NAN, *map(float, SECONDS[2:])]),
        pa.array([SECONDS[0], None, *SECONDS[2:]]),
        pa.array([NAIVE[0], None, *NAIVE[2:]], pa.timestamp("ns")),
        pa.array([NAIVE[0].isoformat(), "NaT", *(moment.isoformat() for moment in NAIVE[2:])]),
        pa.array([NAIVE[0].isoformat(), "", *(moment.isoformat() for moment in NAIVE[2:])]),
    ],
    ids=lambda times: f"{times.type} {times[1]}",
)
def test_a_row_without_a_time_is_dropped_and_counted(times: pa.Array) -> None:
    result, rows = examined(log(timestamp=times))
    assert rows["ts"] == [MICROSECONDS[0], *MICROSECONDS[2:]]
    assert result.dropped == {"null_time": 1}


@pytest.mark.parametrize(
    "times", [pa.nulls(6), pa.array([NAN] * 6), pa.nulls(6, pa.timestamp("us")), pa.array(["NaT"] * 6)]
)
def test_a_log_without_any_time_is_one_sentence(times: pa.Array) -> None:
    message = refusal(log(timestamp=times))
    assert "no row can be used: 6 in = 0 used + 6 dropped (null_time 6)" in message


@pytest.mark.parametrize(
    ("times", "shown"),
    [
        (pa.array([SECONDS[0]] * 6), "one value in all 6 rows (2026-01-31 12:00:05)"),
        (pa.array([date(2026, 1, 31)] * 6), "one value in all 6 rows (2026-01-31 00:00:00)"),
        (pa.array(MOMENTS[:2] * 3), "two values in all 6 rows (2026-01-31 12:00:05 and 2026-02-01 12:00:05)"),
    ],
    ids=["number", "date", "two"],
)
def test_one_moment_is_refused_with_it(times: pa.Array, shown: str) -> None:
    message = refusal(log(timestamp=times))
    assert f"column 'timestamp' has {shown}; expected at least three" in message


@pytest.mark.parametrize("text", ["31/01/2026", "2026-13-01", "yesterday", "12:30"])
def test_text_that_is_no_time_is_refused_with_its_value(text: str) -> None:
    message = refusal(log(timestamp=[*(moment.isoformat() for moment in NAIVE[:5]), text]))
    assert f"column 'timestamp' holds the text {text!r}; expected ISO 8601" in message


def test_times_of_32_bit_floats_are_refused_as_they_are_rounded_to_minutes() -> None:
    message = refusal(log(timestamp=pa.array(np.array(SECONDS, np.float32))))
    assert "as float, which rounds whole numbers beyond 16777216" in message


@pytest.mark.parametrize("kind", [pa.duration("s"), pa.time32("s"), pa.bool_()])
def test_columns_that_are_no_times_are_refused_by_type(kind: pa.DataType) -> None:
    assert f"column 'timestamp' of the interactions has type {kind}; expected" in refusal(
        log(timestamp=pa.nulls(6, kind))
    )


def test_order_is_a_position_and_drops_what_has_none() -> None:
    result, rows = examined(log(timestamp=None, order=[1.0, 2.0, NAN, 1.0, 2.0, 3.0]))
    assert rows["ts"] == [1, 2, 1, 2, 3]
    assert result.dropped == {"null_order": 1}
    assert not result.has_clock
    assert "order is a position per user" in result.note


def test_fractions_of_an_order_are_refused() -> None:
    assert "column 'order' holds 1.5; expected whole numbers" in refusal(
        log(timestamp=None, order=[1, 1.5, 2, 1, 2, 3])
    )


# ---- the whole ----


def test_missing_columns_are_named() -> None:
    message = refusal(log(item_id=None))
    assert "interactions have columns ['user_id', 'timestamp', 'label']; expected user_id, item_id, one of" in message
    assert "one of timestamp or order" in refusal(log(timestamp=None))


def test_each_row_has_its_first_reason_and_no_row_is_lost() -> None:
    result, rows = examined(
        log(
            user_id=["a", None, "a", "b", "b", "b"],
            item_id=["1", None, None, "1", "2", "3"],
            label=[1.0, None, NAN, NAN, 0.0, 1.0],
        )
    )
    assert result.dropped == {"null_user": 1, "null_item": 1, "null_label": 1}
    assert rows["item_id"] == ["1", "2", "3"]


def test_no_rows_is_said_and_not_refused() -> None:
    empty = log().slice(0, 0)
    result, _ = examined(empty)
    assert (result.rows_in, result.rows_used) == (0, 0)
    assert "the log has no rows" in result.note
    objects = pa.RecordBatch.from_pydict({name: pa.nulls(0) for name in empty.schema.names})  # an empty frame of pandas
    assert examined(objects)[0].rows_in == 0


def test_what_is_known_of_a_log_is_read_back() -> None:
    result, _ = examined(log(label=[1.0, NAN, None, 0.0, 1.0, 0.0]))
    again = Log.from_json(result.to_json(), result.source)
    assert again.seen_before
    assert (again.reading, again.rows_in, again.rows_used, again.dropped, again.note) == (
        result.reading,
        result.rows_in,
        result.rows_used,
        result.dropped,
        result.note,
    )
