"""The columns of a log of interactions: their names, the types that they may have, and what they mean together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa

from jobs.config import TrainConfig
from jobs.errors import SchemaError
from jobs.files.values import is_id_type, is_number, plain_type

USER, ITEM = "user_id", "item_id"
CLOCK, ORDER = "timestamp", "order"
LABEL, RATING = "label", "rating"


@dataclass(frozen=True)
class Reading:
    """What the columns of a log mean.

    Attributes:
        time: column of the times, CLOCK or ORDER.
        outcome: column that says what is a click, LABEL or RATING; empty where every row is one.
        click_rating: the least rating that is a click.
        unit: of a CLOCK of numbers, one of `log_times.UNITS`, or "days" for numbers such as 20260131.
    """

    time: str
    outcome: str
    click_rating: float
    unit: str = ""

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        return [USER, ITEM, self.time, *([self.outcome] if self.outcome else [])]


def plan_reading(schema: pa.Schema, train: TrainConfig) -> Reading:
    """The columns of a log by name and type.

    Raises:
        SchemaError: one is missing, or of a type that it cannot have.
    """
    names = schema.names
    time = next((name for name in (CLOCK, ORDER) if name in names), None)
    if not {USER, ITEM} <= set(names) or time is None:
        raise SchemaError(
            f"interactions have columns {names}; expected user_id, item_id, one of timestamp or order, and perhaps "
            "label or rating"
        )
    outcome = next((name for name in (LABEL, RATING) if name in names), "")
    reading = Reading(time, outcome, train.click_rating)
    for name in reading.columns:
        if names.count(name) > 1:
            raise SchemaError(f"interactions have {names.count(name)} columns named {name}; expected one")
        kind = plain_type(schema.field(name).type)
        expected, fits = EXPECTED[name]
        if not (pa.types.is_null(kind) or fits(kind)):
            raise SchemaError(f"column {name!r} of the interactions has type {kind}; expected {expected}")
    return reading


def is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind))


def is_temporal(kind: pa.DataType) -> bool:
    return bool(pa.types.is_timestamp(kind) or pa.types.is_date(kind))


# What a column must be, for messages. Text labels and ratings fit here and fail at their first value, which the message
# then names.
EXPECTED: dict[str, tuple[str, Callable[[pa.DataType], bool]]] = {
    USER: ("text or whole numbers", is_id_type),
    ITEM: ("text or whole numbers", is_id_type),
    CLOCK: (
        "a timestamp, a date, ISO 8601 text or a number since 1970",
        lambda k: is_temporal(k) or is_text(k) or is_number(k),
    ),
    ORDER: (
        "whole numbers, the position of the event among those of its user",
        lambda k: is_temporal(k) or is_number(k),
    ),
    LABEL: ("0 and 1, or booleans", lambda k: pa.types.is_boolean(k) or is_number(k) or is_text(k)),
    RATING: ("numbers", lambda k: is_number(k) or is_text(k)),
}
