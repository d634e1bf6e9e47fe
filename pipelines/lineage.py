"""status and explain: the state of a warehouse and the history of one item, one screen each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table as Grid

from jobs.models.champion import current_champion
from jobs.models.registry import CANDIDATE, CHAMPION, CTR_MODEL, Registry
from jobs.models.versions import RegistryMismatch
from jobs.warehouse.delta_rs import count_and_version
from jobs.warehouse.delta_spark import Warehouse
from jobs.warehouse.queries import LISTED_ITEMS, item_history
from jobs.warehouse.releases import Release, current_release, releases, rolled_back
from jobs.warehouse.reports import report
from jobs.warehouse.tables import TABLES
from pipelines.report import page


def status_facts(root: str, registry: Registry) -> dict[str, Any]:
    """The state of the warehouse at `root` as flat keys. Without Spark, whose start alone would take longer."""
    release = current_release(root)
    candidate = registry.codebooks.alias(CANDIDATE)
    rolled_back_from = rolled_back(releases(root)).get(candidate) if candidate else None
    verdict = report(root, candidate) if candidate else None
    facts: dict[str, Any] = {
        "release": release.release_id if release else None,
        "release_status": release.status if release else None,
        "released_at": release.at.strftime("%Y-%m-%dT%H:%M:%S") if release else None,
        "champion_version": release.codebook_version if release else None,
        "codebook_hash": release.codebook_hash if release else None,
        "registry": _registry_problem(registry, release),
        "candidate_version": candidate,
        "candidate_rolled_back": f"from release {rolled_back_from}" if rolled_back_from else None,
        "verdict": None if verdict is None else ("passed" if verdict.passed else "failed"),
        "reasons": [] if verdict is None else list(verdict.reasons),
        "ctr_version": registry.ctr_models.alias(CHAMPION),
        "ctr_candidate_version": registry.ctr_models.alias(CANDIDATE),
    }
    for table in TABLES:
        rows, version = count_and_version(root, table) or (None, None)
        facts |= {f"{table.name}_rows": rows, f"{table.name}_version": version}
    return facts


def _registry_problem(registry: Registry, release: Release | None) -> str | None:
    """How the registry differs from the releases, as a sentence; None if they agree."""
    try:
        current_champion(registry)
    except RegistryMismatch as error:
        return str(error)
    alias = registry.codebooks.alias(CHAMPION)
    if release is None or alias == release.codebook_version:
        return None
    names = f"names version {alias}" if alias else "is missing"
    return f"alias {CHAMPION} {names}; the next command that writes puts it back to version {release.codebook_version}"


def print_status(facts: dict[str, Any]) -> None:
    console = page()
    if facts["release"] is None:
        console.print("No release yet: run `sid nightly`, or the stages and `sid promote`.")
    else:
        console.print(
            f"Release {facts['release']} of {facts['released_at']} UTC, {facts['release_status']}: codebook version "
            f"{facts['champion_version']}, hash {facts['codebook_hash'][:12]}"
        )
    if facts["candidate_version"] not in (None, facts["champion_version"]):
        rolled = f", rolled back {facts['candidate_rolled_back']}" if facts["candidate_rolled_back"] else ""
        console.print(
            f"Candidate: codebook version {facts['candidate_version']}{rolled}, verdict "
            f"{facts['verdict'] or 'none yet'} {'; '.join(facts['reasons'])}"
        )
    if facts["registry"] is not None:
        console.print(f"Registry: {facts['registry']}", markup=False)
    grid = Grid(box=None, padding=(0, 2))
    for column, justify in (("table", "left"), ("rows", "right"), ("version", "right")):
        grid.add_column(column, justify=justify)  # type: ignore[arg-type]
    for table in TABLES:
        rows = facts[f"{table.name}_rows"]
        grid.add_row(
            table.name,
            "absent" if rows is None else f"{rows:,}",
            "" if rows is None else str(facts[f"{table.name}_version"]),
        )
    console.print(grid)


def soft_text(alternates: Sequence[Mapping[str, Any]]) -> str:
    """`12 61 %, 7 20 %, 3 11 % | 87 93 %`: of each level the codes of a soft semantic ID that weigh 5 % and more."""
    levels = [
        sorted(zip(level["codes"], level["weights"], strict=True), key=lambda pair: -pair[1]) for level in alternates
    ]
    return " | ".join(
        ", ".join(f"{code} {weight / 255:.0%}" for code, weight in level if weight >= 0.05 * 255) for level in levels
    )


def print_item(warehouse: Warehouse, registry: Registry, item_id: str) -> bool:
    """Print the lineage of one item; False if no table knows it."""
    console = page()
    history = item_history(warehouse, item_id)
    if not history.known:
        console.print(
            f"item {item_id!r} is in no table of this warehouse; expected an id of item_embeddings or "
            "rejected_embeddings"
        )
        return False
    grid = Grid(show_header=False, box=None, padding=(0, 2))
    if (row := history.embedding) is not None:
        grid.add_row(
            "vector",
            f"{row['dim']} components from {', '.join(row['modalities'])}; content {row['content_hash'][:12]}",
        )
        grid.add_row("", f"first seen {row['first_seen']}, last changed {row['run_date']}")
    for row in history.rejections:
        grid.add_row("rejected", f"{row['run_date']}: {row['reason']}: {row['detail']}; {row['excerpt']}")
    release = current_release(warehouse.root)
    codebooks = registry.codebooks.versions() if history.semantic_ids else {}
    for row in history.semantic_ids:
        version = row["codebook_version"]
        current = " (current release)" if release and release.codebook_version == version else ""
        grid.add_row(
            "semantic ID",
            f"{row['semantic_id']} under codebook version {version}{current}, hash {row['codebook_hash'][:12]}",
        )
        grid.add_row(
            "",
            f"confidence {row['confidence']:.3f}, log-likelihood {row['log_likelihood']:.1f}, encoded {row['run_date']}"
            + (", held" if row["held"] else ""),
        )
        if row["alternates"] is not None:
            grid.add_row("", f"soft: {soft_text(row['alternates'])}")
        if others := history.same_codes[version]:
            more = " and more" if len(others) > LISTED_ITEMS else ""
            grid.add_row("", f"shares its codes with {', '.join(others[:LISTED_ITEMS])}{more}")
        model = codebooks.get(version)
        if model is not None:
            start = f", started from {model.started_from[:12]}" if model.started_from else ""
            grid.add_row(
                "codebook",
                f"fitted {model.run_date} on {json.dumps(dict(model.table_versions))}{start}; MLflow run "
                f"{model.run_id}",
            )
    ctr = registry.ctr_models.with_alias(CHAMPION)
    if ctr is not None:
        grid.add_row(
            "CTR model",
            f"{CTR_MODEL} version {ctr.number} on codebook {ctr.codebook_hash[:12]}; MLflow run {ctr.run_id}",
        )
    console.print(f"item {item_id}")
    console.print(grid)
    return True
