"""train: interactions + `semantic_ids` of a release -> `ctr_examples` and the CTR model (DMQN).

Spark writes the examples with the codes of their items joined in; training reads them from the files, batch by batch,
so neither the log nor the catalogue is ever in memory. It can start from the champion. The control, where it is asked
for, is the same model without tokens.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from jobs.config import Config, ConfigError
from jobs.ctr.artefact import OtherFormatError, save_model
from jobs.ctr.champion import last_champion, load_ctr, restore_ctr_champion
from jobs.ctr.coverage import coverage_of
from jobs.ctr.dmqn import DMQNShape
from jobs.ctr.example_table import Examples, examples_key, most_shown_codes, read_examples, write_examples
from jobs.ctr.examples import FEATURES, build_examples, item_codes
from jobs.ctr.gate import Comparison, CtrLimits, compare
from jobs.ctr.log import Log, read_rows
from jobs.ctr.metrics import Scores, auc_by_rarity, measure
from jobs.ctr.pieces import learn
from jobs.ctr.stream import ExampleRowGroup, ExampleStream, row_groups
from jobs.ctr.tokens import TokenScheme, scheme_problem
from jobs.ctr.train_result import TrainResult, defined
from jobs.ctr.training_state import TrainingCheckpoint
from jobs.ctr.user_table import ModelInputs
from jobs.ctr.warm_start import (
    Champion,
    Start,
    TokenPairs,
    bridge_tokens,
    code_pairs,
    random_start,
    take_over,
    why_not,
)
from jobs.fingerprint import fingerprint
from jobs.models.registry import CANDIDATE, CTR_MODEL, Registry, register
from jobs.models.versions import CodebookVersion, CtrVersion, ctr_tags, verdict_tags
from jobs.pictures import draw_ctr
from jobs.train_model import TrainedModel, scored, train_model
from jobs.warehouse.delta_spark import Warehouse, data_files
from jobs.warehouse.tables import CTR_EXAMPLES, SEMANTIC_IDS

RECIPE = 4  # of the model and its training. With a higher number every warehouse trains its model anew.
CHECKPOINTS = "_training"  # folder in the warehouse
NOT_OF_THE_MODEL = {  # settings that change it in no kind
    "interactions",
    "max_share_without_id",
    "control",
    "workers",
    "threads",
}
WITH_IDS, WITHOUT_IDS = "semantic IDs", "no IDs"


def run(
    config: Config,
    warehouse: Warehouse,
    registry: Registry,
    codebook: CodebookVersion,
    versions: Mapping[str, int],
    run_date: date,
    pictures: Path,
    report: Callable[[str], None],
    log: Log,
) -> TrainResult:
    """Train on the semantic IDs of `codebook` at the pinned table `versions` and register a candidate.

    Raises:
        SchemaError: the log is about other items, or a split holds nothing to learn.
        ConfigError: the token table is too small, or the learning rate too large.
    """
    began = time.monotonic()
    if not log.rows_used:
        return TrainResult(rows_in=log.rows_in, dropped=log.dropped, note=log.note, nothing_to_do=True)
    stage = _Stage(config, warehouse, registry, codebook, versions, report, log, input_settings(config, codebook))
    done = registry.ctr_models.newest(lambda version: version.train_key.startswith(stage.train_key))
    if done is not None:
        result = stage.judged_again(done)
        restore_ctr_champion(registry, codebook.hash)
        return replace(result, seconds=time.monotonic() - began)

    coverage = coverage_of(log, stage.published.select("item_id"), config.train)
    examples = stage.examples()
    champion = stage.champion()
    inputs = stage.inputs(examples)
    models = {WITH_IDS: stage.trained(WITH_IDS, examples, stage.start(inputs, examples, champion))}
    if config.train.control:
        models[WITHOUT_IDS] = stage.trained(WITHOUT_IDS, examples, stage.random_start(replace(inputs, scheme=None)))
    comparison = stage.comparison(examples, champion, models[WITH_IDS].test)

    metrics = {name: measure(model.test) for name, model in models.items()}
    ours, control = metrics[WITH_IDS], metrics.get(WITHOUT_IDS)
    result = TrainResult(
        version=0,
        auc=defined(ours.auc),
        auc_control=defined(control.auc) if control else None,
        gauc=defined(ours.gauc),
        gauc_control=defined(control.gauc) if control else None,
        gauc_users=ours.gauc_users,
        log_loss=defined(ours.log_loss),
        log_loss_control=defined(control.log_loss) if control else None,
        calibration=defined(ours.calibration),
        auc_cold=defined(ours.auc_cold),
        cold_impressions=ours.cold_impressions,
        cold_clicks=ours.cold_clicks,
        rows_in=log.rows_in,
        rows_used=log.rows_used,
        dropped=log.dropped,
        examples=examples.impressions,
        without_negative=log.rows_used - examples.clicks if log.positives_only else 0,
        items=coverage.items,
        without_id=coverage.items_without,
        share_without_id=coverage.share_without,
        note=log.note,
        validation_from=examples.validation_from,
        started_from=models[WITH_IDS].started_from,
    )
    result = result.compared(champion.version if champion else None, codebook.hash, comparison).judged(stage.limits)
    picture = pictures / f"ctr-{codebook.hash[:12]}.png"
    curves = {name: model.validation_auc for name, model in models.items()}
    rarity = auc_by_rarity({name: model.test for name, model in models.items()})
    draw_ctr(curves, *rarity, picture, first_epoch=1 if result.started_from is None else 0)
    number = stage.register(models[WITH_IDS], examples, result, run_date, picture)
    for model in models.values():
        model.checkpoint.delete()
    return replace(result, version=number, seconds=time.monotonic() - began)


def input_settings(config: Config, codebook: CodebookVersion) -> dict[str, Any]:
    """`ModelInputs.settings` of a model that reads codes of `codebook`.

    Raises:
        ConfigError: the token table has no row for each code, or the codes have too many levels to learn pieces of.
    """
    train = config.train
    scheme: dict[str, Any] = {"kind": train.tokens, "levels": codebook.levels, "components": codebook.components}
    scheme |= {"alternates": max(1, config.encode.alternates), "table_rows": train.token_rows}
    if problem := scheme_problem(**scheme):
        raise ConfigError(f"train.tokens = {train.tokens}, train.token_rows = {train.token_rows}: {problem}")
    return {"scheme": scheme, "item_rows": train.item_rows, "history": train.history}


@dataclass(frozen=True)
class _Stage:
    """The steps of `run`, with what all of them need."""

    config: Config
    warehouse: Warehouse
    registry: Registry
    codebook: CodebookVersion
    versions: Mapping[str, int]
    report: Callable[[str], None]
    log: Log
    input_settings: Mapping[str, Any]

    @property
    def ids_key(self) -> str:
        """Identifies the semantic IDs."""
        return f"{self.codebook.hash[:16]}-{self.versions[SEMANTIC_IDS.name]}"

    @property
    def examples_key(self) -> str:
        """Identifies the log and the settings of the examples."""
        return examples_key(self.config, self.log.source.fingerprint)

    @property
    def train_key(self) -> str:
        """Identifies data and settings; that of a model without a control is the beginning of that with one.

        What the training starts from is not part of it: the model that a night trains becomes the champion, and the
        same night again would start from that one and never be done. Nor are the limits of the gate, as they change no
        model.
        """
        train = self.config.train
        settings = fingerprint([train.model_dump(mode="json", exclude=NOT_OF_THE_MODEL), self.input_settings])[:16]
        control = "-control" if train.control else ""
        return f"{RECIPE}-{self.ids_key}-{self.examples_key}-{settings}{control}"

    @property
    def limits(self) -> CtrLimits:
        return CtrLimits(**self.config.ctr_gate.model_dump())

    @property
    def published(self) -> DataFrame:
        """The semantic IDs to train on."""
        return self._ids(self.codebook.number, self.versions[SEMANTIC_IDS.name])

    def _ids(self, codebook: int, version: int | None = None) -> DataFrame:
        return self.warehouse.read(SEMANTIC_IDS, version).where(F.col("codebook_version") == codebook)

    def examples(self) -> Examples:
        """Write `ctr_examples`, unless it is made of this log and these IDs already."""
        self.report("building examples")
        version = write_examples(self.config, self.warehouse, self.published, self.log, self.ids_key)
        return read_examples(self.config, self.warehouse, version, self.log)

    def champion(self) -> Champion | None:
        """The model to start from and to compare with; None too if another version of this software wrote it."""
        version = last_champion(self.registry, self.codebook.hash)
        if version is None:
            return None
        try:
            return Champion(version, load_ctr(self.registry, version))
        except OtherFormatError as error:
            self.report(f"not comparing with CTR model version {version.number}: {error}")
            return None

    def inputs(self, examples: Examples) -> ModelInputs:
        """What the model reads; pieces of codes are learned from the training impressions."""
        scheme, pieces = self.input_settings["scheme"], None
        if scheme["kind"] == "pieces":
            codes, counts = most_shown_codes(self.warehouse, examples.version, scheme["levels"])
            pieces = learn(codes, counts, scheme["components"], scheme["table_rows"] - 1)
            self.report(
                f"learned {len(pieces.several):,} pieces of several codes from {len(codes):,} different tuples of codes"
            )
        return ModelInputs(**{**self.input_settings, "scheme": TokenScheme(**scheme, pieces=pieces)})

    def random_start(self, inputs: ModelInputs) -> Start:
        train = self.config.train
        shape = DMQNShape(
            len(FEATURES),
            train.width,
            train.interest_codebooks,
            train.codewords,
            by_distribution=train.by_distribution,
            experts=train.experts,
        )
        return random_start(inputs, shape, train.seed)

    def start(self, inputs: ModelInputs, examples: Examples, champion: Champion | None) -> Start:
        """The champion's parameters where that is possible, else random ones."""
        start = self.random_start(inputs)
        if champion is None or not self.config.train.warm_start or self.config.train.control:
            return start
        number, previous = champion.version.number, champion.ctr
        reason = why_not(start, champion, examples)
        if reason is not None:
            self.report(f"not starting from CTR model version {number}: {reason}")
            return start
        old, new = previous.inputs.scheme, inputs.scheme
        assert old is not None
        assert new is not None
        same_tokens = champion.version.codebook_hash == self.codebook.hash and old == new
        take_over(start.model, previous.model, tokens=same_tokens)
        bridged = ""
        if not same_tokens:
            codes = code_pairs(self._ids(champion.version.codebook_version), self.published)
            with self.warehouse.staged(codes, "code_pairs") as staged:
                pairs = TokenPairs(data_files(staged), old, new)
                items = bridge_tokens(start.model.embed, previous.model.embed, new.fields, pairs)
            bridged = f", with tokens for the codes of {items:,} items that both codebooks know"
        self.report(f"starting from CTR model version {number}{bridged}")
        return replace(start, version=number)

    def trained(self, name: str, examples: Examples, start: Start) -> TrainedModel:
        """A trained model; a training that was killed goes on from its checkpoint."""
        key = f"{self.train_key}-{name}-from-{start.version}-by-{self.config.train.workers}"
        if start.inputs.scheme and start.inputs.scheme.pieces:
            key += f"-with-{start.inputs.scheme.pieces.digest[:16]}"
        checkpoint = TrainingCheckpoint(f"{self.warehouse.root}/{CHECKPOINTS}/{name.replace(' ', '-')}", key)
        return train_model(
            self.config.train, examples.groups, start, checkpoint, lambda text: self.report(f"{name}, {text}")
        )

    def judged_again(self, done: CtrVersion) -> TrainResult:
        """The result of a model that was trained before, under the present limits and against the present champion.

        A model that has passed stays passed: tighter limits are for the models after it.
        """
        stored = TrainResult.of(done)
        if done.passed:
            return stored
        champion = last_champion(self.registry, self.codebook.hash)
        result = stored
        if stored.champion != (champion.number if champion else None):
            result = self.compared_again(done, stored)
        result = result.judged(self.limits)
        if result == stored and not result.passed:
            return stored
        self.report(f"judging CTR model version {done.number} again, without training")
        tags = verdict_tags(passed=result.passed, result=asdict(result))
        with self.registry.run("judge", self.config, {"ctr_version": str(done.number), "verdict": tags["verdict"]}):
            self.registry.ctr_models.set_tags(done.number, tags)
        return replace(result, nothing_to_do=False)

    def compared_again(self, done: CtrVersion, stored: TrainResult) -> TrainResult:
        """The result of a model that was trained before, compared with the present champion."""
        examples, champion, ctr = self.examples(), self.champion(), load_ctr(self.registry, done)
        train = self.config.train
        stream = ExampleStream(examples.groups, "test", ctr.inputs, train.batch_positions)
        comparison = self.comparison(examples, champion, scored(ctr.model, stream, train.threads))
        return stored.compared(champion.version if champion else None, self.codebook.hash, comparison)

    def comparison(self, examples: Examples, champion: Champion | None, test: Scores) -> Comparison | None:
        """Scores of the test split against the champion's; None without a champion.

        A champion scores the same impressions with the codes of its own codebook and histories of its own length.
        """
        if champion is None:
            return None
        self.report("comparing with the champion")
        train = self.config.train

        def compared(groups: tuple[ExampleRowGroup, ...]) -> Comparison:
            stream = ExampleStream(groups, "test", champion.ctr.inputs, train.batch_positions)
            return compare(test, scored(champion.ctr.model, stream, train.threads), train.seed)

        own = champion.ctr.inputs.history
        if champion.version.codebook_hash == self.codebook.hash and own <= train.history:
            return compared(examples.groups)
        longest = train.model_copy(update={"history": max(own, train.history)})
        ids = item_codes(self._ids(champion.version.codebook_version))
        with (
            self.warehouse.staged(read_rows(self.log, self.warehouse.spark), "interactions") as rows,
            self.warehouse.staged(
                build_examples(rows, ids, self.log, longest), "champion_examples", CTR_EXAMPLES
            ) as rebuilt,
        ):
            return compared(row_groups(data_files(rebuilt)))

    def register(
        self, trained: TrainedModel, examples: Examples, result: TrainResult, run_date: date, picture: Path
    ) -> int:
        """Register the model as candidate and, if it passed, champion; returns its version."""
        table_versions = {**self.versions, CTR_EXAMPLES.name: examples.version}
        tags = ctr_tags(
            codebook=self.codebook,
            train_key=self.train_key,
            passed=result.passed,
            table_versions=table_versions,
            run_date=run_date,
            result=asdict(result),
            started_from=result.started_from,
        )
        with (
            self.registry.run("train", self.config, {k: v for k, v in tags.items() if k != "result"}) as run_,
            tempfile.TemporaryDirectory() as scratch,
        ):
            for name, value in result.metrics.items():
                self.registry.client.log_metric(run_.info.run_id, name, value)
            self.registry.client.log_artifact(run_.info.run_id, str(picture), "pictures")
            folder = Path(scratch) / "dmqn"
            facts = {"features": list(FEATURES), "table_versions": table_versions}
            save_model(folder, trained.model, trained.inputs, self.codebook.hash, facts)
            model = register(self.registry, CTR_MODEL, Path(__file__).parent / "ctr" / "dmqn_model.py", folder, tags)
        self.registry.ctr_models.set_alias(CANDIDATE, model.number)
        restore_ctr_champion(self.registry, self.codebook.hash)
        return model.number
