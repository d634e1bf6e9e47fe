"""nightly: the whole order of a night in one Spark session; each step that has nothing to do says so.

load -> encode, evaluate and release new items with the champion -> (when due: fit -> encode -> evaluate -> promote) -> train

So a candidate that does not pass keeps no new item from its readers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Protocol

from jobs import encode, evaluate, fit, load, train
from jobs.config import Config
from jobs.ctr.log import Log
from jobs.encode import EncodeResult
from jobs.evaluate import EvaluateResult
from jobs.fit import FitResult
from jobs.load import LoadResult
from jobs.models.champion import restore_champion
from jobs.models.registry import Registry
from jobs.models.versions import CodebookVersion
from jobs.train import TrainResult
from jobs.warehouse.delta_spark import Warehouse
from jobs.warehouse.queries import likelihood_drop
from jobs.warehouse.releases import ROLLED_BACK, Release, current_release, releases, versions_to_judge
from pipelines.promote import GateFailed, promote
from tokenizer import Iteration


class Reporter(Protocol):
    """Who is told what happens: a terminal, or the log of a scheduler."""

    def step(self, name: str, why: str) -> AbstractContextManager[None]: ...
    def done(self, name: str, facts: str) -> None: ...
    def iteration(self, step: Iteration) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass
class Night:
    """What happened; filled step by step, so that a night that stops early can still be told."""

    run_date: date
    log: Log | None = None  # the interactions, where there are any to train on
    loaded: LoadResult | None = None
    refit_because: str | None = None
    fitted: FitResult | None = None
    encoded: EncodeResult | None = None
    evaluated: EvaluateResult | None = None
    release: Release | None = None
    trained: TrainResult | None = None
    gate_message: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def nothing_to_do(self) -> bool:
        results = (self.loaded, self.encoded, self.evaluated, self.release, self.trained)
        return self.gate_message is None and all(r is None or r.nothing_to_do for r in results)


def run(
    config: Config, warehouse: Warehouse, registry: Registry, night: Night, pictures: Path, reporter: Reporter
) -> None:
    """Carry out the night of `night.run_date`. Call with the writer lock held.

    A verdict that does not pass stops the night before `train`: the champion stays as it is.
    """
    if config.train.interactions:
        with _timed(night, reporter, "interactions", config.train.interactions):
            night.log = train.check_interactions(config, warehouse)
        reporter.done("interactions", night.log.account())
    champion, repaired = restore_champion(registry)
    if repaired:
        reporter.done("champion", repaired)
    with _timed(night, reporter, "load", config.load.source):
        night.loaded = load.run(config, warehouse, night.run_date)
    reporter.done("load", _load_facts(night.loaded))
    if night.log is not None and not (night.log.seen_before and night.loaded.nothing_to_do):
        with _timed(night, reporter, "interactions", "their items in the catalogue"):
            train.check_ids(config, warehouse, night.log)

    if champion is not None:
        night.encoded = _encode(config, warehouse, registry, champion, night, reporter)
    night.refit_because = refit_reason(config, warehouse, champion, night)
    model = champion
    if champion is not None:
        _release(config, warehouse, registry, champion, champion, night, pictures, reporter)
    if night.refit_because is not None:
        with _timed(night, reporter, "fit", night.refit_because):
            night.fitted = fit.run(
                config, warehouse, registry, night.run_date, pictures, champion, reporter.iteration, reporter.note
            )
        reporter.done(
            "fit",
            f"codebook version {night.fitted.model.number}, hash {night.fitted.codebook_hash[:12]}"
            + _idle(night.fitted),
        )
        model = night.fitted.model
        night.encoded = _encode(config, warehouse, registry, model, night, reporter)
        _release(config, warehouse, registry, model, champion, night, pictures, reporter)
    assert model is not None  # without a champion there is a reason to fit
    if night.gate_message is not None or night.release is None:
        return

    if night.log is not None:
        with _timed(night, reporter, "train", config.train.interactions):
            night.trained = train.run(
                config,
                warehouse,
                registry,
                model,
                night.release.table_versions,
                night.run_date,
                pictures,
                reporter.note,
                night.log,
            )
        reporter.done("train", night.trained.summary() + _idle(night.trained))


def refit_reason(config: Config, warehouse: Warehouse, champion: CodebookVersion | None, night: Night) -> str | None:
    """Why tonight needs a new codebook; None if the champion will do."""
    if champion is None:
        return "there is no champion yet"
    if (champion.levels, champion.components) != (config.fit.levels, config.fit.components):
        return (
            f"the champion is {champion.levels}x{champion.components}x{champion.dim}, the settings ask for "
            f"{config.fit.levels}x{config.fit.components}"
        )
    if champion.method != config.fit.method:
        return f"the champion was fitted by {champion.method}, the settings ask for {config.fit.method}"
    # Who rolled back has as long as a codebook lasts to find out why, before a refit from the same data comes.
    since = max(
        [
            champion.run_date,
            *(release.at.date() for release in releases(warehouse.root) if release.status == ROLLED_BACK),
        ]
    )
    due = since + timedelta(days=config.nightly.refit_every_days)
    if night.run_date >= due:
        return f"the champion of {champion.run_date} was due for a refit on {due}"
    drop = likelihood_drop(warehouse, champion.number, night.run_date)
    if drop is not None and drop > config.nightly.max_likelihood_drop:
        return f"the likelihood of tonight's new items is {drop:.2f} standard deviations below the others'"
    return None


def _release(
    config: Config, warehouse: Warehouse, registry: Registry, model: CodebookVersion, champion: CodebookVersion | None, night: Night,
    pictures: Path, reporter: Reporter,
) -> None:  # fmt: skip
    """Judge the IDs of `model` and, if they pass, make them what readers follow."""
    night.gate_message = None
    current = current_release(warehouse.root)
    before_refit = model is champion and night.refit_because is not None
    if before_refit and current and versions_to_judge(warehouse, model.number) == current.table_versions:
        night.release = replace(current, nothing_to_do=True)
        return
    with _timed(night, reporter, "evaluate", f"codebook version {model.number}"):
        night.evaluated = evaluate.run(config, warehouse, registry, model, champion, night.run_date, pictures)
    verdict = "passed" if night.evaluated.passed else "failed"
    reporter.done("evaluate", f"RMSE {night.evaluated.metrics['rmse']:.5f}, gate {verdict}" + _idle(night.evaluated))
    try:
        with _timed(night, reporter, "promote", f"codebook version {model.number}"):
            night.release = promote(warehouse, registry, model, night.evaluated)
    except GateFailed as refusal:
        night.gate_message = str(refusal)
        if before_refit:
            reporter.done("promote", f"nothing released before the refit: {refusal}")
        return
    reporter.done(
        "promote", f"champion is version {model.number}, release {night.release.release_id}" + _idle(night.release)
    )


def _encode(
    config: Config, warehouse: Warehouse, registry: Registry, model: CodebookVersion, night: Night, reporter: Reporter
) -> EncodeResult:
    with _timed(night, reporter, "encode", f"codebook version {model.number}"):
        result = encode.run(config, warehouse, registry, model, night.run_date)
    completed = f", the new columns of {result.completed:,} earlier rows computed" if result.completed else ""
    text = f"{result.encoded:,} items encoded with codebook version {model.number}{completed}"
    reporter.done("encode", text + _idle(result))
    return result


@contextmanager
def _timed(night: Night, reporter: Reporter, name: str, why: str) -> Iterator[None]:
    began = time.monotonic()
    with reporter.step(name, why):
        yield
    night.seconds[name] = night.seconds.get(name, 0.0) + time.monotonic() - began


def _load_facts(loaded: LoadResult) -> str:
    return (
        f"{loaded.rows_in:,} rows in = {loaded.rows_stored:,} stored + {loaded.rows_rejected:,} rejected "
        f"({loaded.new:,} new, {loaded.changed:,} changed)"
        + (f"; {loaded.note}" if loaded.note else "")
        + _idle(loaded)
    )


def _idle(result: LoadResult | FitResult | EncodeResult | EvaluateResult | Release | TrainResult) -> str:
    return " (nothing to do)" if result.nothing_to_do else ""
