"""train: interactions + `semantic_ids` of a release -> `ctr_examples` and the CTR model (DMQN).

Spark writes the examples with the codes of their items joined in; training reads them from the files, batch by batch,
so neither the log nor the catalogue is ever in memory. The control, where it is asked for, is the same model without
tokens.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path

import numpy as np
import torch
from pyspark.sql import functions as F

from jobs.config import Config, ConfigError, TrainConfig
from jobs.ctr.artefact import new_model, save_model
from jobs.ctr.champion import last_champion, load_ctr, restore_ctr_champion
from jobs.ctr.coverage import coverage_of
from jobs.ctr.dmqn import DMQN, DMQNShape
from jobs.ctr.example_table import check_splits, examples_key, write_examples
from jobs.ctr.examples import FEATURES, build_examples, item_codes
from jobs.ctr.gate import CtrLimits, CtrVerdict, compare
from jobs.ctr.log import Log, read_rows
from jobs.ctr.metrics import Scores, auc, measure
from jobs.ctr.stream import ExampleRowGroup, ExampleStream, row_groups
from jobs.ctr.tokens import TokenScheme
from jobs.ctr.training import predict, train
from jobs.ctr.training_state import TrainingCheckpoint
from jobs.ctr.user_table import ModelInputs
from jobs.fingerprint import fingerprint
from jobs.models.registry import CANDIDATE, CTR_MODEL, Registry, register
from jobs.models.versions import CodebookVersion, CtrVersion, ctr_tags
from jobs.pictures import draw_ctr
from jobs.warehouse.delta_spark import Warehouse, data_files
from jobs.warehouse.tables import CTR_EXAMPLES, SEMANTIC_IDS
from tokenizer.kernels import without_denormals

RECIPE = 2  # of the model and its training. With a higher number every warehouse trains its model anew.
CHECKPOINTS = "_training"  # folder in the warehouse
ABOUT_THE_LOG = {"interactions", "max_share_without_id"}  # settings that do not change the model
WITH_IDS, WITHOUT_IDS = "semantic IDs", "no IDs"


@dataclass(frozen=True)
class TrainResult:
    """A metric that is None is undefined, or of a control that was not trained. Without a `version` the log had no rows
    and nothing was trained.
    """

    version: int | None
    auc: float | None
    auc_control: float | None
    gauc: float | None
    gauc_control: float | None
    gauc_users: int  # with clicks and non-clicks in the test split, over which GAUC is the mean
    log_loss: float | None
    log_loss_control: float | None
    calibration: float | None  # mean prediction / click rate
    auc_cold: float | None  # of items that the training split shows fewer than 5 times
    rows_in: int  # of the log: rows_used + those dropped
    rows_used: int
    dropped: Mapping[str, int]  # by reason
    examples: int
    without_negative: int  # rows for which no negative could be sampled: behaviour, but no examples
    items: int  # of the log
    without_id: int  # of these, how many have no semantic ID
    share_without_id: float  # of the used rows of the log, those about such items
    note: str
    champion: int | None = None  # version of the model that the gate compared with
    same_codebook: bool = True  # whether that model was trained on the current codebook and so can go on serving
    reasons: Sequence[str] = ()  # why the gate refuses the model
    differences: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # to the champion, with 95 % intervals
    seconds: float = 0.0
    nothing_to_do: bool = False

    @property
    def passed(self) -> bool:
        """Whether the model may replace the champion."""
        return not self.reasons

    @property
    def refusal(self) -> str | None:
        """Why the model is not the champion; None if it is."""
        if self.passed:
            return None
        consequence = (
            f"Version {self.champion} stays"
            if self.same_codebook
            else f"Version {self.champion} is of an earlier codebook, so the current one has no CTR champion"
        )
        return (
            f"CTR model version {self.version} did not pass the gate: {'; '.join(self.reasons)}. {consequence}; change "
            "the data or train.*, or the limits under ctr_gate.* if they are wrong for your log"
        )

    def summary(self) -> str:
        if self.version is None:
            return self.note
        text = f"AUC {self.shown('auc')}, GAUC {self.shown('gauc')}"
        if self.auc is None or self.auc_control is None:
            return text
        return f"{text}; {self.shown('auc_control')} without semantic IDs (lift {self.auc - self.auc_control:+.4f})"

    def shown(self, metric: str) -> str:
        value = getattr(self, metric)
        return "undefined" if value is None else f"{value:.4f}"


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
        return _nothing(log)
    inputs = model_inputs(config, codebook)
    ids_key = f"{codebook.hash[:16]}-{versions[SEMANTIC_IDS.name]}"
    settings = fingerprint(
        [
            config.train.model_dump(mode="json", exclude=ABOUT_THE_LOG),
            config.ctr_gate.model_dump(mode="json"),
            asdict(inputs),
        ]
    )[:16]
    train_key = f"{RECIPE}-{ids_key}-{examples_key(config, log.source.fingerprint)}-{settings}"
    done = registry.ctr_models.newest(lambda version: version.train_key == train_key)
    if done is not None:
        restore_ctr_champion(registry, codebook.hash)
        stored = {**done.result, "version": done.number, "nothing_to_do": True}
        return TrainResult(**{**stored, "seconds": time.monotonic() - began})

    published = warehouse.read(SEMANTIC_IDS, versions[SEMANTIC_IDS.name]).where(
        F.col("codebook_version") == codebook.number
    )
    coverage = coverage_of(log, published.select("item_id"), config.train)
    report("building examples")
    examples_version = write_examples(config, warehouse, published, log, ids_key)
    sizes = check_splits(warehouse.read(CTR_EXAMPLES, examples_version), log)
    groups = row_groups(warehouse.files(CTR_EXAMPLES, examples_version))

    def fitted(name: str, inputs: ModelInputs) -> _Fitted:
        checkpoint = TrainingCheckpoint(
            f"{warehouse.root}/{CHECKPOINTS}/{name.replace(' ', '-')}", f"{train_key}-{name}"
        )
        return _fit(config.train, inputs, groups, checkpoint, lambda text: report(f"{name}, {text}"))

    models = {WITH_IDS: fitted(WITH_IDS, inputs)}
    if config.train.control:
        models[WITHOUT_IDS] = fitted(WITHOUT_IDS, replace(inputs, scheme=None))
    metrics = {name: measure(model.test) for name, model in models.items()}
    ours, control = metrics[WITH_IDS], metrics.get(WITHOUT_IDS)
    result = TrainResult(
        version=0,
        auc=_defined(ours.auc),
        auc_control=_defined(control.auc) if control else None,
        gauc=_defined(ours.gauc),
        gauc_control=_defined(control.gauc) if control else None,
        gauc_users=ours.gauc_users,
        log_loss=_defined(ours.log_loss),
        log_loss_control=_defined(control.log_loss) if control else None,
        calibration=_defined(ours.calibration),
        auc_cold=_defined(ours.auc_cold),
        rows_in=log.rows_in,
        rows_used=log.rows_used,
        dropped=log.dropped,
        examples=sum(rows for rows, _ in sizes.values()),
        without_negative=log.rows_used - sum(clicks for _, clicks in sizes.values()) if log.positives_only else 0,
        items=coverage.items,
        without_id=coverage.items_without,
        share_without_id=coverage.share_without,
        note=log.note,
    )
    champion = last_champion(registry, codebook.hash)
    verdict = _verdict(config, warehouse, registry, champion, codebook, log, groups, models[WITH_IDS].test, report)
    result = replace(
        result,
        champion=champion.number if champion else None,
        same_codebook=champion is None or champion.codebook_hash == codebook.hash,
        reasons=verdict.reasons,
        differences={name: asdict(difference) for name, difference in verdict.differences.items()},
    )
    picture = pictures / f"ctr-{codebook.hash[:12]}.png"
    curves = {name: model.validation_auc for name, model in models.items()}
    draw_ctr(curves, *_by_rarity({name: model.test for name, model in models.items()}), picture)
    table_versions = {**versions, CTR_EXAMPLES.name: examples_version}
    tags = ctr_tags(
        codebook=codebook,
        train_key=train_key,
        passed=result.passed,
        table_versions=table_versions,
        run_date=run_date,
        result=asdict(result),
    )
    with (
        registry.run("train", config, {k: v for k, v in tags.items() if k != "result"}) as run_,
        tempfile.TemporaryDirectory() as scratch,
    ):
        for name, value in _metrics(result).items():
            registry.client.log_metric(run_.info.run_id, name, value)
        registry.client.log_artifact(run_.info.run_id, str(picture), "pictures")
        folder = Path(scratch) / "dmqn"
        facts = {"features": list(FEATURES), "table_versions": table_versions}
        save_model(folder, models[WITH_IDS].model, inputs, codebook.hash, facts)
        model = register(registry, CTR_MODEL, Path(__file__).parent / "ctr" / "dmqn_model.py", folder, tags)
    registry.ctr_models.set_alias(CANDIDATE, model.number)
    restore_ctr_champion(registry, codebook.hash)
    for fit in models.values():
        fit.checkpoint.delete()
    return replace(result, version=model.number, seconds=time.monotonic() - began)


def model_inputs(config: Config, codebook: CodebookVersion) -> ModelInputs:
    """What the model reads of items with codes of `codebook`.

    Raises:
        ConfigError: the token table has no row for each code.
    """
    alternates = max(1, config.encode.alternates)
    try:
        scheme = TokenScheme(
            config.train.tokens, codebook.levels, codebook.components, alternates, config.train.token_rows
        )
    except ValueError as error:
        raise ConfigError(f"train.token_rows = {config.train.token_rows}: {error}") from error
    return ModelInputs(scheme, config.train.item_rows, config.train.history)


def _verdict(
    config: Config,
    warehouse: Warehouse,
    registry: Registry,
    champion: CtrVersion | None,
    codebook: CodebookVersion,
    log: Log,
    groups: tuple[ExampleRowGroup, ...],
    test: Scores,
    report: Callable[[str], None],
) -> CtrVerdict:
    """The gate's verdict on scores of the test split. A champion of another codebook scores the same impressions with
    codes of its own. The first model passes.
    """
    if champion is None:
        return CtrVerdict((), {})
    report("comparing with the champion")
    limits = CtrLimits(**config.ctr_gate.model_dump())
    ctr = load_ctr(registry, champion)

    def compared(groups: tuple[ExampleRowGroup, ...]) -> CtrVerdict:
        stream = ExampleStream(groups, "test", ctr.inputs, config.train.batch_positions)
        return compare(test, predict(ctr.model, stream), limits, config.train.seed)

    if champion.codebook_hash == codebook.hash:
        return compared(groups)
    ids = warehouse.read(SEMANTIC_IDS).where(F.col("codebook_version") == champion.codebook_version)
    with (
        warehouse.staged(read_rows(log, warehouse.spark), "interactions") as rows,
        warehouse.staged(
            build_examples(rows, item_codes(ids), log, config.train), "champion_examples", CTR_EXAMPLES
        ) as examples,
    ):
        return compared(row_groups(data_files(examples)))


@dataclass(frozen=True, eq=False)
class _Fitted:
    """A trained model and its scores of the test split."""

    model: DMQN
    validation_auc: tuple[float, ...]
    test: Scores
    checkpoint: TrainingCheckpoint


def _fit(
    config: TrainConfig,
    inputs: ModelInputs,
    groups: tuple[ExampleRowGroup, ...],
    checkpoint: TrainingCheckpoint,
    report: Callable[[str], None],
) -> _Fitted:
    """Train a model on the files of `ctr_examples`; a training that was killed goes on from its checkpoint."""

    def stream(split: str, *, shuffle: bool = False) -> ExampleStream:
        return ExampleStream(groups, split, inputs, config.batch_positions, shuffle=shuffle, seed=config.seed)

    shape = DMQNShape(len(FEATURES), config.width, config.interest_codebooks, config.codewords)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = new_model(inputs, shape).to("cuda" if torch.cuda.is_available() else "cpu")
    with without_denormals():
        trained = train(
            model,
            stream("train", shuffle=True).at,
            stream("validation"),
            epochs=config.epochs,
            learning_rate=config.learning_rate,
            seed=config.seed,
            checkpoint=checkpoint,
            progress=lambda progress: report(str(progress)),
        )
        return _Fitted(model, trained.validation_auc, predict(model, stream("test")), checkpoint)


def _nothing(log: Log) -> TrainResult:
    return TrainResult(
        version=None,
        auc=None,
        auc_control=None,
        gauc=None,
        gauc_control=None,
        gauc_users=0,
        log_loss=None,
        log_loss_control=None,
        calibration=None,
        auc_cold=None,
        rows_in=log.rows_in,
        rows_used=0,
        dropped=log.dropped,
        examples=0,
        without_negative=0,
        items=0,
        without_id=0,
        share_without_id=0.0,
        note=log.note,
        nothing_to_do=True,
    )


def _metrics(result: TrainResult) -> dict[str, float]:
    """The numbers of a result under the names they have in MLflow."""
    facts = {**asdict(result), **{f"dropped_{reason}": count for reason, count in result.dropped.items()}}
    left_out = ("version", "champion", "same_codebook", "seconds", "nothing_to_do")
    return {name: value for name, value in facts.items() if isinstance(value, int | float) and name not in left_out}


def _defined(value: float) -> float | None:
    """None instead of NaN, which JSON does not have."""
    return None if math.isnan(value) else value


def _by_rarity(test: Mapping[str, Scores]) -> tuple[list[str], dict[str, list[float]]]:
    """Test AUC of each model by how often the item was shown in training: the ranges, and the AUCs by model."""
    first = next(iter(test.values()))
    shown = first.shown
    bounds = [-1, 0]
    if (shown > 0).any():
        bounds += np.unique(np.quantile(shown[shown > 0], [0.25, 0.5, 0.75]).astype(int)).tolist()
    names: list[str] = []
    aucs: dict[str, list[float]] = {name: [] for name in test}
    for low, high in zip(bounds, [*bounds[1:], int(shown.max())], strict=True):
        rows = (shown > low) & (shown <= high)
        if rows.sum() >= 50 and 0 < first.label[rows].sum() < rows.sum():
            names.append("0" if high == 0 else f"{low + 1}-{high}")
            for name, scores in test.items():
                aucs[name].append(auc(scores.label[rows], scores.score[rows]))
    return names, aucs
