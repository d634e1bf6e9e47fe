"""The cache of interests: scores from it are those of the whole model, and no entry that is not right is used."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ctr_data import ctr_model, users

from jobs.ctr.artefact import CtrModel
from jobs.ctr.examples import FEATURES
from jobs.ctr.interest_cache import DAMAGED, FOREIGN, STALE, compute, entry_bytes, newest_batch, score, usable


def test_scores_from_the_cache_are_those_of_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.ctr.interest_cache.USERS_AT_ONCE", 7)
    ctr, table = ctr_model(), users()
    lookup = usable(ctr, compute(ctr, table))
    ids = table["user_id"].to_pylist()
    assert set(lookup.row) == set(ids)
    assert not lookup.refused
    batch = newest_batch(ctr, table)
    # Candidates: the first behaviour of each user's neighbour, or padding.
    candidates = batch.behaviours[torch.arange(len(ids)).roll(1), torch.zeros(len(ids), dtype=torch.int64)]
    features = torch.randn(len(ids), len(FEATURES))
    with torch.no_grad():
        whole = ctr.model(replace(batch, candidates=candidates, features=features)).sigmoid()
    cached = score(ctr, lookup, ids, candidates, features)
    torch.testing.assert_close(cached, whole, rtol=1e-5, atol=1e-5)
    assert float(whole.std()) > 1e-3


def test_entries_of_another_model_or_codebook_are_refused() -> None:
    ctr, other = ctr_model(), ctr_model(1)
    entries = compute(ctr, users())
    lookup = usable(other, entries)
    assert not lookup.row
    assert set(lookup.refused.values()) == {FOREIGN}
    codebook = CtrModel(ctr.model, ctr.inputs, "d" * 64, ctr.digest)
    assert set(usable(codebook, entries).refused.values()) == {FOREIGN}


@pytest.mark.parametrize("damage", ["cut", "longer", "flipped", "other user", "other history", "relabelled"])
def test_damaged_entries_are_refused_and_the_others_used(damage: str) -> None:
    ctr = ctr_model()
    first, *others = compute(ctr, users())
    content = first.interests
    assert len(content) == entry_bytes(ctr)
    bad = {
        "cut": replace(first, interests=content[: len(content) // 2]),
        "longer": replace(first, interests=content + b"\0\0\0\0"),
        "flipped": replace(first, interests=bytes([content[0] ^ 1]) + content[1:]),
        "other user": replace(first, user_id="stranger"),
        "other history": replace(first, history_hash=first.history_hash + 1),
        "relabelled": replace(compute(ctr_model(1), users())[0], model_digest=ctr.digest),
    }[damage]
    lookup = usable(ctr, [bad, *others])
    assert lookup.refused == {bad.user_id: DAMAGED}
    assert set(lookup.row) == {entry.user_id for entry in others}


def test_an_entry_from_before_the_newest_behaviour_is_stale() -> None:
    ctr = ctr_model()
    first, second, *_ = compute(ctr, users())
    now = {first.user_id: first.history_hash + 1, second.user_id: second.history_hash}
    lookup = usable(ctr, [first, second], now)
    assert lookup.refused == {first.user_id: STALE}
    assert list(lookup.row) == [second.user_id]


def test_no_entries_give_an_empty_look_up() -> None:
    lookup = usable(ctr_model(), [])
    assert not lookup.row
    assert lookup.interests.clusters.shape[1] == 0


@pytest.mark.parametrize("field", ["user_id", "model_digest", "codebook_hash", "history_hash", "interests"])
def test_the_checksum_covers_every_field(field: str) -> None:
    """An entry with one other value is damaged, also for a model that has this digest and codebook."""
    ctr = ctr_model()
    first, second = (compute(ctr, users())[row] for row in (0, 1))
    values = {**vars(second), "model_digest": "e" * 64, "codebook_hash": "d" * 64}
    changed = replace(first, **{field: values[field]})
    assert changed != first
    model = CtrModel(ctr.model, ctr.inputs, changed.codebook_hash, changed.model_digest)
    assert first.problem(ctr, None) is None
    assert changed.problem(model, None) == DAMAGED
