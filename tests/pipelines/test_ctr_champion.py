"""The CTR champion over nights: a worse model is refused, one of a new codebook compared; rollback moves it back."""

from __future__ import annotations

from datetime import date

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from warehouse import CLICKS, ITEMS, WITHOUT_TRAINING, Progress, SmallWarehouse

from jobs import cache
from jobs.ctr.artefact import ArtefactError, load_model
from jobs.ctr.champion import ctr_champion, load_ctr
from jobs.ctr.example_table import most_shown_codes
from jobs.ctr.examples import PART
from jobs.ctr.pieces import learn
from jobs.ctr.train_result import TrainResult
from jobs.models.registry import CANDIDATE, CHAMPION
from jobs.warehouse.tables import CTR_EXAMPLES
from pipelines.promote import rollback

LEARNS = ("train.learning_rate=0.01", "train.epochs=2", "train.batch_positions=200", "train.warm_start=true")


def write_clicks(small: SmallWarehouse, heavy: int = 0) -> str:
    """A log in which half of the items are clicked by nearly everybody, and the others by nearly nobody.

    One user has `heavy` rows more than the others.
    """
    g = np.random.default_rng(1)
    rows = CLICKS + heavy
    item = g.integers(ITEMS, size=rows)
    columns = {
        "user_id": g.permutation(np.append(g.integers(60, size=CLICKS), np.full(heavy, 60))),
        "item_id": item,
        "timestamp": np.sort(g.integers(10**6, size=rows)),
        "label": (g.random(rows) < np.where(item % 2, 0.9, 0.1)).astype(int),
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
    assert abs(refit.differences["auc"].mean) < 0.05
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


@pytest.mark.slow
def test_a_refused_model_is_judged_again_and_every_champion_reads_its_own_history(small: SmallWarehouse) -> None:
    """The test impressions of the user with the most are in a part of their own, with the behaviours that they need."""
    models, log = small.registry.ctr_models, write_clicks(small, heavy=PART + PART // 8)
    learns, worse = (log, *LEARNS, "train.history=200"), (log, "train.learning_rate=1e-9", "train.history=5")
    loose = [f"ctr_gate.{name}=100" for name in ("max_log_loss_rise", "max_calibration_drift")]
    loose.append("ctr_gate.max_auc_drop=1")

    def trained(*settings: str) -> TrainResult:
        result = small.night(date(2026, 1, 2), *settings).trained
        assert result is not None
        assert result.auc is not None
        return result

    def assert_compared_with(result: TrainResult, champion: TrainResult) -> None:
        """The champion scores the impressions as in the night that trained it, though its history is longer."""
        assert result.champion == champion.version
        assert result.auc is not None
        assert result.auc - result.differences["auc"].mean == pytest.approx(champion.auc, abs=1e-5)
        assert result.champion_calibration == pytest.approx(champion.calibration, rel=1e-6)

    good = trained(*learns)
    bad = trained(*worse)
    assert (bad.version, bad.passed) == (3, False)
    assert_compared_with(bad, good)

    other = trained(*learns, "train.seed=1", *loose)
    assert models.alias(CHAMPION) == other.version == 4
    again = trained(*worse)
    assert (again.version, again.passed, again.auc) == (3, False, bad.auc)
    assert_compared_with(again, other)
    assert "Version 4 stays" in str(again.refusal)

    accepted = trained(*worse, *loose)
    assert (accepted.version, accepted.passed, accepted.refusal) == (3, True, None)
    assert models.alias(CHAMPION) == 3
    assert list(models.versions()) == [1, 2, 3, 4]
    assert small.night(date(2026, 1, 2), *worse).nothing_to_do


@pytest.mark.slow
def test_nights_with_learned_pieces(small: SmallWarehouse) -> None:
    """They are learned from training impressions, stored with the model, started from, and read by a later
    comparison.
    """
    pieces = ("train.tokens=pieces", "train.token_rows=60", "train.warm_start=true")
    progress = Progress()
    first = small.night(date(2026, 1, 2), *pieces, progress=progress).trained
    assert first is not None
    assert (first.version, first.champion, first.started_from) == (2, 1, 1)
    assert any(note.startswith("learned ") for note in progress.notes)
    version = small.registry.ctr_models.version(2)
    assert version is not None
    ctr = load_ctr(small.registry, version)
    scheme = ctr.inputs.scheme
    assert scheme is not None
    assert scheme.pieces is not None
    assert 32 < len(scheme.pieces) < 60
    counted = most_shown_codes(small.tables, small.tables.version(CTR_EXAMPLES), 2)
    assert scheme.pieces == learn(*counted, 16, 59)

    again = small.night(date(2026, 1, 2), *pieces).trained
    assert again is not None
    assert (again.version, again.nothing_to_do) == (2, True)

    codebook = small.registry.codebooks.with_alias(CHAMPION)
    assert codebook is not None
    cached = cache.run(small.config(), small.tables, small.registry, codebook, print)
    assert (cached.ctr_version, cached.users) == (2, 60)

    soft = small.night(date(2026, 1, 3), "train.warm_start=true").trained
    assert soft is not None
    assert (soft.version, soft.champion, soft.started_from) == (3, 2, 2)


def test_a_model_and_a_codebook_that_do_not_belong_together_refuse_to_load(small: SmallWarehouse) -> None:
    version = small.registry.ctr_models.with_alias(CHAMPION)
    assert version is not None
    folder = small.registry.download(version, small.root / "download") / "artifacts" / "dmqn"
    assert load_model(folder, small.release.codebook_hash).codebook_hash == small.release.codebook_hash
    with pytest.raises(ArtefactError, match="expected one codebook"):
        load_model(folder, "0" * 64)
