"""The interactions: what their columns mean, how many of their rows are usable, and those rows in one form.

A log is examined once, before anything else runs: `examine` reads all of it and says what is wrong with it, or how it
is read. `read_rows` then gives its usable rows. Both go through `checked_rows`, so that what is counted is what is read.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema
from pyspark.sql.types import StringType, StructType

from jobs.config import TrainConfig
from jobs.errors import SchemaError
from jobs.files.sources import Source, map_rows
from jobs.files.values import as_ids, is_id_type, plain_type

USER, ITEM = "user_id", "item_id"
CLOCK, ORDER = "timestamp", "order"
LABEL, RATING = "label", "rating"
ROWS_PER_BATCH = 65_536
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECONDS = {"seconds": 1_000_000, "milliseconds": 1_000, "microseconds": 1}  # nanoseconds are divided
# Times since 1970 by size: seconds reach 1e11 in the year 5138, and milliseconds below it are of before 1973.
UNITS = (("seconds", 1e11), ("milliseconds", 1e14), ("microseconds", 1e17), ("nanoseconds", np.inf))
DAY_NUMBERS = (19_000_101, 21_001_231)  # 20260131; as seconds all of them are one week of August 1970
NO_TEXT = {"", "nat", "nan", "null", "none", "n/a", "<na>"}  # what tools write for a missing time
NUMBER = r"^\s*[+-]?\d+(\.\d*)?\s*$"
SMALLEST_SPLITS = 3  # distinct moments, for training, validation and test
SHOWN = 3  # ids in a message
LOOKALIKES_FROM = 0.01  # share of interactions without an ID from which the ids are compared for how they are written
ROWS = pa.schema(
    [("user_id", pa.string()), ("item_id", pa.string()), ("label", pa.int32()), ("ts", pa.int64())]
)  # ts: microseconds since 1970, or the position of a log with `order`


@dataclass(frozen=True)
class Reading:
    """What the columns of a log mean."""

    time: str  # column: CLOCK or ORDER
    outcome: str  # column: LABEL or RATING; empty where every row is a click
    click_rating: float
    unit: str = ""  # of a timestamp of numbers: one of UNITS, or "days" for 20260131


@dataclass(frozen=True)
class Log:
    """Interactions that can be learned from, and the account of their rows: rows_in = rows_used + what was dropped."""

    source: Source = field(repr=False)
    reading: Reading
    rows_in: int
    rows_used: int
    dropped: Mapping[str, int]  # by reason
    note: str  # how labels and time were come by
    seen_before: bool = False  # the examples of this warehouse are made of this very log

    @property
    def has_clock(self) -> bool:
        """Time is one clock for all users, not a position per user."""
        return self.reading.time == CLOCK

    @property
    def positives_only(self) -> bool:
        return not self.reading.outcome

    def to_json(self) -> str:
        facts = {name: value for name, value in asdict(replace(self, source=None)).items() if name != "source"}  # type: ignore[arg-type]
        return json.dumps(facts, sort_keys=True)

    @staticmethod
    def from_json(text: str, source: Source) -> Log:
        """What `to_json` wrote of a log that was examined before."""
        facts = json.loads(text)
        return Log(**{**facts, "source": source, "reading": Reading(**facts["reading"]), "seen_before": True})

    def account(self) -> str:
        """For the reader: 1,800 in = 1,334 used + 466 dropped (null_label 466)."""
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(self.dropped.items()))
        total = sum(self.dropped.values())
        return f"{self.rows_in:,} in = {self.rows_used:,} used + {total:,} dropped" + (
            f" ({reasons})" if reasons else ""
        )


# ---- examine ----


@dataclass
class Survey:
    """What was seen in some rows of a log; surveys of its parts add."""

    rows: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    clicks: int = 0
    times: list[float] = field(default_factory=list)  # up to SMALLEST_SPLITS of the distinct ones, of used rows
    low: float = np.inf
    high: float = -np.inf
    kinds: list[str] = field(default_factory=list)  # of times: "moment" is microseconds, "number" is as it stands
    units: dict[str, float] = field(default_factory=dict)  # of numbers other than 0: unit by size -> an example
    days: bool = True  # are all numbers days such as 20260131
    problem: str = ""

    @property
    def used(self) -> int:
        return self.rows - sum(self.dropped.values())

    def __add__(self, other: Survey) -> Survey:
        return Survey(
            self.rows + other.rows,
            dict(Counter(self.dropped) + Counter(other.dropped)),
            self.clicks + other.clicks,
            sorted({*self.times, *other.times})[:SMALLEST_SPLITS],
            min(self.low, other.low),
            max(self.high, other.high),
            sorted({*self.kinds, *other.kinds}),
            {**other.units, **self.units},
            self.days and other.days,
            self.problem or other.problem,
        )


def examine(source: Source, train: TrainConfig, spark: SparkSession) -> Log:
    """Read all of a log once and decide how it is read.

    Raises:
        SchemaError: columns, types or values from which nothing could be learned; the message names the column and a value.
    """
    reading = plan_reading(source.schema, train)

    def surveyed(batch: pa.RecordBatch) -> pa.RecordBatch:
        return pa.RecordBatch.from_pydict({"survey": [json.dumps(asdict(survey(batch, reading)))]})

    seen = Survey()
    for row in _mapped(source, reading, spark, surveyed, StructType().add("survey", StringType())).collect():
        seen += Survey(**json.loads(row["survey"]))
    return conclude(seen, reading, source, train)


def plan_reading(schema: pa.Schema, train: TrainConfig) -> Reading:
    """The columns of a log by name and type.

    Raises:
        SchemaError: one is missing, or of a type that it cannot have.
    """
    names = schema.names
    time = next((name for name in (CLOCK, ORDER) if name in names), None)
    if not {USER, ITEM} <= set(names) or time is None:
        raise SchemaError(
            f"interactions have columns {names}; expected user_id, item_id, one of timestamp or order, and perhaps label or rating"
        )
    outcome = next((name for name in (LABEL, RATING) if name in names), "")
    for name in (USER, ITEM, time, outcome):
        if name and names.count(name) > 1:
            raise SchemaError(f"interactions have {names.count(name)} columns named {name}; expected one")
        if name:
            kind = plain_type(schema.field(name).type)
            expected, fits = EXPECTED[name]
            if not (pa.types.is_null(kind) or fits(kind)):
                raise SchemaError(f"column {name!r} of the interactions has type {kind}; expected {expected}")
    return Reading(time, outcome, train.click_rating)


def conclude(seen: Survey, reading: Reading, source: Source, train: TrainConfig) -> Log:
    """The log that a survey of all of its rows describes.

    Raises:
        SchemaError: nothing can be learned from it.
    """
    if seen.problem:
        raise SchemaError(seen.problem)
    log = Log(source, reading, seen.rows, seen.used, seen.dropped, "")
    if not seen.rows:
        return replace(log, note="the log has no rows; there is nothing to train on")
    if not seen.used:
        raise SchemaError(
            f"no row can be used: {log.account()}; expected user, item, {reading.time} and "
            f"{reading.outcome or 'nothing else'} in every row. Look at those columns"
        )
    if len(seen.kinds) > 1:
        raise SchemaError(
            f"column {reading.time!r} mixes numbers and dates as text; expected one of them. Write them all as ISO 8601"
        )
    if reading.time == CLOCK and seen.kinds == ["number"]:
        reading = replace(reading, unit=unit_of(seen))
    if len(seen.times) < SMALLEST_SPLITS:
        shown = " and ".join(_shown_time(value, reading) for value in seen.times)
        raise SchemaError(
            f"column {reading.time!r} has {'one value' if len(seen.times) == 1 else 'two values'} in all {seen.used:,} rows ({shown}); "
            f"expected at least three, as training, validation and test follow each other in time. Give the time of each interaction"
            + (", or a column `order` (position per user) instead of it" if reading.time == CLOCK else "")
        )
    if reading.outcome and seen.clicks in (0, seen.used):
        which = "a click" if seen.clicks else "no click"
        how = f" (a rating of {reading.click_rating:g} or more is a click: train.click_rating)" * (
            reading.outcome == RATING
        )
        raise SchemaError(
            f"every one of the {seen.used:,} rows is {which} by column {reading.outcome!r}{how}; expected clicks and non-clicks. "
            + ("Leave the column out to have negatives sampled" if seen.clicks else "Is it the right column?")
        )
    note = _note(seen, reading, source.schema.names, train) + (f"; {source.note}" if source.note else "")
    return replace(log, reading=reading, note=note)


def unit_of(seen: Survey) -> str:
    """The unit of a column of numbers, by their size.

    Raises:
        SchemaError: they are of several.
    """
    if seen.days:
        return "days"
    if len(seen.units) > 1:
        several = " and ".join(f"{seen.units[unit]:.0f} ({unit})" for unit, _ in UNITS if unit in seen.units)
        raise SchemaError(
            f"column {CLOCK!r} mixes units: by their size its numbers are {several} since 1970; expected one unit in all rows"
        )
    return next(iter(seen.units), "seconds")


def _note(seen: Survey, reading: Reading, names: list[str], train: TrainConfig) -> str:
    parts = []
    if reading.outcome == LABEL:
        parts.append("labels as given" + (", ratings are not used" if RATING in names else ""))
    elif reading.outcome == RATING:
        parts.append(f"a rating of {train.click_rating:g} or more is a click")
    else:
        parts.append(
            f"positives only: {train.negatives} sampled negatives per positive, uniform over the items that are as new to the user "
            "and to the log as the positive"
        )
    if reading.time == ORDER:
        parts.append("order is a position per user")
    else:
        how = (
            f"timestamp read as {reading.unit}{' written as YYYYMMDD' if reading.unit == 'days' else ''}, "
            if reading.unit
            else ""
        )
        parts.append(f"{how}{_shown_time(seen.low, reading)} to {_shown_time(seen.high, reading)} UTC")
    return "; ".join(parts)


def _shown_time(value: float, reading: Reading) -> str:
    if reading.time == ORDER:
        return f"{value:.0f}"
    scaled = int(scale(pa.array([value]), reading.unit)[0].as_py()) if reading.unit else int(value)
    try:
        return (EPOCH + timedelta(microseconds=scaled)).strftime("%Y-%m-%d %H:%M:%S")
    except OverflowError:
        return f"{value:.0f}"


# ---- tasks ----


def read_rows(log: Log, spark: SparkSession) -> DataFrame:
    """The usable rows of a log as user_id, item_id, label, ts."""
    reading = log.reading

    def usable(batch: pa.RecordBatch) -> pa.RecordBatch:
        rows = checked_rows(batch, reading)
        return rows.filter(rows.column("reason").is_null()).select(ROWS.names).cast(ROWS)

    return _mapped(log.source, reading, spark, usable, from_arrow_schema(ROWS))


def _mapped(
    source: Source,
    reading: Reading,
    spark: SparkSession,
    convert: Callable[[pa.RecordBatch], pa.RecordBatch],
    schema: StructType,
) -> DataFrame:
    columns = [USER, ITEM, reading.time, *([reading.outcome] if reading.outcome else [])]
    # Ids and times as each file has them: a type common to all could round those of one.
    exact = (USER, ITEM, reading.time)
    return map_rows(spark, source, columns, convert, schema, rows=ROWS_PER_BATCH, as_written=exact)


def survey(batch: pa.RecordBatch, reading: Reading) -> Survey:
    """What the rows of a batch show; a value that nothing can be made of is the `problem`."""
    try:
        time, kind = times(batch.column(reading.time), reading)
        rows = checked_rows(batch, reading, (time, kind))
    except SchemaError as error:
        return Survey(rows=len(batch), problem=str(error))
    used = rows.column("reason").is_null()
    seen = Survey(rows=len(batch), dropped=dict(Counter(rows.column("reason").drop_null().to_pylist())))
    values = time.filter(used).to_numpy(zero_copy_only=False)
    if not len(values):
        return seen
    seen.clicks = int(pc.sum(rows.column("label").filter(used)).as_py())
    seen.times = [number.item() for number in np.unique(values)[:SMALLEST_SPLITS]]
    seen.low, seen.high = values.min().item(), values.max().item()
    seen.kinds = [kind]
    if kind == "number":
        size = np.abs(values.astype(np.float64))
        lower = 0.0
        for unit, upper in UNITS:
            of_unit = values[(size >= lower) & (size < upper) & (size > 0)]
            if len(of_unit):
                seen.units[unit] = of_unit[0].item()
            lower = upper
        seen.days = _are_days(values)
    return seen


def _are_days(values: npt.NDArray[Any]) -> bool:
    if values.min() < DAY_NUMBERS[0] or values.max() > DAY_NUMBERS[1]:
        return False
    try:
        scale(pa.array(values), "days")
    except SchemaError:
        return False
    return True


# ---- rows: every one is used or has a reason ----


def checked_rows(batch: pa.RecordBatch, reading: Reading, time: tuple[pa.Array, str] | None = None) -> pa.RecordBatch:
    """The rows of a batch in one form, each with the `reason` for which it is dropped, or null.

    Raises:
        SchemaError: a value that nothing can be made of; the message names it.
    """
    users, items = (ids(batch.column(name), name) for name in (USER, ITEM))
    moments, kind = time or times(batch.column(reading.time), reading)
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
    """Ids as text; null where there is none. Whole numbers stored as floating point (pandas writes them so where one is
    missing) become what they were."""
    text, wrong = as_ids(column)
    if wrong.any():
        raise SchemaError(
            f"column {name!r} holds {text[int(wrong.argmax())].as_py()!r} as {column.type}; expected ids that are text or exact whole "
            "numbers. Export them as integers or text"
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
            f"column 'label' holds {other[0].as_py():g}; expected 0 or 1. What 1 means is not ours to guess: write labels as "
            "0 and 1, or name a column of degrees `rating` and set train.click_rating"
        )
    return labels.cast(pa.int32())


def clicks_of_ratings(column: pa.Array, click: float) -> pa.Array:
    """1 where the rating is `click` or more, else 0, as int32; null where there is no finite rating."""
    _no_text(column, RATING, "numbers")
    ratings = _finite(column.cast(pa.float64()))
    return pc.greater_equal(ratings, click).cast(pa.int32())


def times(column: pa.Array, reading: Reading) -> tuple[pa.Array, str]:
    """Times of a batch and their kind: `moment`, microseconds since 1970 (int64), or `number`, as they stand (int64 or
    float64), whose unit the whole column decides. Null where there is none. Times without a zone are UTC."""
    name, kind = reading.time, column.type
    if _is_temporal(kind):
        return _moments(column, name), "moment"
    if _is_text(kind):
        text = pc.utf8_trim_whitespace(column)
        missing = pc.is_in(pc.utf8_lower(text), pa.array(sorted(NO_TEXT)))
        text = pc.if_else(missing, None, text)
        if not pc.all(pc.match_substring_regex(text, NUMBER), min_count=0).as_py():
            return _moments_of_text(text, name), "moment"
        whole = not pc.any(pc.match_substring(text, ".")).as_py()
        column = text.cast(pa.int64() if whole else pa.float64())
    try:
        if pa.types.is_decimal(kind):
            column = column.cast(pa.int64() if kind.scale <= 0 else pa.float64())
        numbers = _finite(column) if pa.types.is_floating(column.type) else column.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise SchemaError(
            f"column {name!r} holds a number beyond 64 bits ({error}); expected times or positions"
        ) from error
    if pa.types.is_floating(kind) and kind.bit_width < 64:
        exact = {16: 2**11, 32: 2**24}[kind.bit_width]
        largest = pc.max(pc.abs(numbers)).as_py()
        if largest is not None and largest > exact:
            raise SchemaError(
                f"column {name!r} holds {largest:.0f} as {kind}, which rounds whole numbers beyond {exact}; expected times to the "
                "second. Export it as integers or 64-bit floating point"
            )
        numbers = numbers.cast(pa.float64())
    if name == ORDER and pa.types.is_floating(numbers.type):
        if len(broken := numbers.filter(pc.not_equal(numbers, pc.floor(numbers))).drop_null()):
            raise SchemaError(
                f"column 'order' holds {broken[0].as_py()!r}; expected whole numbers, the position in a user's row of events"
            )
        numbers = numbers.cast(pa.int64())
    return numbers, "number"


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
            f"column {name!r} holds the text {text!r}; expected ISO 8601 such as 2026-01-31 or 2026-01-31T10:00:00Z, or a number "
            "since 1970"
        ) from error
    return ((moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - EPOCH) // timedelta(microseconds=1)


def _nan_to_null(numbers: pa.Array) -> pa.Array:
    return pc.if_else(pc.is_nan(numbers), None, numbers) if pa.types.is_floating(numbers.type) else numbers


def _finite(numbers: pa.Array) -> pa.Array:
    return pc.if_else(pc.is_finite(numbers), numbers, None)


def _no_text(column: pa.Array, name: str, expected: str) -> None:
    if _is_text(column.type) and len(values := column.drop_null()):
        raise SchemaError(
            f"column {name!r} holds the text {values[0].as_py()!r}; expected {expected}. Convert it when you export it"
        )


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind))


def _is_temporal(kind: pa.DataType) -> bool:
    return bool(pa.types.is_timestamp(kind) or pa.types.is_date(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


# Text labels and ratings pass here and fail at the first value, which the message then names.
EXPECTED: dict[str, tuple[str, Callable[[pa.DataType], bool]]] = {
    USER: ("text or whole numbers", is_id_type),
    ITEM: ("text or whole numbers", is_id_type),
    CLOCK: (
        "a timestamp, a date, ISO 8601 text or a number since 1970",
        lambda k: _is_temporal(k) or _is_text(k) or _is_number(k),
    ),
    ORDER: (
        "whole numbers, the position of the event among those of its user",
        lambda k: _is_temporal(k) or _is_number(k),
    ),
    LABEL: ("0 and 1, or booleans", lambda k: pa.types.is_boolean(k) or _is_number(k) or _is_text(k)),
    RATING: ("numbers", lambda k: _is_number(k) or _is_text(k)),
}


# ---- ids of the log against ids of the catalogue ----


@dataclass(frozen=True)
class Coverage:
    """Which items of a log are in a catalogue."""

    interactions: int
    interactions_without: int
    items: int
    items_without: int

    @property
    def share_without(self) -> float:
        """Of the interactions: what the model sees of items that have no semantic ID."""
        return self.interactions_without / self.interactions

    @property
    def share_items_without(self) -> float:
        return self.items_without / self.items


def covered(log: Log, catalogue: DataFrame, train: TrainConfig) -> Coverage:
    """How much of a log is about items of `catalogue` (its `item_id`s).

    Raises:
        SchemaError: too little (train.max_share_without_id), or the ids are the same but for how they are written.
    """
    spark = catalogue.sparkSession
    counted = read_rows(log, spark).groupBy(ITEM).count()
    known = catalogue.select(ITEM, F.lit(True).alias("known"))
    items = counted.join(known, ITEM, how="left").cache()
    try:
        missing = F.col("known").isNull()
        totals = items.agg(
            F.sum("count"), F.sum(F.when(missing, F.col("count"))), F.count(F.lit(1)), F.count(F.when(missing, 1))
        ).first()
        assert totals is not None
        coverage = Coverage(*(int(total or 0) for total in totals))
        if coverage.interactions != log.rows_used:
            raise SchemaError(
                f"{train.interactions} has {coverage.interactions:,} usable rows, {log.rows_used:,} when it was examined; expected "
                "the log to stay as it is until it is read. Run it again"
            )
        limit, share = train.max_share_without_id, coverage.share_without
        if share <= min(limit, LOOKALIKES_FROM) or limit == 1:
            return coverage
        # Of the interactions without an item, those whose id is one of the catalogue's but for how it is written.
        twins = catalogue.groupBy(_bare(F.col(ITEM)).alias("bare")).agg(F.min(ITEM).alias("twin"))
        without = items.where(missing).withColumn("bare", _bare(F.col(ITEM))).join(twins, "bare", how="left")
        alike = without.agg(F.sum(F.when(F.col("twin").isNotNull(), F.col("count")))).first()
        assert alike is not None
        same = 2 * int(alike[0] or 0) > coverage.interactions_without
        if share <= limit and not same:
            return coverage
        shown = without.orderBy(F.col("twin").isNull(), F.desc("count"), ITEM).limit(SHOWN).collect()
        have = [row[ITEM] for row in catalogue.orderBy(ITEM).limit(SHOWN).collect()]
        twin = shown[0]["twin"]
    finally:
        items.unpersist()
    raise SchemaError(
        f"{share:.0%} of the interactions ({coverage.interactions_without:,} of {coverage.interactions:,}) and "
        f"{coverage.items_without:,} of {coverage.items:,} items of {train.interactions} have no semantic ID. The log has ids such as "
        f"{', '.join(repr(row[ITEM]) for row in shown)}, the catalogue such as {', '.join(map(repr, have))}"
        + (f"; most differ only in how they are written ({shown[0][ITEM]!r} is {twin!r})" if same else "")
        + ". Expected the ids of load.source; write them alike, or allow more with train.max_share_without_id"
        + (f" (now {limit:g})" if share > limit else " = 1")
    )


def _bare(item: Any) -> Any:
    """An id without what tools add or lose: case, spaces around, zeros in front, `.0` behind."""
    return F.regexp_replace(F.regexp_replace(F.lower(F.trim(item)), r"\.0+$", ""), r"^0+(?=.)", "")
