"""The facts of a night as JSON, and its summary, where a gate refused or did not."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest

from jobs.ctr.train_result import TrainResult
from jobs.encode import EncodeResult
from jobs.evaluate import EvaluateResult
from jobs.load import LoadResult
from jobs.warehouse.releases import PROMOTED, Release
from pipelines.nightly import Night
from pipelines.promote import PromoteResult
from pipelines.report import facts, print_summary

DAY = date(2026, 1, 1)
METRICS = ("rmse", "utilization", "perplexity", "distinct", "distinct_ids", "items", "largest_collision")
CODEBOOK_REASON, CTR_REASON = "rmse is 1.2 times the champion's", "auc -0.0100 (-0.0120 to -0.0080)"


def night(*, codebook_reasons: tuple[str, ...] = (), trained: TrainResult | None = None) -> Night:
    """After a refit to codebook version 2 over release 1, of codebook version 1."""
    passed = not codebook_reasons
    hashes = {1: "a" * 64, 2: "b" * 64}
    version = 2 if passed else 1
    release = Release(version, version, hashes[version], {}, None, PROMOTED, datetime(2026, 1, 1, tzinfo=UTC))
    evaluated = EvaluateResult(
        codebook_version=2,
        run_id="r",
        passed=passed,
        reasons=codebook_reasons,
        metrics=dict.fromkeys((*METRICS, "neighbour_recall"), 1.0),
        least_certain=(),
        table_versions={},
        judged_against=1,
    )
    return Night(
        run_date=DAY,
        log=None,
        loaded=LoadResult(rows_in=3, rows_stored=3, rows_rejected=0, new=3, changed=0, reasons={}, version=1),
        refit_because="due",
        fitted=None,
        encoded=EncodeResult(codebook_version=2, encoded=3, completed=0, version=1, embeddings_version=1),
        evaluated=evaluated,
        promoted=PromoteResult(release),
        gate_message=None if passed else f"codebook version 2 did not pass: {CODEBOOK_REASON}",
        trained=trained,
        seconds={},
    )


REFUSED = TrainResult(version=5, auc=0.6, champion=4, reasons=(CTR_REASON,))
ACCEPTED = TrainResult(version=5, auc=0.6)
KEYS = ("verdict", "reasons", "champion_version", "ctr_version", "ctr_verdict", "ctr_reasons")


@pytest.mark.parametrize(
    ("codebook_reasons", "trained", "expected", "refusals"),
    [
        ((), ACCEPTED, ("passed", [], 2, 5, "passed", []), 0),
        ((), REFUSED, ("passed", [], 2, 5, "failed", [CTR_REASON]), 1),
        ((CODEBOOK_REASON,), None, ("failed", [CODEBOOK_REASON], 1, None, None, []), 1),
        ((), TrainResult(note="the log has no rows"), ("passed", [], 2, None, None, []), 0),
    ],
    ids=["both pass", "the CTR model is refused", "the codebook is refused", "nothing to train on"],
)
def test_the_facts_say_which_gate_refused_and_why(
    codebook_reasons: tuple[str, ...], trained: TrainResult | None, expected: tuple[Any, ...], refusals: int
) -> None:
    done = night(codebook_reasons=codebook_reasons, trained=trained)
    written = json.loads(json.dumps(facts(done, "w", Path("p"), 1.0), allow_nan=False))
    assert tuple(written[key] for key in KEYS) == expected
    assert len(done.refusals) == refusals  # with any, the command exits with 3
    assert not written["nothing_to_do"]


@pytest.mark.parametrize(
    ("result", "shown"),
    [
        (
            TrainResult(version=5, auc_cold=0.61, cold_impressions=1234, cold_clicks=300),
            "0.6100 (1,234 impressions, 300 clicks)",
        ),
        (TrainResult(version=5, cold_impressions=6, cold_clicks=2), "undefined (6 impressions, 2 clicks)"),
    ],
)
def test_a_cold_auc_is_shown_with_what_it_rests_on(
    result: TrainResult, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    done = night(trained=result)
    print_summary(done, "w", Path("p"), 1.0, 1.0)
    assert f"AUC of rarely shown items {shown}" in " ".join(capsys.readouterr().out.split())
    written = facts(done, "w", Path("p"), 1.0)
    assert (written["auc_cold"], written["cold_impressions"]) == (result.auc_cold, result.cold_impressions)
