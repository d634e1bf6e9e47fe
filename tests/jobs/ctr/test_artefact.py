"""A CTR model on disk and as a pyfunc: the same scores, and what is damaged or of another codebook is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from ctr_data import ALTERNATES, COMPONENTS, LEVELS, Event, codes_of, events_batch, scheme_of, weights_of

from jobs.ctr.artefact import MANIFEST, TENSORS, ArtefactError, load_model, new_model, save_model
from jobs.ctr.dmqn import DMQN, DMQNShape
from jobs.ctr.examples import FEATURES, user_rows
from jobs.ctr.pieces import Pieces
from jobs.ctr.tokens import TokenScheme
from jobs.ctr.user_table import ModelInputs, UserTable

INPUTS = ModelInputs(TokenScheme("soft", LEVELS, COMPONENTS, ALTERNATES, 100), item_rows=50, history=3)
CODEBOOK = "c" * 64


def some_model(inputs: ModelInputs = INPUTS) -> DMQN:
    torch.manual_seed(0)
    model = new_model(inputs, DMQNShape(len(FEATURES), width=8, interest_codebooks=2, codewords=4)).eval()
    with torch.no_grad():  # large enough that every input shows in the score
        for table in (model.embed.item, model.embed.token):
            table.mul_(50)
    return model


def test_a_model_comes_back_with_its_scores(tmp_path: Path) -> None:
    model = some_model()
    digest = save_model(tmp_path / "dmqn", model, INPUTS, CODEBOOK, {"features": list(FEATURES)})
    back = load_model(tmp_path / "dmqn", CODEBOOK)
    assert (back.inputs, back.codebook_hash, back.digest) == (INPUTS, CODEBOOK, digest)
    assert back.model.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(back.model.state_dict()[name], value)
    assert not back.model.training


def test_a_model_without_tokens_comes_back(tmp_path: Path) -> None:
    inputs = ModelInputs(None, 50, 3)
    save_model(tmp_path / "dmqn", some_model(inputs), inputs, "", {})
    assert load_model(tmp_path / "dmqn").inputs == inputs


PIECES = ModelInputs(scheme_of("pieces", LEVELS, COMPONENTS, ALTERNATES, 30), item_rows=50, history=3)


def test_learned_pieces_come_back_and_are_part_of_what_the_hash_covers(tmp_path: Path) -> None:
    scheme = PIECES.scheme
    assert scheme is not None
    assert scheme.pieces is not None
    assert len(scheme.pieces.several)
    model = some_model(PIECES)
    digest = save_model(tmp_path / "dmqn", model, PIECES, CODEBOOK, {})
    back = load_model(tmp_path / "dmqn", CODEBOOK)
    assert back.inputs == PIECES
    assert back.model.state_dict().keys() == model.state_dict().keys()
    other = Pieces(COMPONENTS, scheme.pieces.several, scheme.pieces.log_prob - 1)
    others = replace(PIECES, scheme=replace(scheme, pieces=other))
    assert others != PIECES
    assert save_model(tmp_path / "other", model, others, CODEBOOK, {}) != digest


@pytest.mark.parametrize(("saved", "told"), [(INPUTS, "pieces"), (PIECES, "level")])
def test_pieces_of_a_model_that_has_none_and_the_reverse_are_refused(
    saved: ModelInputs, told: str, tmp_path: Path
) -> None:
    save_model(tmp_path / "dmqn", some_model(saved), saved, CODEBOOK, {})
    path = tmp_path / "dmqn" / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["inputs"]["scheme"]["kind"] = told
    path.write_text(json.dumps(manifest))
    with pytest.raises(ArtefactError, match=f"do not belong together: '{told}' tokens with"):
        load_model(tmp_path / "dmqn")


def test_one_of_another_codebook_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "dmqn", some_model(), INPUTS, CODEBOOK, {})
    with pytest.raises(ArtefactError, match="trained on codebook cccccccccccc, the codes are of codebook dddddddddddd"):
        load_model(tmp_path / "dmqn", "d" * 64)


@pytest.mark.parametrize("damage", ["flipped", "cut", "no tensors", "no manifest", "no json", "old"])
def test_damage_is_a_sentence(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "dmqn"
    save_model(folder, some_model(), INPUTS, CODEBOOK, {})
    content, manifest = (folder / TENSORS).read_bytes(), folder / "manifest.json"
    if damage == "flipped":
        (folder / TENSORS).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        (folder / TENSORS).write_bytes(content[: len(content) // 2])
    elif damage == "no tensors":
        (folder / TENSORS).unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "no json":
        manifest.write_text("{")
    else:
        manifest.write_text(json.dumps({"shape": {}, "items": []}))
    with pytest.raises(ArtefactError, match="Train it again"):
        load_model(folder)


EVENTS = [
    Event(user, ts, (7 * user + 3 * ts) % 40, (user + ts) % 2, example=ts > 1) for user in range(6) for ts in range(10)
]


def item_of(event: Event) -> dict[str, Any]:
    return {
        "item_id": f"i{event.item}",
        "ts": event.ts,
        "codes": codes_of(event.item),
        "weights": weights_of(event.item),
    }


def pyfunc_rows() -> pd.DataFrame:
    """The impressions of the test split, as `predict` takes them, from a loop over the events."""
    rows: list[dict[str, Any]] = []
    table = pa.Table.from_batches([user_rows(events_batch(EVENTS), INPUTS.history)]).to_pylist()
    features = {
        (row["user_id"], one["ts"]): one["features"] for row in table for one in row["impressions"]
    }  # one impression a user and moment
    for event in EVENTS:
        if event.split == "test":
            clicks = [e for e in EVENTS if e.user == event.user and e.ts < event.ts and e.label]
            history = [item_of(click) for click in clicks]
            rows.append({**item_of(event), "history": history, "features": features[f"u{event.user}", event.ts]})
    return pd.DataFrame(rows)


@pytest.mark.parametrize("inputs", [INPUTS, PIECES], ids=["soft", "pieces"])
def test_the_pyfunc_scores_as_training_does(inputs: ModelInputs, tmp_path: Path) -> None:
    """It is given the whole history and cuts it itself."""
    pytest.importorskip("mlflow")
    from jobs.ctr.dmqn_model import DMQNModel

    folder = tmp_path / "dmqn"
    save_model(folder, some_model(inputs), inputs, CODEBOOK, {})
    pyfunc = DMQNModel()
    pyfunc.load_context(type("Context", (), {"artifacts": {"artefact": str(folder)}}))
    got = pyfunc.predict(None, pyfunc_rows())
    users = UserTable.of(pa.Table.from_batches([user_rows(events_batch(EVENTS), inputs.history)]), "test", inputs)
    with torch.no_grad():
        expected = some_model(inputs)(users.batch(np.arange(len(users.number)))).sigmoid().numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert np.ptp(expected) > 1e-3
    assert pyfunc.predict(None, pyfunc_rows().iloc[:0]).shape == (0,)
    with pytest.raises(ValueError, match=r"lacks the columns \['history'\]"):
        pyfunc.predict(None, pyfunc_rows().drop(columns="history"))
