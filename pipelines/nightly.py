"""nightly: all stages of a night in order, in one Spark session.

    load -> encode -> evaluate -> promote          new items, with the champion
         -> fit -> encode -> evaluate -> promote   when a refit is due, with the new codebook
         -> train

New items are released before a refit, so a new codebook that does not pass the gate delays none of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Protocol, TypeVar

from jobs import encode, evaluate, fit, load, train
from jobs.config import Config
from jobs.ctr.champion import restore_ctr_champion
from jobs.ctr.example_table import check_ids, check_interactions
from jobs.ctr.log import Log
from jobs.ctr.train_result import TrainResult
from jobs.encode import EncodeResult
from jobs.evaluate import EvaluateResult
from jobs.fit import FitResult
from jobs.load import LoadResult
from jobs.models.champion import restore_champion
from jobs.models.registry import Registry
from jobs.models.versions import CodebookVersion
from jobs.warehouse.delta_spark import Warehouse
from jobs.warehouse.queries import likelihood_drop
from jobs.warehouse.releases import ROLLED_BACK, Release, current_release, releases, versions_to_evaluate
from pipelines.promote import GateFailed, PromoteResult, promote
from tokenizer import Iteration


class Reporter(Protocol):
    """Shows progress: on a terminal, or in the log of a scheduler."""

    def step(self, name: str, why: str) -> AbstractContextManager[None]: ...
    def done(self, name: str, facts: str) -> None: ...
    def iteration(self, step: Iteration) -> None: ...
    def note(self, text: str) -> None: ...


class StageResult(Protocol):
    """What every stage returns: a frozen dataclass with its facts, which also says them in one line."""

    @property
    def nothing_to_do(self) -> bool: ...
    def summary(self) -> str: ...


Result = TypeVar("Result", bound=StageResult)


@dataclass(frozen=True)
class Night:
    """The results of one night. None: the stage did not run."""

    run_date: date
    log: Log | None  # interactions
    loaded: LoadResult
    refit_because: str | None
    fitted: FitResult | None
    encoded: EncodeResult  # by the codebook that was evaluated last
    evaluated: EvaluateResult
    promoted: PromoteResult | None  # None: no codebook passed the gate
    gate_message: str | None  # why the codebook that was evaluated last was not promoted
    trained: TrainResult | None  # None: no interactions, or the gate did not pass
    seconds: Mapping[str, float]  # by stage

    @property
    def release(self) -> Release | None:
        """The release that readers follow after the night, if the night made or confirmed one."""
        return self.promoted.release if self.promoted else None

    @property
    def refusals(self) -> tuple[str, ...]:
        """What a gate refused to promote, and why."""
        ctr = self.trained.refusal if self.trained else None
        return tuple(message for message in (self.gate_message, ctr) if message is not None)

    @property
    def nothing_to_do(self) -> bool:
        results = (self.loaded, self.encoded, self.evaluated, self.promoted, self.trained)
        return not self.refusals and all(result is None or result.nothing_to_do for result in results)


def run(
    config: Config, warehouse: Warehouse, registry: Registry, run_date: date, pictures: Path, reporter: Reporter
) -> Night:
    """Carry out the night of `run_date`. Call with the writer lock held.

    The interactions are checked before anything is written, their item ids after `load`. Where the gate does not pass,
    nothing is trained and the champion stays.
    """
    stages = _Stages(config, warehouse, registry, run_date, pictures, reporter)
    log = stages.check_interactions()
    champion = stages.champion()
    loaded = stages.load()
    stages.check_items_of_log(log, loaded)

    encoded = stages.encode(champion) if champion is not None else None
    refit_because = refit_reason(config, warehouse, champion, run_date)
    published = stages.publish_new_items(champion, refit_because) if champion is not None else None

    fitted = None
    if refit_because is not None:
        fitted = stages.fit(champion, refit_because)
        encoded = stages.encode(fitted.codebook)
        published = stages.publish(fitted.codebook, champion).or_else(published)
    assert encoded is not None  # without a champion there is a reason to fit
    assert published is not None
    assert published.evaluated is not None

    trained = None
    if log is not None and published.promoted is not None and published.gate_message is None:
        trained = stages.train(published.codebook, published.promoted.release, log)
    return Night(
        run_date=run_date,
        log=log,
        loaded=loaded,
        refit_because=refit_because,
        fitted=fitted,
        encoded=encoded,
        evaluated=published.evaluated,
        promoted=published.promoted,
        gate_message=published.gate_message,
        trained=trained,
        seconds=stages.seconds,
    )


def refit_reason(config: Config, warehouse: Warehouse, champion: CodebookVersion | None, run_date: date) -> str | None:
    """Why the night needs a new codebook; None if the champion can stay."""
    if champion is None:
        return "there is no champion yet"
    if (champion.levels, champion.components) != (config.fit.levels, config.fit.components):
        return (
            f"the champion is {champion.levels}x{champion.components}x{champion.dim}, the settings ask for "
            f"{config.fit.levels}x{config.fit.components}"
        )
    if champion.method != config.fit.method:
        return f"the champion was fitted by {champion.method}, the settings ask for {config.fit.method}"
    # A rollback counts like a fit: a refit on the same data right after it would bring back what was rolled back.
    rollbacks = [release.at.date() for release in releases(warehouse.root) if release.status == ROLLED_BACK]
    due = max([champion.run_date, *rollbacks]) + timedelta(days=config.nightly.refit_every_days)
    if run_date >= due:
        return f"the champion of {champion.run_date} was due for a refit on {due}"
    drop = likelihood_drop(warehouse, champion.number, run_date)
    if drop is not None and drop > config.nightly.max_likelihood_drop:
        return f"the likelihood of tonight's new items is {drop:.2f} standard deviations below the others'"
    return None


@dataclass(frozen=True)
class _Publication:
    """The verdict on the IDs of a codebook, and the release that followed it."""

    codebook: CodebookVersion
    evaluated: EvaluateResult | None = None  # None: the current release has these IDs already
    promoted: PromoteResult | None = None
    gate_message: str | None = None  # why it was not promoted

    def or_else(self, earlier: _Publication | None) -> _Publication:
        """This one; the release stays the earlier one where this codebook was not promoted."""
        promoted = self.promoted or (earlier.promoted if earlier else None)
        return replace(self, promoted=promoted)


@dataclass(frozen=True)
class _Stages:
    """The stages with what all of them need; each is timed and reported."""

    config: Config
    warehouse: Warehouse
    registry: Registry
    run_date: date
    pictures: Path
    reporter: Reporter
    seconds: dict[str, float] = field(default_factory=dict)

    def check_interactions(self) -> Log | None:
        if not self.config.train.interactions:
            return None
        with self._timed("interactions", self.config.train.interactions):
            log = check_interactions(self.config, self.warehouse)
        self.reporter.done("interactions", log.account())
        return log

    def champion(self) -> CodebookVersion | None:
        champion, repaired = restore_champion(self.registry)
        if repaired:
            self.reporter.done("champion", repaired)
        if champion is not None:
            restore_ctr_champion(self.registry, champion.hash)
        return champion

    def load(self) -> LoadResult:
        return self._run("load", self.config.load.source, lambda: load.run(self.config, self.warehouse, self.run_date))

    def check_items_of_log(self, log: Log | None, loaded: LoadResult) -> None:
        """Check that the log is about items of the catalogue, unless neither is new."""
        if log is not None and not (log.seen_before and loaded.nothing_to_do):
            with self._timed("interactions", "their items in the catalogue"):
                check_ids(self.config, self.warehouse, log)

    def fit(self, champion: CodebookVersion | None, why: str) -> FitResult:
        def stage() -> FitResult:
            return fit.run(
                self.config,
                self.warehouse,
                self.registry,
                self.run_date,
                self.pictures,
                champion,
                self.reporter.iteration,
                self.reporter.note,
            )

        return self._run("fit", why, stage)

    def encode(self, codebook: CodebookVersion) -> EncodeResult:
        def stage() -> EncodeResult:
            return encode.run(self.config, self.warehouse, self.registry, codebook, self.run_date)

        return self._run("encode", f"codebook version {codebook.number}", stage)

    def publish_new_items(self, champion: CodebookVersion, refit_because: str | None) -> _Publication:
        """Evaluate and release the IDs of the champion. Before a refit it needs no new verdict if no row changed."""
        current = current_release(self.warehouse.root)
        if refit_because is None:
            return self.publish(champion, champion)
        if current and versions_to_evaluate(self.warehouse, champion.number) == current.table_versions:
            return _Publication(champion, promoted=PromoteResult(current, nothing_to_do=True))
        published = self.publish(champion, champion)
        if published.gate_message is not None:
            self.reporter.done("promote", f"nothing released before the refit: {published.gate_message}")
        return published

    def publish(self, codebook: CodebookVersion, champion: CodebookVersion | None) -> _Publication:
        """Evaluate the IDs of a codebook and, if they pass the gate, release them."""

        def evaluation() -> EvaluateResult:
            return evaluate.run(
                self.config, self.warehouse, self.registry, codebook, champion, self.run_date, self.pictures
            )

        evaluated = self._run("evaluate", f"codebook version {codebook.number}", evaluation)
        try:
            promoted = self._run(
                "promote",
                f"codebook version {codebook.number}",
                lambda: promote(self.warehouse, self.registry, codebook, evaluated),
            )
        except GateFailed as refusal:
            return _Publication(codebook, evaluated, gate_message=str(refusal))
        return _Publication(codebook, evaluated, promoted)

    def train(self, codebook: CodebookVersion, release: Release, log: Log) -> TrainResult:
        def stage() -> TrainResult:
            return train.run(
                self.config,
                self.warehouse,
                self.registry,
                codebook,
                release.table_versions,
                self.run_date,
                self.pictures,
                self.reporter.note,
                log,
            )

        return self._run("train", self.config.train.interactions, stage)

    def _run(self, name: str, why: str, stage: Callable[[], Result]) -> Result:
        with self._timed(name, why):
            result = stage()
        self.reporter.done(name, result.summary() + (" (nothing to do)" if result.nothing_to_do else ""))
        return result

    @contextmanager
    def _timed(self, name: str, why: str) -> Iterator[None]:
        began = time.monotonic()
        with self.reporter.step(name, why):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began
