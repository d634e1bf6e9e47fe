"""The times of a log: dates, timestamps of any unit and zone, ISO text, or numbers in a unit that their size tells."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from jobs.ctr.log_columns import CLOCK, ORDER, Reading, is_temporal, is_text
from jobs.errors import SchemaError

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECONDS = {"seconds": 1_000_000, "milliseconds": 1_000, "microseconds": 1}  # nanoseconds are divided
# Times since 1970 by size: seconds reach 1e11 in the year 5138, and milliseconds below it are of before 1973.
UNITS = (("seconds", 1e11), ("milliseconds", 1e14), ("microseconds", 1e17), ("nanoseconds", np.inf))
DAY_NUMBERS = (19_000_101, 21_001_231)  # 20260131; as seconds all of them are one week of August 1970
MISSING = {"", "nat", "nan", "null", "none", "n/a", "<na>"}  # what tools write for a missing time
NUMBER = r"^\s*[+-]?\d+(\.\d*)?\s*$"


def times(column: pa.Array, name: str) -> tuple[pa.Array, str]:
    """The times of a batch of column `name`, null where there is none, and their kind. Times without a zone are UTC.

    The kind is "moment" for microseconds since 1970 (int64), "number" for numbers as they stand (int64 or float64),
    whose unit the whole column decides.

    Raises:
        SchemaError: a value is no time, or the type rounds it.
    """
    kind = column.type
    if is_temporal(kind):
        return _moments(column, name), "moment"
    if is_text(kind):
        text = pc.utf8_trim_whitespace(column)
        missing = pc.is_in(pc.utf8_lower(text), pa.array(sorted(MISSING)))
        text = pc.if_else(missing, None, text)
        if not pc.all(pc.match_substring_regex(text, NUMBER), min_count=0).as_py():
            return _moments_of_text(text, name), "moment"
        whole = not pc.any(pc.match_substring(text, ".")).as_py()
        column = text.cast(pa.int64() if whole else pa.float64())
    try:
        if pa.types.is_decimal(kind):
            column = column.cast(pa.int64() if kind.scale <= 0 else pa.float64())
        numbers = finite(column) if pa.types.is_floating(column.type) else column.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise SchemaError(
            f"column {name!r} holds a number beyond 64 bits ({error}); expected times or positions"
        ) from error
    if pa.types.is_floating(kind) and kind.bit_width < 64:
        exact = {16: 2**11, 32: 2**24}[kind.bit_width]
        largest = pc.max(pc.abs(numbers)).as_py()
        if largest is not None and largest > exact:
            raise SchemaError(
                f"column {name!r} holds {largest:.0f} as {kind}, which rounds whole numbers beyond {exact}; expected "
                "times to the second. Export it as integers or 64-bit floating point"
            )
        numbers = numbers.cast(pa.float64())
    if name == ORDER and pa.types.is_floating(numbers.type):
        if len(broken := numbers.filter(pc.not_equal(numbers, pc.floor(numbers))).drop_null()):
            raise SchemaError(
                f"column 'order' holds {broken[0].as_py()!r}; expected whole numbers, the position in a user's row of "
                "events"
            )
        numbers = numbers.cast(pa.int64())
    return numbers, "number"


# ---- units of numbers ----


def units_by_size(numbers: npt.NDArray[Any]) -> dict[str, float]:
    """The units that numbers other than 0 have by their size, each with an example."""
    size = np.abs(numbers.astype(np.float64))
    units: dict[str, float] = {}
    lower = 0.0
    for unit, upper in UNITS:
        of_unit = numbers[(size >= lower) & (size < upper) & (size > 0)]
        if len(of_unit):
            units[unit] = of_unit[0].item()
        lower = upper
    return units


def are_days(numbers: npt.NDArray[Any]) -> bool:
    """Whether all numbers are days such as 20260131."""
    if numbers.min() < DAY_NUMBERS[0] or numbers.max() > DAY_NUMBERS[1]:
        return False
    try:
        scale(pa.array(numbers), "days")
    except SchemaError:
        return False
    return True


def unit_of(units: Mapping[str, float], days: bool) -> str:
    """The unit of a column of numbers, by `units_by_size` and `are_days` of all of them.

    Raises:
        SchemaError: they are of several units.
    """
    if days:
        return "days"
    if len(units) > 1:
        several = " and ".join(f"{units[unit]:.0f} ({unit})" for unit, _ in UNITS if unit in units)
        raise SchemaError(
            f"column {CLOCK!r} mixes units: by their size its numbers are {several} since 1970; expected one unit "
            "in all rows"
        )
    return next(iter(units), "seconds")


def scale(numbers: pa.Array, unit: str) -> pa.Array:
    """Times in a unit since 1970 as microseconds since 1970, int64."""
    if unit == "days":
        text = numbers.cast(pa.int64()).cast(pa.string())
        parts = pc.replace_substring_regex(text, r"^(\d{4})(\d{2})(\d{2})$", r"\1-\2-\3")
        return _moments_of_text(parts, CLOCK)
    if unit == "nanoseconds":
        return (
            pc.floor(pc.divide(numbers.cast(pa.float64()), 1000.0)).cast(pa.int64())
            if pa.types.is_floating(numbers.type)
            else _floor_divide(numbers, 1000)
        )
    factor = MICROSECONDS[unit]
    if pa.types.is_floating(numbers.type):
        return pc.round(pc.multiply(numbers, float(factor))).cast(pa.int64())
    return pc.multiply(numbers, pa.scalar(factor, pa.int64()))


def _floor_divide(numbers: pa.Array, by: int) -> pa.Array:
    quotient = pc.divide(numbers, pa.scalar(by, pa.int64()))  # towards zero
    below = pc.less(numbers, pc.multiply(quotient, pa.scalar(by, pa.int64())))
    return pc.subtract(quotient, below.cast(pa.int64()))


def _moments(column: pa.Array, name: str) -> pa.Array:
    kind = column.type
    if pa.types.is_date64(kind):
        column = column.cast(pa.timestamp("ms"))
    elif pa.types.is_timestamp(kind) and kind.unit == "ns":
        return _floor_divide(column.cast(pa.int64()), 1000)
    zone = getattr(kind, "tz", None)
    try:
        return column.cast(pa.timestamp("us", zone)).cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise SchemaError(
            f"column {name!r} holds a time beyond the year 290000 ({error}); expected the time of an interaction"
        ) from error


def _moments_of_text(text: pa.Array, name: str) -> pa.Array:
    try:
        return text.cast(pa.timestamp("us")).cast(pa.int64())
    except pa.ArrowInvalid:  # with a zone, with nanoseconds, or no time at all
        return pa.array([None if value is None else _moment(value, name) for value in text.to_pylist()], pa.int64())


def _moment(text: str, name: str) -> int:
    try:
        moment = datetime.fromisoformat(re.sub(r"\s*UTC$", "Z", text))
    except ValueError as error:
        raise SchemaError(
            f"column {name!r} holds the text {text!r}; expected ISO 8601 such as 2026-01-31 or 2026-01-31T10:00:00Z, "
            "or a number since 1970"
        ) from error
    return ((moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - EPOCH) // timedelta(microseconds=1)


def finite(numbers: pa.Array) -> pa.Array:
    """The numbers, null where they are NaN or infinite."""
    return pc.if_else(pc.is_finite(numbers), numbers, None)


def shown_time(value: float, reading: Reading) -> str:
    """A time as a person reads it."""
    if reading.time == ORDER:
        return f"{value:.0f}"
    scaled = int(scale(pa.array([value]), reading.unit)[0].as_py()) if reading.unit else int(value)
    try:
        return (EPOCH + timedelta(microseconds=scaled)).strftime("%Y-%m-%d %H:%M:%S")
    except OverflowError:
        return f"{value:.0f}"
