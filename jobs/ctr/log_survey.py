"""What the rows of a log show about how it must be read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.ctr.log_columns import Reading
from jobs.ctr.log_rows import checked_rows
from jobs.ctr.log_times import are_days, times, units_by_size
from jobs.errors import SchemaError

SMALLEST_SPLITS = 3  # distinct times, for training, validation and test


@dataclass
class Survey:
    """What some rows of a log show; surveys of its parts add.

    Attributes:
        rows: their number.
        dropped: reason -> rows that are not used.
        clicks: used rows that are clicks.
        times: up to SMALLEST_SPLITS distinct times of used rows.
        low, high: least and greatest time of used rows.
        kinds: of times, see `log_times.times`.
        units: of times that are numbers, see `log_times.units_by_size`.
        days: whether all numbers are days such as 20260131.
        problem: the message about a value that means nothing; empty where there is none.
    """

    rows: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    clicks: int = 0
    times: list[float] = field(default_factory=list)
    low: float = np.inf
    high: float = -np.inf
    kinds: list[str] = field(default_factory=list)
    units: dict[str, float] = field(default_factory=dict)
    days: bool = True
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


def survey(batch: pa.RecordBatch, reading: Reading) -> Survey:
    """What the rows of a batch show."""
    try:
        batch_times, kind = times(batch.column(reading.time), reading.time)
        rows = checked_rows(batch, reading, (batch_times, kind))
    except SchemaError as error:
        return Survey(rows=len(batch), problem=str(error))
    used = rows.column("reason").is_null()
    result = Survey(rows=len(batch), dropped=dict(Counter(rows.column("reason").drop_null().to_pylist())))
    values = batch_times.filter(used).to_numpy(zero_copy_only=False)
    if not len(values):
        return result
    result.clicks = int(pc.sum(rows.column("label").filter(used)).as_py())
    result.times = [number.item() for number in np.unique(values)[:SMALLEST_SPLITS]]
    result.low, result.high = values.min().item(), values.max().item()
    result.kinds = [kind]
    if kind == "number":
        result.units, result.days = units_by_size(values), are_days(values)
    return result
