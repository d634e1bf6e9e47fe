"""train: interactions + `semantic_ids` of a release -> `ctr_examples` and the CTR model (DMQN), against a control.

The control is the same network of the same size, trained alike; its items carry codes dealt at random.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from safetensors.torch import save_file

from jobs.config import Config, ConfigError
from jobs.ctr.coverage import coverage_of
from jobs.ctr.examples import EXAMPLE_SETTINGS, EXAMPLES_RECIPE, FEATURES, build_examples, item_codes
from jobs.ctr.log import Log, examine, read_rows
from jobs.ctr.metrics import auc
from jobs.ctr.padded import Examples, Metrics, Trained, shuffled_codes, train_dmqn
from jobs.errors import SchemaError
from jobs.files.sources import open_source
from jobs.models.registry import CANDIDATE, CTR_MODEL, Registry, register
from jobs.models.versions import CodebookVersion, ctr_tags
from jobs.pictures import draw_ctr
from jobs.warehouse.delta_spark import Warehouse
from jobs.warehouse.tables import CTR_EXAMPLES, ITEM_EMBEDDINGS, SEMANTIC_IDS
from tokenizer import item_tokens

SPLITS = ("train", "validation", "test")
EXAMPLES_OF = "sid.examples"  # property of ctr_examples: what it is made of


@dataclass(frozen=True)
class TrainResult:
    """None of a metric is undefined; without a `version` the log had no rows and nothing was trained."""

    version: int | None
    auc: float | None
    auc_control: float | None
    gauc: float | None
    gauc_control: float | None
    gauc_users: int  # that have clicks and non-clicks in the test split: GAUC is over these
    log_loss: float | None
    log_loss_control: float | None
    rows_in: int  # of the log: rows_used + those dropped
    rows_used: int
    dropped: Mapping[str, int]  # by reason
    examples: int
    without_negative: int  # rows for which no negative could be sampled: behaviour, but no examples
    items: int  # of the log
    without_id: int  # of these, how many have no semantic ID
    share_without_id: float  # of the used rows of the log, those about such items
    note: str
    seconds: float = 0.0
    nothing_to_do: bool = False

    def summary(self) -> str:
        if self.version is None:
            return self.note
        text = f"AUC {self.shown('auc')} with semantic IDs, {self.shown('auc_control')} with random codes"
        return (
            text
            if self.auc is None or self.auc_control is None
            else f"{text} (lift {self.auc - self.auc_control:+.4f})"
        )

    def shown(self, metric: str) -> str:
        value = getattr(self, metric)
        return "undefined" if value is None else f"{value:.4f}"


def check_interactions(config: Config, warehouse: Warehouse) -> Log:
    """Examine the interactions before anything else runs; those that the examples of this warehouse are made of are known.

    Raises:
        ConfigError: no interactions are named, or nothing is there.
        SchemaError: nothing can be learned from them.
    """
    if not config.train.interactions:
        raise ConfigError("train.interactions is empty; give a Parquet file of clicks: --set train.interactions=PATH")
    source = open_source(config.train.interactions)
    stored = warehouse.property(CTR_EXAMPLES, EXAMPLES_OF) or ""
    if stored.startswith("{") and (of := json.loads(stored))["key"] == _examples_key(config, source.fingerprint):
        return Log.from_json(of["log"], source)
    try:
        return examine(source, config.train, warehouse.spark)
    except SchemaError as error:
        raise SchemaError(f"train.interactions {config.train.interactions}: {error}") from error


def check_ids(config: Config, warehouse: Warehouse, log: Log) -> None:
    """Whether the log is about the items of this catalogue, before a codebook is fitted.

    Raises:
        SchemaError: it is not.
    """
    if log.rows_used:
        coverage_of(log, warehouse.read(ITEM_EMBEDDINGS).select("item_id"), config.train)


def _examples_key(config: Config, fingerprint: str) -> str:
    """The same for the same examples: recipe, log, settings."""
    settings = {name: value for name, value in config.train.model_dump(mode="json").items() if name in EXAMPLE_SETTINGS}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return f"{EXAMPLES_RECIPE}-{fingerprint[:16]}-{digest}"


def run(
    config: Config, warehouse: Warehouse, registry: Registry, codebook: CodebookVersion, versions: Mapping[str, int],
    run_date: date, pictures: Path, told: Callable[[str], None], log: Log,
) -> TrainResult:  # fmt: skip
    """Train on the semantic IDs of `codebook` at the pinned table `versions` and register a candidate.

    Raises:
        SchemaError: the log is about other items, or a part of it holds nothing to learn.
    """
    began = time.monotonic()
    if not log.rows_used:
        return _nothing(log)
    examples_key = _examples_key(config, log.source.fingerprint)
    ids_key = f"{codebook.hash[:16]}-{versions[SEMANTIC_IDS.name]}"
    train_key = f"{ids_key}-{examples_key}-{config.digest('train')}"
    done = registry.ctr_models.newest(lambda version: version.train_key == train_key)
    if done is not None:
        stored_result = {**done.result, "version": done.number, "nothing_to_do": True}
        return TrainResult(**{**stored_result, "seconds": time.monotonic() - began})

    published = warehouse.read(SEMANTIC_IDS, versions[SEMANTIC_IDS.name]).where(
        F.col("codebook_version") == codebook.number
    )
    coverage = coverage_of(log, published.select("item_id"), config.train)
    ids = published.select("item_id", "codes").orderBy("item_id").toArrow()
    told("building examples")
    stored = json.loads(warehouse.property(CTR_EXAMPLES, EXAMPLES_OF) or "{}") if log.seen_before else {}
    if stored.get("ids") != ids_key:
        if warehouse.exists(CTR_EXAMPLES):
            # Killed before the property is set again, the next run must not take these rows for those of the old log.
            warehouse.set_property(CTR_EXAMPLES, EXAMPLES_OF, "")
        with warehouse.staged(read_rows(log, warehouse.spark), "interactions") as rows:
            warehouse.replace(CTR_EXAMPLES, build_examples(rows, item_codes(published), log, config.train), "")
        of = {"key": examples_key, "log": log.to_json(), "ids": ids_key}
        warehouse.set_property(CTR_EXAMPLES, EXAMPLES_OF, json.dumps(of))
    examples_version = warehouse.version(CTR_EXAMPLES)
    # In a fixed order, so that the same examples train the same model however Spark wrote them.
    order = ("user_id", "ts", "item_id", "label")
    table = one_row_an_impression(warehouse.read(CTR_EXAMPLES, examples_version), config.train.history)
    table = table.orderBy(*order).toArrow()
    splits, items = as_tensors(table, config.train.history)
    for name in SPLITS:
        clicks, rows_of_split = int(splits[name].label.sum()), len(splits[name])
        if not 0 < clicks < rows_of_split:
            raise SchemaError(
                f"the {name} split has {clicks:,} clicks in {rows_of_split:,} examples; expected clicks and non-clicks in each of "
                f"{', '.join(SPLITS)}, which follow each other in time ({log.note}). Give a longer log"
            )
    components = codebook.components
    codes = _codes(ids, items)
    with_ids = _trained("with semantic IDs", splits, codes, components, config, told)
    control = _trained("control", splits, shuffled_codes(codes, config.train.seed), components, config, told)
    if not math.isfinite(with_ids.test.log_loss + control.test.log_loss):
        raise ConfigError(
            f"training diverged: with train.learning_rate = {config.train.learning_rate:g} the model scores NaN; expected numbers. "
            "Lower it"
        )
    clicks = sum(int(split.label.sum()) for split in splits.values())
    result = TrainResult(
        version=0,
        **_named(with_ids.test, ""),
        **{name: value for name, value in _named(control.test, "_control").items() if name != "gauc_users_control"},
        rows_in=log.rows_in,
        rows_used=log.rows_used,
        dropped=log.dropped,
        examples=table.num_rows,
        without_negative=log.rows_used - clicks if log.positives_only else 0,
        items=coverage.items,
        without_id=coverage.items_without,
        share_without_id=coverage.share_without,
        note=log.note,
    )
    picture = pictures / f"ctr-{codebook.hash[:12]}.png"
    draw_ctr(with_ids.validation_auc, control.validation_auc, *_by_rarity(splits, with_ids, control), picture)
    table_versions = {**versions, CTR_EXAMPLES.name: examples_version}
    tags = ctr_tags(
        codebook=codebook,
        train_key=train_key,
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
        _save(folder, with_ids, codes, components, items, codebook.hash, table_versions)
        model = register(registry, CTR_MODEL, Path(__file__).parent / "ctr" / "dmqn_model.py", folder, tags)
    registry.ctr_models.set_alias(CANDIDATE, model.number)
    return replace(result, version=model.number, seconds=time.monotonic() - began)


def _nothing(log: Log) -> TrainResult:
    return TrainResult(
        version=None, auc=None, auc_control=None, gauc=None, gauc_control=None, gauc_users=0, log_loss=None,
        log_loss_control=None, rows_in=log.rows_in, rows_used=0, dropped=log.dropped, examples=0, without_negative=0, items=0,
        without_id=0, share_without_id=0.0, note=log.note, nothing_to_do=True,
    )  # fmt: skip


def _metrics(result: TrainResult) -> dict[str, float]:
    """The numbers of a result under the names they have in MLflow."""
    facts = {**asdict(result), **{f"dropped_{reason}": count for reason, count in result.dropped.items()}}
    left_out = ("version", "seconds", "nothing_to_do")
    return {name: value for name, value in facts.items() if isinstance(value, int | float) and name not in left_out}


def one_row_an_impression(users: DataFrame, history: int) -> DataFrame:
    """Each impression of `ctr_examples` with the items of its history, oldest first."""
    exploded = users.select(
        "user_id", F.col("behaviours.item_id").alias("behaviours"), F.explode("impressions").alias("one")
    )
    first = F.greatest(F.col("one.known") - history, F.lit(0)) + 1
    known = F.slice("behaviours", first, F.least(F.col("one.known"), F.lit(history))).alias("history")
    return exploded.select("user_id", "one.item_id", "one.label", "one.ts", known, "one.features", "one.split")


def as_tensors(table: pa.Table, keep: int) -> tuple[dict[str, Examples], list[str]]:
    """Each split as tensors, and the items: item n of the list has row n + 1, row 0 is padding."""
    history = table.column("history").combine_chunks()
    flat = history.flatten()
    vocabulary = pc.unique(pa.chunked_array([table.column("item_id").combine_chunks(), flat])).sort()

    def row_of(values: pa.Array) -> npt.NDArray[np.int32]:
        rows: npt.NDArray[np.int32] = pc.index_in(values, vocabulary).to_numpy(zero_copy_only=False).astype(np.int32)
        return rows + 1

    lengths = pc.list_value_length(history).to_numpy(zero_copy_only=False)
    longest = max(1, min(keep, int(lengths.max(initial=1))))
    padded = np.zeros((table.num_rows, longest), np.int32)
    columns = np.arange(longest)[None, :] >= longest - lengths[:, None]  # right-aligned
    padded[columns] = row_of(flat)
    features = (
        table.column("features").combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, len(FEATURES))
    )
    item = row_of(table.column("item_id").combine_chunks())
    label = table.column("label").to_numpy().astype(np.float32)
    user = (
        table.column("user_id")
        .combine_chunks()
        .dictionary_encode()
        .indices.to_numpy(zero_copy_only=False)
        .astype(np.int64)
    )
    split = np.array(table.column("split").to_pylist())
    splits = {}
    for name in SPLITS:
        rows = split == name
        splits[name] = Examples(
            *(torch.from_numpy(np.ascontiguousarray(a[rows])) for a in (item, padded, features, label, user))
        )
    return splits, vocabulary.to_pylist()


def _codes(ids: pa.Table, items: list[str]) -> torch.Tensor:
    """(items + 1, L) codes by item row; -1 for padding and for items without a semantic ID."""
    codes = ids.column("codes").combine_chunks()
    flat = codes.flatten().to_numpy(zero_copy_only=False).reshape(len(codes), -1)
    place = (
        pc.index_in(pa.array(items), ids.column("item_id").combine_chunks())
        .fill_null(-1)
        .to_numpy(zero_copy_only=False)
    )
    rows = np.full((len(items) + 1, flat.shape[1]), -1, np.int64)
    rows[1:][place >= 0] = flat[place[place >= 0]]
    return torch.from_numpy(rows)


def _trained(
    name: str,
    splits: dict[str, Examples],
    codes: torch.Tensor,
    components: int,
    config: Config,
    told: Callable[[str], None],
) -> Trained:
    train, validation, test = (splits[split] for split in SPLITS)
    return train_dmqn(
        train, validation, test, codes, components, config.train,
        lambda epoch, auc: told(f"{name}, epoch {epoch}, validation AUC {auc:.4f}"),
    )  # fmt: skip


def _named(metrics: Metrics, suffix: str) -> dict[str, Any]:
    """None instead of NaN, which JSON does not have."""
    return {f"{name}{suffix}": None if math.isnan(value) else value for name, value in asdict(metrics).items()}


def _by_rarity(
    splits: dict[str, Examples], with_ids: Trained, control: Trained
) -> tuple[list[str], list[float], list[float]]:
    """Test AUC of both models by how often the item was shown in training."""
    test = splits["test"]
    seen = torch.bincount(splits["train"].item.long(), minlength=int(test.item.max()) + 1)[test.item.long()].numpy()
    bounds = (
        [0, *np.unique(np.quantile(seen[seen > 0], [0.25, 0.5, 0.75]).astype(int)).tolist()]
        if (seen > 0).any()
        else [0]
    )
    names, ours, theirs = [], [], []
    for low, high in zip([-1, *bounds], [*bounds, int(seen.max())], strict=True):
        rows = (seen > low) & (seen <= high)
        if rows.sum() >= 50 and len(np.unique(test.label.numpy()[rows])) == 2:
            names.append("0" if high == 0 else f"{low + 1}-{high}")
            ours.append(auc(test.label.numpy()[rows], with_ids.scores[rows]))
            theirs.append(auc(test.label.numpy()[rows], control.scores[rows]))
    return names, ours, theirs


def _save(
    folder: Path,
    trained: Trained,
    codes: torch.Tensor,
    components: int,
    items: list[str],
    codebook_hash: str,
    table_versions: Mapping[str, int],
) -> None:
    folder.mkdir(parents=True)
    tensors = {name: value.contiguous() for name, value in trained.model.state_dict().items()}
    tokens, _ = item_tokens(codes, components)
    save_file(
        {**{f"model.{name}": value for name, value in tensors.items()}, "item_tokens": tokens},
        str(folder / "dmqn.safetensors"),
    )
    manifest = {
        "shape": asdict(trained.model.shape),
        "items": items,
        "features": list(FEATURES),
        "codebook_hash": codebook_hash,
        "table_versions": dict(table_versions),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest) + "\n")
