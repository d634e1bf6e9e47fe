"""Folders `key=value`, which are columns as Hive, Spark and pyarrow write them, and of daily ones the newest."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Literal
from urllib.parse import unquote

import pyarrow as pa

from jobs.errors import SchemaError

Partition = tuple[tuple[str, str | None], ...]  # (key, value) from the outermost folder inwards; None is Hive's null
Snapshots = Literal["newest", "all"]
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
NAMED = 3  # files or folders that a sentence lists


def partition_of(relative: str) -> Partition:
    """Keys and values of the folders of a path below its source."""
    parts = [part.split("=", 1) for part in relative.split("/")[:-1] if "=" in part]
    return tuple((key, None if value == HIVE_NULL else unquote(value)) for key, value in parts)


def check_keys(location: str, partitions: Mapping[str, Partition]) -> None:
    """All files lie in folders of the same keys.

    Raises:
        SchemaError: they do not.
    """
    examples = {tuple(key for key, _ in values): path for path, values in partitions.items()}
    if len(examples) > 1:
        (first_keys, first), (other_keys, other) = list(examples.items())[:2]
        raise SchemaError(
            f"files of {location} lie in folders of different keys: {first.rpartition('/')[2]} under "
            f"{list(first_keys)}, {other.rpartition('/')[2]} under {list(other_keys)}; expected the same keys for all"
        )


def newest_snapshot(partitions: Mapping[str, Partition], snapshots: Snapshots) -> tuple[set[str], str]:
    """The files to read, and a note on them: of folders named by days the newest, under each folder above them."""
    everything = set(partitions)
    dated = _days(partitions)
    if dated is None:
        return everything, ""
    span, days = dated
    folders = {
        days[path]: "/".join(f"{key}={value}" for key, value in values[span]) for path, values in partitions.items()
    }
    if len(folders) == 1:
        return everything, ""
    if snapshots == "all":
        ordered = [folders[day] for day in sorted(folders)]
        return everything, f"all {len(folders)} daily folders, {ordered[0]} to {ordered[-1]}"
    newest: dict[Partition, date] = {}  # by the folders above the daily ones
    for path, values in partitions.items():
        above = values[: span.start]
        newest[above] = max(days[path], newest.get(above, date.min))
    chosen = {path for path, values in partitions.items() if days[path] == newest[values[: span.start]]}
    latest = sorted({folders[day] for day in newest.values()})
    return chosen, f"snapshot {some(latest)}, the newest of {len(folders)} daily folders"


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(names[:NAMED])
    return f"{shown} and {len(names) - NAMED} more" if len(names) > NAMED else shown


def _days(partitions: Mapping[str, Partition]) -> tuple[slice, dict[str, date]] | None:
    """The one key (or year, month and day together) whose values are days in every folder, and the day of each file."""
    keys = [key.lower() for key, _ in next(iter(partitions.values()))]
    spans = [slice(n, n + 1) for n in range(len(keys))]
    spans += [slice(n, n + 3) for n in range(len(keys) - 2) if keys[n : n + 3] == ["year", "month", "day"]]
    dated = []
    for span in spans:
        days = {path: day for path, values in partitions.items() if (day := _day([v for _, v in values[span]]))}
        if len(days) == len(partitions):
            dated.append((span, days))
    return dated[0] if len(dated) == 1 else None


def _day(values: list[str | None]) -> date | None:
    text = "-".join(value or "" for value in values)
    match = re.fullmatch(r"(\d{4})-(\d\d?)-(\d\d?)" if len(values) == 3 else r"(\d{4})(-?)(\d\d)\2(\d\d)", text)
    if match is None:
        return None
    year, month, day = (int(part) for part in match.groups() if part not in ("", "-"))
    try:
        return date(year, month, day)
    except ValueError:
        return None


def partition_type(values: list[str | None]) -> pa.DataType:
    """int64 where every value is a whole number as one writes it, date32 for days, else text: 007 stays what it is."""
    given = [value for value in values if value is not None]
    if given and all(re.fullmatch(r"0|-?[1-9]\d{0,17}", value) for value in given):
        return pa.int64()
    if given and all("-" in value and _day([value]) for value in given):
        return pa.date32()
    return pa.string()


def partition_array(value: str | None, kind: pa.DataType, rows: int) -> pa.Array:
    """A column of `rows` rows with the value of a folder."""
    if value is None:
        return pa.nulls(rows, kind)
    scalar = date.fromisoformat(value) if pa.types.is_date(kind) else int(value) if pa.types.is_integer(kind) else value
    return pa.repeat(pa.scalar(scalar, kind), rows)
