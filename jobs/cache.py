"""cache: `ctr_examples` + the champion of the CTR models -> `user_interests`, the interests of every user.

Only users whose behaviours have changed are computed. For a new model all are, and written beside the entries of the
previous model, which readers may still use; those of other models are deleted, and those of users that the log no
longer has. A server gets what has changed if it
holds a whole copy of the table as it was before, else all entries of the model.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
from pyspark.sql import DataFrame, Row
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import to_arrow_schema

from jobs.config import Config, ConfigError
from jobs.ctr.artefact import CtrModel, model_of
from jobs.ctr.champion import ctr_champion, ctr_files
from jobs.ctr.example_table import EXAMPLES_OF
from jobs.ctr.interest_cache import Entry, compute
from jobs.ctr.interest_store import InterestStore
from jobs.errors import SchemaError, WarehouseError, first_line
from jobs.fingerprint import fingerprint
from jobs.models.registry import Registry, warehouse_id
from jobs.models.versions import CodebookVersion
from jobs.warehouse.delta_spark import Warehouse
from jobs.warehouse.tables import CTR_EXAMPLES, USER_INTERESTS

if TYPE_CHECKING:
    from redis import Redis

ENTRIES = to_arrow_schema(USER_INTERESTS.schema)

_models: dict[str, CtrModel] = {}  # one model per worker process, by the digest of its files


@dataclass(frozen=True)
class CacheResult:
    """What the cache holds after the command."""

    ctr_version: int
    codebook_hash: str
    users: int  # with an entry of this model
    computed: int  # of these, anew
    gone: int  # users that the log no longer has, whose entries were deleted
    deleted_versions: tuple[int, ...]  # models whose entries are gone
    seconds: float
    nothing_to_do: bool

    def summary(self) -> str:
        text = f"CTR model version {self.ctr_version}: interests of {self.users:,} users, {self.computed:,} computed"
        text += f", {self.gone:,} gone" if self.gone else ""
        deleted = ", ".join(map(str, self.deleted_versions))
        return f"{text}; entries of version {deleted} deleted" if deleted else text


def run(
    config: Config, warehouse: Warehouse, registry: Registry, codebook: CodebookVersion, report: Callable[[str], None]
) -> CacheResult:
    """Bring `user_interests` up to date for the CTR model of the current codebook. Call with the writer lock held.

    Raises:
        ConfigError: no CTR model of this codebook has passed the gate.
        SchemaError: `ctr_examples` has codes of another codebook.
        ArtefactError: the model is damaged.
    """
    began = time.monotonic()
    champion = ctr_champion(registry, codebook.hash)
    if champion is None:
        raise ConfigError(
            f"no CTR model trained on codebook version {codebook.number} has passed the gate; expected one whose "
            "interests to cache. Run `sid nightly` or `sid train`"
        )
    examples = json.loads(warehouse.property(CTR_EXAMPLES, EXAMPLES_OF) or "{}")
    made_of = examples.get("ids", "")
    if not made_of.startswith(codebook.hash[:16]):
        raise SchemaError(
            f"ctr_examples has codes of codebook {made_of[:12] or 'unknown'}, the current one is {codebook.hash[:12]}; "
            "expected the same. Run `sid train`"
        )
    files = ctr_files(registry, champion)
    ctr = model_of(*files, codebook.hash)
    history = examples.get("history", ctr.inputs.history)
    if history < ctr.inputs.history:
        raise SchemaError(
            f"ctr_examples has histories of {history} behaviours, CTR model version {champion.number} reads "
            f"{ctr.inputs.history}; expected at least as many. Run `sid train` with train.history = "
            f"{ctr.inputs.history}, or let a model with shorter histories pass the gate"
        )

    users = newest_histories(warehouse.read(CTR_EXAMPLES), ctr.inputs.history)
    warehouse.create(USER_INTERESTS)
    own = warehouse.read(USER_INTERESTS).where(F.col("ctr_version") == champion.number)
    current = own.where((F.col("model_digest") == ctr.digest) & (F.col("codebook_hash") == ctr.codebook_hash))
    pending = users.join(current.select("user_id", "history_hash"), ["user_id", "history_hash"], "left_anti")
    server = config.cache.redis
    owner = warehouse_id(warehouse.root)
    copied = bool(server) and _server_holds(server, owner, ctr, _content(warehouse), own.count())
    gone = own.join(users, "user_id", "left_anti").select("user_id")
    report("interests of users with new behaviours")
    with (
        warehouse.staged(gone, "users_gone") as gone,
        warehouse.staged(_entries(pending, files, champion.number, warehouse.cores), "user_interests") as changed,
    ):
        computed, left = changed.count(), gone.count()
        if left:
            kept = own.join(users, "user_id", "left_semi").select(*USER_INTERESTS.schema.names)
            warehouse.replace(USER_INTERESTS, kept, f"ctr_version = {champion.number}")
        if computed:
            warehouse.merge(USER_INTERESTS, changed)
        deleted = _delete_older(warehouse, champion.number)
        own = warehouse.read(USER_INTERESTS).where(F.col("ctr_version") == champion.number)
        count = own.count()
        if server:
            report(f"writing {computed if copied else count:,} entries to the server")
            _write_to_server(server, owner, ctr, changed if copied else own, gone, _content(warehouse))
    return CacheResult(
        ctr_version=champion.number,
        codebook_hash=codebook.hash,
        users=count,
        computed=computed,
        gone=left,
        deleted_versions=deleted,
        seconds=time.monotonic() - began,
        nothing_to_do=not computed and not left and not deleted,
    )


def newest_histories(examples: DataFrame, history: int) -> DataFrame:
    """user_id, the latest `history` behaviours of each user, and their hash."""
    first = F.greatest(F.size("behaviours") - history, F.lit(0)) + 1
    behaviours = F.slice("behaviours", first, F.lit(history)).alias("behaviours")
    users = examples.where("last").select("user_id", behaviours)
    return users.withColumn("history_hash", F.xxhash64("behaviours"))


def _entries(users: DataFrame, files: tuple[bytes, bytes], version: int, tasks: int) -> DataFrame:
    """Rows of `user_interests`."""
    broadcast = users.sparkSession.sparkContext.broadcast(files)

    def rows(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        ctr = _worker_model(broadcast.value)
        for batch in batches:
            entries = compute(ctr, pa.Table.from_batches([batch]))
            yield pa.RecordBatch.from_pylist([{"ctr_version": version, **vars(entry)} for entry in entries], ENTRIES)

    return users.repartition(tasks).mapInArrow(rows, USER_INTERESTS.schema)


def _delete_older(warehouse: Warehouse, champion: int) -> tuple[int, ...]:
    """Delete the entries of models older than the one before the champion; the versions of these models."""
    versions = sorted(row[0] for row in warehouse.read(USER_INTERESTS).select("ctr_version").distinct().collect())
    before = [version for version in versions if version < champion]
    deleted = tuple(version for version in versions if version not in (champion, *before[-1:]))
    if deleted:
        kept_none = warehouse.read(USER_INTERESTS).limit(0)
        warehouse.replace(USER_INTERESTS, kept_none, f"ctr_version IN ({', '.join(map(str, deleted))})")
    return deleted


def _content(warehouse: Warehouse) -> str:
    """Names the rows of `user_interests`: the same files, whose names are never used twice, have the same rows."""
    return fingerprint(warehouse.files(USER_INTERESTS, warehouse.version(USER_INTERESTS)))


def _server_holds(url: str, owner: str, ctr: CtrModel, content: str, entries: int) -> bool:
    """Whether the server has a whole copy of these entries; the first that is asked of it.

    Raises:
        WarehouseError: it does not answer.
    """
    with _server(url) as server:
        from redis import RedisError

        try:
            return InterestStore(server, owner).holds(ctr.digest, content, entries)
        except RedisError as error:
            raise WarehouseError(
                f"the server of cache.redis does not answer ({first_line(error)}); expected one with the Redis "
                "protocol. Start it, or leave cache.redis empty"
            ) from error


def _write_to_server(url: str, owner: str, ctr: CtrModel, rows: DataFrame, gone: DataFrame, content: str) -> None:
    """Write the entries of a model from the tasks, delete those of users that are gone, and make the rest the current
    ones of the warehouse `owner`, a copy of `content`.
    """
    digest = ctr.digest

    def write(part: Iterator[Row]) -> None:
        with _server(url) as server:
            InterestStore(server, owner).write(digest, (_entry(row) for row in part))

    def delete(part: Iterator[Row]) -> None:
        with _server(url) as server:
            InterestStore(server, owner).delete(digest, (row.user_id for row in part))

    with _server(url) as server:
        InterestStore(server, owner).forget_content()
    gone.foreachPartition(delete)
    rows.foreachPartition(write)
    with _server(url) as server:
        InterestStore(server, owner).switch(digest, content)


def _server(url: str) -> Redis:
    """A client of the server.

    Raises:
        ConfigError: the package is not installed, or the URL is none of a server.
    """
    try:
        from redis import Redis
    except ModuleNotFoundError as error:
        raise ConfigError("cache.redis needs the package redis; expected it. Install it: pip install redis") from error
    try:
        return Redis.from_url(url)
    except ValueError as error:
        raise ConfigError(f"cache.redis: {first_line(error)}; expected a URL such as redis://HOST:6379/0") from error


def _entry(row: Row) -> Entry:
    values = row.asDict()
    del values["ctr_version"]
    return Entry(**{**values, "interests": bytes(values["interests"])})


def _worker_model(files: tuple[bytes, bytes]) -> CtrModel:
    """The model in these files, loaded once per process."""
    key = files[0].decode()  # the manifest has the digest of the tensors
    if key not in _models:
        _models.clear()
        _models[key] = model_of(*files)
    return _models[key]
