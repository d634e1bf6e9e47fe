"""One schema for files of different schemas: numbers widen, numbers and text become text, a column may be absent.

Files without rows and columns without values decide nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.errors import SchemaError
from jobs.files.partitions import Partition, partition_type
from jobs.files.values import is_number, plain_type


@dataclass(frozen=True)
class _File:
    name: str
    footer: pq.FileMetaData
    schema: pa.Schema


@dataclass(frozen=True)
class _Column:
    """The type of a column so far, and a file that has it."""

    kind: pa.DataType
    file: _File


def unified_schema(
    footers: Mapping[str, pq.FileMetaData], partitions: Mapping[str, Partition]
) -> tuple[pa.Schema, dict[str, tuple[str, ...]]]:
    """One schema for all files, and for each column the files with rows that lack it.

    Raises:
        SchemaError: a column has types that no type can hold, or one name stands twice or in two spellings.
    """
    files = [_File(name, footer, footer.schema.to_arrow_schema()) for name, footer in footers.items()]
    for file in files:
        twice = {column for column in file.schema.names if file.schema.names.count(column) > 1}
        if twice:
            raise SchemaError(f"{file.name} has two columns named {min(twice)!r}; expected every name once")
    deciding = [file for file in files if file.footer.num_rows] or files[:1]
    _check_spellings(deciding)
    columns: dict[str, _Column] = {}
    for file in deciding:
        for field in file.schema:
            column = _Column(plain_type(field.type), file)
            columns[field.name] = _unified_column(field.name, columns.get(field.name, column), column)
    lacking = {
        name: tuple(file.name for file in deciding if file.footer.num_rows and name not in file.schema.names)
        for name in columns
    }
    fields = [pa.field(name, column.kind) for name, column in columns.items()]
    for key in [key for key, _ in next(iter(partitions.values()), ())]:
        # a folder's value wins over a column of the file, as in Spark
        kind = partition_type([dict(values)[key] for values in partitions.values()])
        fields = [f for f in fields if f.name != key] + [pa.field(key, kind)]
        lacking[key] = ()
    return pa.schema(fields), {column: names for column, names in lacking.items() if names}


def _check_spellings(files: list[_File]) -> None:
    spellings: dict[str, tuple[str, _File]] = {}
    names: set[str] = set()
    for file in files:
        for name in file.schema.names:
            spelled, first = spellings.setdefault(name.lower(), (name, file))
            if spelled != name and name not in names and spelled not in file.schema.names:
                raise SchemaError(
                    f"{first.name} has a column {spelled!r}, {file.name} a column {name!r}; expected one spelling"
                )
            names.add(name)


def _unified_column(name: str, known: _Column, other: _Column) -> _Column:
    kind = unified_type(known.kind, other.kind)
    if kind is not None:
        return _Column(kind, known.file if kind == known.kind else other.file)
    if _is_empty(known.file.footer, name):
        return other
    if _is_empty(other.file.footer, name):
        return known
    raise SchemaError(
        f"column {name!r} is {known.kind} in {known.file.name} and {other.kind} in {other.file.name}; "
        "expected types that one column can hold"
    )


def unified_type(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """The type that holds values of both; None where there is none."""
    if a == b:
        return a
    if (pa.types.is_string(a) and is_number(b)) or (pa.types.is_string(b) and is_number(a)):
        return pa.string()
    try:
        both = pa.unify_schemas([pa.schema([("", a)]), pa.schema([("", b)])], promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        return None
    return both.field(0).type


def _is_empty(footer: pq.FileMetaData, column: str) -> bool:
    """Is a flat column null in every row, as its statistics say: such as one that pandas wrote of None or NaN alone."""
    leaves = [n for n in range(footer.num_columns) if footer.schema.column(n).path == column]
    if len(leaves) != 1:
        return False
    for group in range(footer.num_row_groups):
        chunk = footer.row_group(group).column(leaves[0])
        statistics = chunk.statistics
        if statistics is None or not statistics.has_null_count or statistics.null_count != chunk.num_values:
            return False
    return True
