"""Codebooks on disk, semantic IDs as text, quality by hand, and the gate."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data import topics
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenizer import (
    RQGMM,
    CodebookError,
    DataError,
    Thresholds,
    check_gate,
    fit_rqgmm,
    level_tokens,
    level_usage,
    load_codebook,
    neighbour_recall,
    parse,
    save_codebook,
    text_of,
    tokens,
)

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


BYTES = st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4)
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([0, -1, 2**63, 10**30, True, 2.0, "2"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    field=st.sampled_from(["format", "levels", "components", "dim", "beam", "hash", "fusion", ""]),
    value=ANYTHING,
    missing=st.booleans(),
)
def test_any_value_of_any_manifest_field_gives_the_codebook_or_a_codebook_error(
    rqgmm: RQGMM, tmp_path: Path, field: str, value: Any, missing: bool
) -> None:
    name = save_codebook(tmp_path, rqgmm, {"fusion": {"a": 1}})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    changed: Any = value if not field else {**manifest, field: value}
    if field and missing:
        del changed[field]
    (tmp_path / "manifest.json").write_text(json.dumps(changed))
    same = isinstance(changed, dict) and {**manifest, **changed} == manifest and (field == "beam" or field in changed)
    with suppress(CodebookError):
        loaded = load_codebook(tmp_path)
        assert loaded.hash == name
        assert same or field in ("fusion", "beam")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    file=st.sampled_from(["codebook.safetensors", "manifest.json"]),
    flips=BYTES,
    length=st.none() | st.integers(0, 2000),
)
def test_any_damage_to_the_bytes_gives_the_codebook_or_a_codebook_error(
    rqgmm: RQGMM, tmp_path: Path, file: str, flips: list[tuple[int, int]], length: int | None
) -> None:
    name = save_codebook(tmp_path, rqgmm, {"items": 200})
    data = bytearray((tmp_path / file).read_bytes())
    for position, mask in flips:
        data[position % len(data)] ^= mask
    (tmp_path / file).write_bytes(data[:length])
    with suppress(CodebookError):
        loaded = load_codebook(
            tmp_path
        )  # damage that the hash does not cover, such as to the number of items or a space
        assert loaded.hash == name
        assert torch.equal(loaded.rqgmm.levels[1].means, rqgmm.levels[1].means)


@pytest.mark.parametrize(
    "dtype",
    [
        *("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "C64"),
        *("I64", "I32", "I16", "I8", "U8", "U16", "U32", "U64", "BOOL", "X"),
    ],
)
def test_tensors_of_another_type_are_refused(rqgmm: RQGMM, tmp_path: Path, dtype: str) -> None:
    save_codebook(tmp_path, rqgmm, {})
    data = (tmp_path / "codebook.safetensors").read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")].replace(b'"F32"', json.dumps(dtype).encode(), 1)
    (tmp_path / "codebook.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + data[8 + int.from_bytes(data[:8], "little") :]
    )
    if dtype == "F32":
        assert load_codebook(tmp_path).rqgmm.components == 4
    else:
        with pytest.raises(CodebookError):
            load_codebook(tmp_path)


@pytest.mark.parametrize("text", ["", "[" * 100_000, '{"format": 1e999}', '{"levels": NaN}', "null", "\ud800"])
def test_a_manifest_that_is_none_is_refused(rqgmm: RQGMM, tmp_path: Path, text: str) -> None:
    save_codebook(tmp_path, rqgmm, {})
    (tmp_path / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CodebookError):
        load_codebook(tmp_path)


def test_folders_in_place_of_files_are_refused(rqgmm: RQGMM, tmp_path: Path) -> None:
    for file in ("codebook.safetensors", "manifest.json"):
        save_codebook(tmp_path / file, rqgmm, {})
        (tmp_path / file / file).unlink()
        (tmp_path / file / file).mkdir()
        with pytest.raises(CodebookError, match=f"has no file {file}"):
            load_codebook(tmp_path / file)
    with pytest.raises(CodebookError, match="has no file"):
        load_codebook(tmp_path / "nothing here")


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


@pytest.mark.parametrize(
    "text", ["", "1", "1-2-0", "1-2-3-4", "a-b", "1--2", "-1-2", "01-2", "1-\u0663", "1-2\n", "1-" + "9" * 5000]
)
def test_what_is_not_a_semantic_id_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="not a semantic ID of 2 levels"):
        parse(text, 2)


def test_the_tokens_of_a_level_come_after_padding_and_the_levels_before() -> None:
    assert tokens(torch.tensor([[1, 2], [0, 3]]), 4).tolist() == [[2, 7], [1, 8]]
    assert tokens(torch.tensor([[[1, 0], [2, 3]]]), 4).tolist() == [[[2, 1], [7, 8]]]
    assert [level_tokens(level, 4) for level in range(2)] == [slice(1, 5), slice(5, 9)]


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
    assert verdict.reasons == ("utilization is 0.4, the limit is >= 0.5", "churn is 0.3, the limit is <= 0.1")
    assert not check_gate({**GOOD, "rmse": 1.2}, LIMITS, {"rmse": 1.0}).passed
    assert not check_gate({**GOOD, "rmse": float("nan")}, LIMITS, {"rmse": 1.0}).passed


@given(st.dictionaries(st.sampled_from(sorted(GOOD)), st.floats(0, 2), min_size=1), st.floats(0, 1))
def test_a_better_report_never_fails_where_a_worse_one_passed(worse: dict[str, float], by: float) -> None:
    report = {**GOOD, **worse}
    sign = {name: 1 if name in ("utilization", "perplexity", "distinct") else -1 for name in GOOD}
    better = {name: value + sign[name] * by for name, value in report.items()}
    baseline = {"rmse": 1.0}
    assert check_gate(better, LIMITS, baseline).passed or not check_gate(report, LIMITS, baseline).passed
