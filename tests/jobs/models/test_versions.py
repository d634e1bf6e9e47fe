"""Registered versions: what is written as tags is read back, and what is missing is named. Without a registry."""

from __future__ import annotations

from dataclasses import replace
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.models.versions import (
    LOST_TAG,
    CodebookVersion,
    CtrVersion,
    RegisteredVersion,
    RegistryMismatch,
    ctr_tags,
)

COUNTS = st.integers(1, 10**6)
HASHES = st.text("0123456789abcdef", min_size=1, max_size=64)
TABLE_VERSIONS = st.dictionaries(st.text(min_size=1, max_size=20), st.integers(0, 10**9), max_size=3)
DATES = st.dates(date(2000, 1, 1), date(2100, 1, 1))
CODEBOOKS = st.builds(
    CodebookVersion,
    number=COUNTS,
    hash=HASHES,
    levels=COUNTS,
    components=COUNTS,
    dim=COUNTS,
    method=st.sampled_from(["annealed", "em", "kmeans"]),
    fit_key=st.text(max_size=20),
    started_from=st.none() | HASHES,
    started_from_version=st.none() | COUNTS,
    table_versions=TABLE_VERSIONS,
    run_date=DATES,
    name=st.just("semantic-id-codebook"),
    run_id=HASHES,
)
CODEBOOK = CodebookVersion(
    number=3,
    hash="a" * 64,
    levels=2,
    components=4,
    dim=6,
    method="em",
    fit_key="key",
    started_from=None,
    started_from_version=None,
    table_versions={"item_embeddings": 2},
    run_date=date(2026, 1, 1),
    name="semantic-id-codebook",
    run_id="run",
)
RESULT = {"auc": 0.7, "dropped": {"null_item": 1}, "note": "a note", "version": None}
CTR_TAGS = ctr_tags(
    codebook=CODEBOOK,
    train_key="key",
    passed=True,
    table_versions={"semantic_ids": 5},
    run_date=date(2026, 1, 2),
    result=RESULT,
)


def registered(tags: dict[str, str], number: int = 3) -> RegisteredVersion:
    return RegisteredVersion("semantic-id-codebook", number, "run", tags)


@given(codebook=CODEBOOKS)
def test_a_codebook_version_is_read_back_from_its_tags(codebook: CodebookVersion) -> None:
    tags = codebook.tags()
    assert all(isinstance(value, str) for value in tags.values())
    version = RegisteredVersion(codebook.name, codebook.number, codebook.run_id, tags)
    assert CodebookVersion.of(version) == codebook
    assert version.codebook_hash == codebook.hash


@pytest.mark.parametrize("tag", ["codebook_hash", "levels", "components", "dim", "run_date"])
def test_a_codebook_version_without_a_tag_is_an_error_that_names_it(tag: str) -> None:
    tags = {name: value for name, value in CODEBOOK.tags().items() if name != tag}
    missing = "shape" if tag == "levels" else tag  # the tag that earlier releases wrote instead of three
    with pytest.raises(RegistryMismatch, match=rf"semantic-id-codebook version 3 .* has no tag '{missing}'"):
        CodebookVersion.of(registered(tags))


def test_tags_of_earlier_releases_are_read() -> None:
    tags = {"codebook_hash": "a" * 64, "shape": "2x4x6", "run_date": "2026-01-01"}
    expected = replace(CODEBOOK, method="annealed", fit_key="", table_versions={})
    assert CodebookVersion.of(registered(tags)) == expected


def test_a_version_whose_files_are_gone_is_no_codebook() -> None:
    version = registered({**CODEBOOK.tags(), LOST_TAG: "its files are gone"})
    assert version.lost
    with pytest.raises(RegistryMismatch, match=r"codebook version 3 only reserves its number .* See `sid status`"):
        CodebookVersion.of(version)


def test_a_ctr_version_is_read_back_from_its_tags_and_names_its_codebook() -> None:
    version = CtrVersion.of(RegisteredVersion("dmqn-ctr", 7, "run", CTR_TAGS))
    assert (version.number, version.name, version.run_id) == (7, "dmqn-ctr", "run")
    assert (version.codebook_version, version.codebook_hash) == (CODEBOOK.number, CODEBOOK.hash)
    assert (version.train_key, version.passed, version.table_versions) == ("key", True, {"semantic_ids": 5})
    assert (version.run_date, version.result) == (date(2026, 1, 2), RESULT)


@pytest.mark.parametrize("verdict", ["failed", None])
def test_a_ctr_version_that_no_gate_has_passed_is_not_passed(verdict: str | None) -> None:
    """Also those from before there was a gate."""
    tags = {name: value for name, value in CTR_TAGS.items() if name != "verdict"} | (
        {"verdict": verdict} if verdict else {}
    )
    assert not CtrVersion.of(RegisteredVersion("dmqn-ctr", 7, "run", tags)).passed


@pytest.mark.parametrize("tag", ["codebook_hash", "codebook_version", "run_date"])
def test_a_ctr_version_without_a_tag_is_an_error_that_names_it(tag: str) -> None:
    tags = {name: value for name, value in CTR_TAGS.items() if name != tag}
    with pytest.raises(RegistryMismatch, match=f"dmqn-ctr version 7 .* has no tag '{tag}'"):
        CtrVersion.of(RegisteredVersion("dmqn-ctr", 7, "run", tags))
