"""backfill: semantic IDs of one codebook version for listed items, for items changed since a day, or for all items.

A plan counts first what will be done (`plan` in jobs/warehouse/queries.py). `encode` skips items that have their ID, so
the same backfill run again, also after a kill, does the rest. The IDs of one run are one commit. The current release
does not change.
"""

from __future__ import annotations

import codecs

import pyarrow as pa
from pyarrow import fs

from jobs.config import ConfigError
from jobs.files.filesystem import filesystem_of
from jobs.files.parquet import begins_as_parquet
from jobs.files.sources import open_source
from jobs.files.values import as_ids, is_id_type

ITEM_ID = "item_id"
BATCH = 65536


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
