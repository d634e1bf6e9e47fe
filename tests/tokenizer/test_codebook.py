"""Codebooks on disk, semantic IDs as text, quality by hand, and the gate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from data import topics
from hypothesis import given
from hypothesis import strategies as st

from tokenizer import (
    RQGMM,
    CodebookError,
    DataError,
    Thresholds,
    check_gate,
    fit_rqgmm,
    level_usage,
    load_codebook,
    neighbour_recall,
    parse,
    save_codebook,
    text_of,
    tokens,
)  # fmt: skip

LIMITS = Thresholds(
    min_utilization=0.5,
    min_perplexity=0.2,
    min_distinct=0.1,
    max_collision_share=0.1,
    max_rmse_ratio=1.05,
    max_churn=0.1,
)
GOOD = {
    "utilization": 0.9,
    "perplexity": 0.8,
    "distinct": 0.6,
    "largest_collision_share": 0.01,
    "rmse": 1.0,
    "churn": 0.02,
}


@pytest.fixture(scope="module")
def rqgmm() -> RQGMM:
    return fit_rqgmm(torch.from_numpy(topics(200, 6)), levels=2, components=4, seed=0, iterations=5).rqgmm


def test_a_codebook_comes_back_as_it_was_saved(rqgmm: RQGMM, tmp_path: Path) -> None:
    name = save_codebook(tmp_path, rqgmm, {"fusion": {"a": 1}, "items": 200})
    loaded = load_codebook(tmp_path, expect_hash=name)
    x = torch.from_numpy(topics(50, 6, seed=5))
    assert torch.equal(loaded.rqgmm.encode(x), rqgmm.encode(x))
    assert (loaded.hash, loaded.manifest["items"]) == (name, 200)


def test_the_hash_names_the_content(rqgmm: RQGMM, tmp_path: Path) -> None:
    one = save_codebook(tmp_path / "a", rqgmm, {"items": 1})
    assert save_codebook(tmp_path / "b", rqgmm, {"items": 2}) == one  # the same codes for every item
    assert save_codebook(tmp_path / "c", rqgmm, {"fusion": {"weights": 2}}) != one
    assert save_codebook(tmp_path / "d", RQGMM(rqgmm.levels[::-1]), {"items": 1}) != one


def test_the_beam_is_part_of_the_codebook(rqgmm: RQGMM, tmp_path: Path) -> None:
    greedy = save_codebook(tmp_path / "greedy", rqgmm, {})
    assert save_codebook(tmp_path / "beam", RQGMM(rqgmm.levels, beam=3), {}) != greedy
    assert load_codebook(tmp_path / "beam").rqgmm.beam == 3


@pytest.mark.parametrize("file", ["codebook.safetensors", "manifest.json"])
def test_a_damaged_codebook_is_refused(file: str, rqgmm: RQGMM, tmp_path: Path) -> None:
    save_codebook(tmp_path, rqgmm, {})
    data = bytearray((tmp_path / file).read_bytes())
    data[-20] ^= 0xFF
    (tmp_path / file).write_bytes(data)
    with pytest.raises(CodebookError, match="Fetch it again"):
        load_codebook(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(CodebookError, match="Was it copied whole"):
        load_codebook(tmp_path)


def test_another_content_than_expected_is_refused(rqgmm: RQGMM, tmp_path: Path) -> None:
    save_codebook(tmp_path, rqgmm, {})
    with pytest.raises(CodebookError, match="the caller expects aaaaaaaaaaaa"):
        load_codebook(tmp_path, expect_hash="a" * 64)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(CodebookError, match="format is 99"):
        load_codebook(tmp_path)


@given(codes=st.lists(st.integers(0, 9999), min_size=1, max_size=5), suffix=st.integers(0, 999))
def test_text_and_codes_agree(codes: list[int], suffix: int) -> None:
    assert parse(text_of(codes, suffix), len(codes)) == (tuple(codes), suffix)


@pytest.mark.parametrize("text", ["", "1", "1-2-0", "1-2-3-4", "a-b", "1--2", "-1-2"])
def test_what_is_not_a_semantic_id_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="not a semantic ID of 2 levels"):
        parse(text, 2)


def test_tokens_are_offset_by_level() -> None:
    assert tokens(torch.tensor([[1, 2], [0, 3]]), 4).tolist() == [[1, 6], [0, 7]]


def test_usage_by_hand() -> None:
    even, single, half = level_usage(torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0], [10, 10, 0, 0]]))
    assert (even.utilization, even.perplexity, even.dead, even.gini) == pytest.approx((1, 1, 0, 0))
    assert (single.utilization, single.perplexity, single.dead, single.gini) == pytest.approx((0.25, 0.25, 3, 0.75))
    assert (half.utilization, half.perplexity, half.dead, half.gini) == pytest.approx((0.5, 0.5, 2, 0.5))


def test_neighbour_recall_is_the_slow_loop() -> None:
    x, x_hat = topics(40, 5, spread=1.0), topics(40, 5, spread=1.0, seed=1)

    def nearest(rows: np.ndarray, n: int) -> set[int]:
        return set(
            np.argsort([np.inf if m == n else ((rows[m] - rows[n]) ** 2).sum() for m in range(len(rows))])[:10].tolist()
        )

    slow = np.mean([len(nearest(x, n) & nearest(x_hat, n)) / 10 for n in range(40)])
    assert neighbour_recall(torch.from_numpy(x), torch.from_numpy(x_hat)) == pytest.approx(slow)
    assert neighbour_recall(torch.from_numpy(x), torch.from_numpy(x)) == 1.0


def test_the_gate_names_both_numbers() -> None:
    assert check_gate(GOOD, LIMITS).passed
    verdict = check_gate({**GOOD, "utilization": 0.4, "churn": 0.3}, LIMITS)
    assert verdict.reasons == ("utilization is 0.4, the gate wants >= 0.5", "churn is 0.3, the gate wants <= 0.1")
    assert not check_gate({**GOOD, "rmse": 1.2}, LIMITS, {"rmse": 1.0}).passed
    assert not check_gate({**GOOD, "rmse": float("nan")}, LIMITS, {"rmse": 1.0}).passed


@given(st.dictionaries(st.sampled_from(sorted(GOOD)), st.floats(0, 2), min_size=1), st.floats(0, 1))
def test_a_better_report_never_fails_where_a_worse_one_passed(worse: dict[str, float], by: float) -> None:
    report = {**GOOD, **worse}
    sign = {name: 1 if name in ("utilization", "perplexity", "distinct") else -1 for name in GOOD}
    better = {name: value + sign[name] * by for name, value in report.items()}
    baseline = {"rmse": 1.0}
    assert check_gate(better, LIMITS, baseline).passed or not check_gate(report, LIMITS, baseline).passed
