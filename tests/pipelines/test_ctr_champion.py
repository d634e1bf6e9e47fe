"""The CTR champion over nights: a worse model is refused, one of a new codebook compared; rollback moves it back."""

from __future__ import annotations

from datetime import date

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from warehouse import CLICKS, ITEMS, WITHOUT_TRAINING, Progress, SmallWarehouse

from jobs.ctr.artefact import ArtefactError, load_model
from jobs.ctr.champion import ctr_champion, load_ctr
from jobs.models.registry import CANDIDATE, CHAMPION
from pipelines.promote import rollback

LEARNS = ("train.learning_rate=0.01", "train.epochs=2", "train.batch_positions=200", "train.warm_start=true")


def write_clicks(small: SmallWarehouse) -> str:
    """A log in which half of the items are clicked by nearly everybody, and the others by nearly nobody."""
    g = np.random.default_rng(1)
    item = g.integers(ITEMS, size=CLICKS)
    columns = {
        "user_id": g.integers(60, size=CLICKS),
        "item_id": item,
        "timestamp": np.sort(g.integers(10**6, size=CLICKS)),
        "label": (g.random(CLICKS) < np.where(item % 2, 0.9, 0.1)).astype(int),
    }
    path = small.root / "clicks.parquet"
    pq.write_table(pa.table(columns), path)
    return f"train.interactions={path}"


@pytest.mark.slow
def test_the_ctr_champion_follows_gate_and_codebook(small: SmallWarehouse) -> None:
    models = small.registry.ctr_models
    assert models.alias(CHAMPION) == models.alias(CANDIDATE) == 1
    log = write_clicks(small)

    good = small.night(date(2026, 1, 2), log, *LEARNS).trained
    assert good is not None
    assert good.auc is not None
    assert good.auc > 0.7
    assert (good.version, good.champion, good.started_from, good.passed) == (2, 1, 1, True)
    assert models.alias(CHAMPION) == 2

    night = small.night(date(2026, 1, 3), log, "train.learning_rate=1e-9")
    bad = night.trained
    assert bad is not None
    assert (bad.version, bad.champion, bad.started_from, bad.passed) == (3, 2, None, False)
    assert any(reason.startswith("auc -0.") for reason in bad.reasons)
    assert (models.alias(CHAMPION), models.alias(CANDIDATE)) == (2, 3)
    assert "CTR model version 3 did not pass the gate" in night.refusals[0]
    assert "Version 2 stays" in night.refusals[0]
    assert small.night(date(2026, 1, 3), log, "train.learning_rate=1e-9").refusals == night.refusals

    first_codebook = small.release.codebook_hash
    small.write_items(ITEMS + 50)
    progress = Progress()
    refit = small.night(date(2026, 2, 10), log, *LEARNS, progress=progress).trained
    assert refit is not None
    assert small.release.codebook_version == 2
    assert (refit.version, refit.champion, refit.started_from, refit.passed) == (4, 2, 2, True)
    note = (
        f"starting from CTR model version 2, with tokens for the codes of {ITEMS + 50} items that both codebooks know"
    )
    assert note in progress.notes
    version = models.version(4)
    assert version is not None
    assert version.started_from == 2
    again = small.night(date(2026, 2, 10), log, *LEARNS).trained
    assert again is not None
    assert (again.version, again.started_from, again.nothing_to_do) == (4, 2, True)
    assert abs(refit.differences["auc"]["mean"]) < 0.05
    assert models.alias(CHAMPION) == 4

    back = rollback(small.tables, small.registry)
    assert back.release.codebook_hash == first_codebook
    assert back.ctr_version == 2
    assert models.alias(CHAMPION) == 2
    champion = ctr_champion(small.registry, first_codebook)
    assert champion is not None
    assert load_ctr(small.registry, champion).codebook_hash == first_codebook

    models.set_alias(CHAMPION, 4)  # as a kill between the release and the alias leaves it
    small.night(date(2026, 2, 11), WITHOUT_TRAINING)
    assert models.alias(CHAMPION) == 2


def test_a_model_and_a_codebook_that_do_not_belong_together_refuse_to_load(small: SmallWarehouse) -> None:
    version = small.registry.ctr_models.with_alias(CHAMPION)
    assert version is not None
    folder = small.registry.download(version, small.root / "download") / "artifacts" / "dmqn"
    assert load_model(folder, small.release.codebook_hash).codebook_hash == small.release.codebook_hash
    with pytest.raises(ArtefactError, match="expected one codebook"):
        load_model(folder, "0" * 64)
