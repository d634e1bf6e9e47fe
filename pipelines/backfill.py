"""backfill: semantic IDs of one codebook version for listed items, for items changed since a day, or for all items.

A plan counts first what will be done. `encode` skips items that have their ID, so the same backfill run again, also
after a kill, does the rest. The IDs of one run are one commit. The current release does not change.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass

import pyarrow as pa
from pyarrow import fs

from jobs.config import ConfigError
from jobs.files.filesystem import filesystem_of
from jobs.files.parquet import begins_as_parquet
from jobs.files.sources import open_source
from jobs.files.values import as_ids, is_id_type
from jobs.models.versions import CodebookVersion
from jobs.warehouse.delta_spark import Warehouse
from jobs.warehouse.queries import Selection, count_selection

ITEM_ID = "item_id"
BATCH = 65536


@dataclass(frozen=True)
class Plan:
    """Counts of a backfill: `chosen` = `with_id` + `to_encode` + `unknown`."""

    codebook_version: int
    codebook_hash: str
    chosen: int
    with_id: int  # have an ID of this version for their present vector
    to_encode: int
    unknown: int  # not in item_embeddings: never loaded, or rejected
    unknown_items: tuple[str, ...]  # some of them


def listed_items(location: str) -> pa.StringArray:
    """Read ids from Parquet (a file or folder) with a column `item_id`, or from text with one id per line.

    Text is UTF-8, or UTF-16 with a byte order mark.

    Raises:
        ConfigError: no such file, no such column, or no ids.
        SchemaError: Parquet that cannot be read.
    """
    filesystem, path = filesystem_of(location)
    kind = filesystem.get_file_info(path).type
    if kind == fs.FileType.NotFound:
        raise ConfigError(
            f"{location} does not exist; expected text with one id a line, or Parquet with a column item_id"
        )
    if kind == fs.FileType.Directory or location.endswith(".parquet") or begins_as_parquet(filesystem, path):
        ids = _parquet_ids(location)
    else:
        ids = _text_ids(filesystem, path, location)
    if not len(ids):
        raise ConfigError(f"{location} names no item; expected at least one id")
    return ids


def _parquet_ids(location: str) -> pa.StringArray:
    source = open_source(location)
    if source.format == "delta":
        raise ConfigError(f"{location} is a Delta table; expected text with one id a line, or Parquet. Export the ids")
    if ITEM_ID not in source.schema.names:
        raise ConfigError(f"{location} has columns {source.schema.names}; expected {ITEM_ID} among them")
    kind = source.schema.field(ITEM_ID).type
    if not is_id_type(kind):
        raise ConfigError(f"column {ITEM_ID} of {location} has type {kind}; expected one integer or string a row")
    parts = []
    for batch in source.batches([ITEM_ID], BATCH, as_written=[ITEM_ID]):
        ids, wrong = as_ids(batch.column(0))
        if wrong.any():
            bad = ids.filter(pa.array(wrong))[0]
            raise ConfigError(f"{location} names item {bad}; expected text in UTF-8 or whole numbers")
        parts.append(ids.drop_null())
    return pa.concat_arrays(parts) if parts else pa.array([], pa.string())


def _text_ids(filesystem: fs.FileSystem, path: str, location: str) -> pa.StringArray:
    with filesystem.open_input_stream(path) as stream:
        data = stream.read()
    # Windows tools write a byte order mark first.
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        # Not splitlines, which would also break ids at U+2028 and other characters.
        lines = data.decode(encoding).replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{location} is not {encoding.upper().removesuffix('-SIG')} text ({error.reason} at byte {error.start}); "
            "expected one id a line, or Parquet"
        ) from error
    return pa.array([line.strip() for line in lines if line.strip()], pa.string())


def plan(warehouse: Warehouse, model: CodebookVersion, selection: Selection | None) -> Plan:
    """What encoding the selected items (None: every item) under `model` would do."""
    counts = count_selection(warehouse, model.number, selection)
    return Plan(
        codebook_version=model.number,
        codebook_hash=model.hash,
        chosen=counts.selected,
        with_id=counts.with_id,
        to_encode=counts.selected - counts.unknown - counts.with_id,
        unknown=counts.unknown,
        unknown_items=counts.unknown_items,
    )
