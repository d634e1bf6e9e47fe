"""A log of interactions: whether a model can learn from it, how it is read, and its usable rows.

A log is examined once, before anything else runs: `examine` reads all of it and says what is wrong with it, or how it
is read. `read_rows` then gives its usable rows. Both call `log_rows.checked_rows`: what is counted is what is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.pandas.types import from_arrow_schema
from pyspark.sql.types import StringType, StructType

from jobs.config import TrainConfig
from jobs.ctr.log_columns import CLOCK, ITEM, LABEL, ORDER, RATING, USER, Reading, plan_reading
from jobs.ctr.log_rows import ROWS, checked_rows
from jobs.ctr.log_survey import SMALLEST_SPLITS, Survey, survey
from jobs.ctr.log_times import shown_time, unit_of
from jobs.errors import SchemaError
from jobs.files.sources import Source, map_rows

ROWS_PER_BATCH = 65_536


@dataclass(frozen=True)
class Log:
    """Interactions that can be learned from, and the account of their rows: rows_in = rows_used + those dropped.

    Attributes:
        source: the files.
        reading: what its columns mean.
        rows_in: rows of the source.
        rows_used: rows that are learned from.
        dropped: reason -> rows that are not.
        note: how labels and times are read.
        seen_before: the examples of this warehouse were made from this log.
    """

    source: Source = field(repr=False)
    reading: Reading
    rows_in: int
    rows_used: int
    dropped: Mapping[str, int]
    note: str
    seen_before: bool = False

    @property
    def has_clock(self) -> bool:
        """Time is one clock for all users, not a position per user."""
        return self.reading.time == CLOCK

    @property
    def positives_only(self) -> bool:
        return not self.reading.outcome

    def to_json(self) -> str:
        """All but the source."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "source"}
        return json.dumps({**values, "reading": asdict(self.reading)}, sort_keys=True)

    @staticmethod
    def from_json(text: str, source: Source) -> Log:
        """What `to_json` wrote of a log that was examined before."""
        values = json.loads(text)
        return Log(**{**values, "source": source, "reading": Reading(**values["reading"]), "seen_before": True})

    def account(self) -> str:
        """The account as text: 1,800 in = 1,334 used + 466 dropped (null_label 466)."""
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(self.dropped.items()))
        total = sum(self.dropped.values())
        return f"{self.rows_in:,} in = {self.rows_used:,} used + {total:,} dropped" + (
            f" ({reasons})" if reasons else ""
        )


# ---- examine ----


def examine(source: Source, train: TrainConfig, spark: SparkSession) -> Log:
    """Read all of a log once and decide how it is read.

    Raises:
        SchemaError: columns, types or values from which nothing could be learned; the message names column and value.
    """
    reading = plan_reading(source.schema, train)

    def survey_batch(batch: pa.RecordBatch) -> pa.RecordBatch:
        return pa.RecordBatch.from_pydict({"survey": [json.dumps(asdict(survey(batch, reading)))]})

    seen = Survey()
    for row in _map(source, reading, spark, survey_batch, StructType().add("survey", StringType())).collect():
        seen += Survey(**json.loads(row["survey"]))
    return conclude(seen, reading, source, train)


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
        reading = replace(reading, unit=unit_of(seen.units, seen.days))
    if len(seen.times) < SMALLEST_SPLITS:
        count = "one value" if len(seen.times) == 1 else "two values"
        shown = " and ".join(shown_time(value, reading) for value in seen.times)
        raise SchemaError(
            f"column {reading.time!r} has {count} in all {seen.used:,} rows ({shown}); expected at least three, as "
            "training, validation and test follow each other in time. Give the time of each interaction"
            + (", or a column `order` (position per user) instead of it" if reading.time == CLOCK else "")
        )
    if reading.outcome and seen.clicks in (0, seen.used):
        which = "a click" if seen.clicks else "no click"
        how = f" (a rating of {reading.click_rating:g} or more is a click: train.click_rating)" * (
            reading.outcome == RATING
        )
        raise SchemaError(
            f"every one of the {seen.used:,} rows is {which} by column {reading.outcome!r}{how}; expected clicks and "
            "non-clicks. "
            + ("Leave the column out to have negatives sampled" if seen.clicks else "Is it the right column?")
        )
    note = _note(seen, reading, source.schema.names, train) + (f"; {source.note}" if source.note else "")
    return replace(log, reading=reading, note=note)


def _note(seen: Survey, reading: Reading, names: list[str], train: TrainConfig) -> str:
    parts = []
    if reading.outcome == LABEL:
        parts.append("labels as given" + (", ratings are not used" if RATING in names else ""))
    elif reading.outcome == RATING:
        parts.append(f"a rating of {train.click_rating:g} or more is a click")
    else:
        drawn = "by their clicks" if train.negative_sampling == "popularity" else "uniform"
        parts.append(
            f"positives only: {train.negatives} sampled negatives per positive, {drawn} over the items that are as new "
            "to the user and to the log as the positive"
        )
    if reading.time == ORDER:
        parts.append("order is a position per user")
    else:
        how = (
            f"timestamp read as {reading.unit}{' written as YYYYMMDD' if reading.unit == 'days' else ''}, "
            if reading.unit
            else ""
        )
        parts.append(f"{how}{shown_time(seen.low, reading)} to {shown_time(seen.high, reading)} UTC")
    return "; ".join(parts)


# ---- tasks ----


def read_rows(log: Log, spark: SparkSession) -> DataFrame:
    """The usable rows of a log as user_id, item_id, label, ts."""
    reading = log.reading

    def usable(batch: pa.RecordBatch) -> pa.RecordBatch:
        rows = checked_rows(batch, reading)
        return rows.filter(rows.column("reason").is_null()).select(ROWS.names).cast(ROWS)

    return _map(log.source, reading, spark, usable, from_arrow_schema(ROWS))


def _map(
    source: Source,
    reading: Reading,
    spark: SparkSession,
    convert: Callable[[pa.RecordBatch], pa.RecordBatch],
    schema: StructType,
) -> DataFrame:
    # Ids and times as each file has them: a type common to all could round those of one.
    exact = (USER, ITEM, reading.time)
    return map_rows(spark, source, reading.columns, convert, schema, rows=ROWS_PER_BATCH, as_written=exact)
