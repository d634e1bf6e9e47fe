"""Registered model versions with typed fields, built from the tags that MLflow keeps as text.

This is the only module that knows the names and the text form of the tags.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

WAREHOUSE_TAG = "warehouse_id"  # on every version: the warehouse that registered it
LOST_TAG = "lost"  # on a version that only reserves its number: its files are gone


class RegistryMismatch(RuntimeError):
    """Registry, releases, codebook files and rows of a warehouse differ about a codebook."""


@dataclass(frozen=True)
class RegisteredVersion:
    """A version of either model as it is stored in MLflow."""

    name: str  # registered name
    number: int
    run_id: str
    tags: Mapping[str, str]

    @property
    def codebook_hash(self) -> str:
        """Hash of the codebook that the version is or was trained on; empty without the tag."""
        return self.tags.get("codebook_hash", "")

    @property
    def warehouse(self) -> str | None:
        """Id of the warehouse that registered the version; None if a development version before 0.1.0 did."""
        return self.tags.get(WAREHOUSE_TAG)

    @property
    def lost(self) -> bool:
        """Whether the version only reserves its number."""
        return LOST_TAG in self.tags

    def required(self, tag: str) -> str:
        """The text of a tag.

        Raises:
            RegistryMismatch: the version does not have it.
        """
        if not self.tags.get(tag):
            raise RegistryMismatch(
                f"{self.name} version {self.number} in the MLflow registry has no tag {tag!r}; expected a version that "
                "`sid fit`, `sid train` or `sid register` registered. Set mlflow.catalogue=NAME if the name is used "
                "by other software too"
            )
        return self.tags[tag]


@dataclass(frozen=True)
class CodebookVersion:
    """A registered codebook. `hash` is its content; `number` is its version in the registry and in the tables."""

    number: int
    hash: str
    levels: int
    components: int
    dim: int
    method: str
    fit_key: str  # identifies the inputs of the fit: equal keys, equal codebooks
    started_from: str | None  # hash of the codebook that the fit started from
    started_from_version: int | None
    table_versions: Mapping[str, int]  # of the tables that it was fitted on
    run_date: date
    name: str  # registered name
    run_id: str  # of MLflow

    @classmethod
    def of(cls, registered: RegisteredVersion) -> CodebookVersion:
        """The codebook with these tags, in their present form or in that of development versions before 0.1.0.

        Raises:
            RegistryMismatch: its files are gone, or a tag is missing.
        """
        if registered.lost:
            raise RegistryMismatch(
                f"codebook version {registered.number} only reserves its number in the registry, its files are gone; "
                "expected a version with a codebook. See `sid status`"
            )
        tags = registered.tags
        if "levels" in tags:
            levels, components, dim = (int(registered.required(tag)) for tag in ("levels", "components", "dim"))
        else:  # "2x128x96"
            levels, components, dim = (int(part) for part in registered.required("shape").split("x"))
        started_from_version = tags.get("started_from_version")
        return cls(
            number=registered.number,
            hash=registered.required("codebook_hash"),
            levels=levels,
            components=components,
            dim=dim,
            method=tags.get("method", "annealed"),  # the only method before the tag existed
            fit_key=tags.get("fit_key", ""),
            started_from=tags.get("started_from") or None,
            started_from_version=int(started_from_version) if started_from_version else None,
            table_versions=json.loads(tags.get("table_versions", "{}")),
            run_date=date.fromisoformat(registered.required("run_date")),
            name=registered.name,
            run_id=registered.run_id,
        )

    def tags(self) -> dict[str, str]:
        """The tags with which the same codebook can be registered again."""
        return codebook_tags(
            codebook_hash=self.hash,
            levels=self.levels,
            components=self.components,
            dim=self.dim,
            method=self.method,
            fit_key=self.fit_key,
            started_from=self.started_from,
            started_from_version=self.started_from_version,
            table_versions=self.table_versions,
            run_date=self.run_date,
        )


def codebook_tags(
    *,
    codebook_hash: str,
    levels: int,
    components: int,
    dim: int,
    method: str,
    fit_key: str,
    started_from: str | None,
    started_from_version: int | None,
    table_versions: Mapping[str, int],
    run_date: date,
) -> dict[str, str]:
    """The tags of a registered codebook, which `CodebookVersion.of` reads."""
    return {
        "codebook_hash": codebook_hash,
        "levels": str(levels),
        "components": str(components),
        "dim": str(dim),
        "method": method,
        "fit_key": fit_key,
        "started_from": started_from or "",
        "started_from_version": str(started_from_version or ""),
        "table_versions": json.dumps(dict(table_versions), sort_keys=True),
        "run_date": run_date.isoformat(),
    }


PASSED, FAILED = "passed", "failed"  # tag `verdict` of a CTR model
NEVER = "0001-01-01T00:00:00+00:00"


@dataclass(frozen=True)
class CtrVersion:
    """A registered CTR model, and the codebook and tables that it was trained on."""

    number: int
    codebook_hash: str
    codebook_version: int
    train_key: str  # identifies data and settings of the training, not the model that it started from
    passed: bool  # the gate, against the champion of its time; false for models from before there was one
    judged_at: datetime  # when it last passed or failed; the year 1 for models from before it was kept
    started_from: int | None  # number of the model whose parameters its training started from
    table_versions: Mapping[str, int]
    run_date: date
    result: Mapping[str, Any]  # metrics and counts of the training
    name: str  # registered name
    run_id: str  # of MLflow

    @classmethod
    def of(cls, registered: RegisteredVersion) -> CtrVersion:
        """The CTR model with these tags.

        Raises:
            RegistryMismatch: a tag is missing.
        """
        return cls(
            number=registered.number,
            codebook_hash=registered.required("codebook_hash"),
            codebook_version=int(registered.required("codebook_version")),
            train_key=registered.tags.get("train_key", ""),
            passed=registered.tags.get("verdict") == PASSED,
            judged_at=datetime.fromisoformat(registered.tags.get("judged_at", NEVER)),
            started_from=int(registered.tags.get("started_from_version") or 0) or None,
            table_versions=json.loads(registered.tags.get("table_versions", "{}")),
            run_date=date.fromisoformat(registered.required("run_date")),
            result=json.loads(registered.tags.get("result", "{}")),
            name=registered.name,
            run_id=registered.run_id,
        )


def ctr_tags(
    *,
    codebook: CodebookVersion,
    train_key: str,
    passed: bool,
    table_versions: Mapping[str, int],
    run_date: date,
    result: Mapping[str, Any],
    started_from: int | None = None,
) -> dict[str, str]:
    """The tags of a registered CTR model, which `CtrVersion.of` reads."""
    return {
        "codebook_version": str(codebook.number),
        "codebook_hash": codebook.hash,
        "train_key": train_key,
        "started_from_version": str(started_from or ""),
        "table_versions": json.dumps(dict(table_versions), sort_keys=True),
        "run_date": run_date.isoformat(),
        **verdict_tags(passed=passed, result=result),
    }


def verdict_tags(*, passed: bool, result: Mapping[str, Any]) -> dict[str, str]:
    """The tags that a verdict sets, now. `verdict` is the last one: killed before it, a model is as it was judged."""
    return {
        "result": json.dumps(dict(result)),
        "judged_at": datetime.now(UTC).isoformat(),
        "verdict": PASSED if passed else FAILED,
    }
