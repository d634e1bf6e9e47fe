"""train: interactions + `semantic_ids` of a release -> `ctr_examples` and the CTR model (DMQN), against a control.

The control is the same network of the same size, trained alike; its items carry codes dealt at random.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pyspark.sql import functions as F
from safetensors.torch import save_file

from jobs.config import Config, ConfigError
from jobs.ctr.examples import FEATURES, build_examples, read_log
from jobs.ctr.training import Examples, Metrics, Trained, item_tokens, shuffled_codes, train_dmqn
from jobs.pictures import draw_ctr
from jobs.registry import CANDIDATE, CTR_MODEL, ModelVersion, Registry, pinned, register
from jobs.sources import open_source
from jobs.tables import CTR_EXAMPLES, SEMANTIC_IDS, SchemaError, Warehouse

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class TrainResult:
    version: int
    auc: float
    auc_control: float
    gauc: float
    gauc_control: float
    log_loss: float
    log_loss_control: float
    examples: int
    without_id: int  # items of the log that have no semantic ID
    note: str
    seconds: float = 0.0
    nothing_to_do: bool = False


def run(
    config: Config, warehouse: Warehouse, registry: Registry, codebook: ModelVersion, versions: Mapping[str, int],
    run_date: date, pictures: Path, told: Callable[[str], None],
) -> TrainResult:  # fmt: skip
    """Train on the semantic IDs of `codebook` at the pinned table `versions` and register a candidate.

    Raises:
        ConfigError: no interactions, or none that could be learned from.
    """
    began = time.monotonic()
    if not config.train.interactions:
        raise ConfigError("train.interactions is empty; give a Parquet file of clicks: --set train.interactions=PATH")
    log_stamp = open_source(config.train.interactions).fingerprint[:16]
    train_key = (
        f"{codebook.tags['codebook_hash'][:16]}-{versions[SEMANTIC_IDS.name]}-{log_stamp}-{config.digest('train')}"
    )
    found = registry.find(CTR_MODEL, "train_key", train_key)
    if found is not None:
        return TrainResult(
            **{
                **json.loads(found.tags["result"]),
                "version": found.version,
                "seconds": time.monotonic() - began,
                "nothing_to_do": True,
            }
        )

    ids = (
        warehouse.read(SEMANTIC_IDS, versions[SEMANTIC_IDS.name])
        .where(F.col("codebook_version") == codebook.version)
        .select("item_id", "codes").orderBy("item_id").toArrow()
    )  # fmt: skip
    log = read_log(warehouse.spark, config.train)
    told("building examples")
    examples_key = f"{log_stamp}-{config.digest('train')}"
    if warehouse.property(CTR_EXAMPLES, "sid.examples") != examples_key:
        warehouse.replace(CTR_EXAMPLES, build_examples(log, config.train), "")
        warehouse.set_property(CTR_EXAMPLES, "sid.examples", examples_key)
    examples_version = warehouse.version(CTR_EXAMPLES)
    # In a fixed order, so that the same examples train the same model however Spark wrote them.
    order = ("user_id", "ts", "item_id", "label")
    table = warehouse.read(CTR_EXAMPLES, examples_version).orderBy(*order).toArrow()
    splits, items = as_tensors(table, config.train.history)
    for name in SPLITS:
        if not 0 < float(splits[name].label.sum()) < len(splits[name]):
            raise SchemaError(
                f"the {name} split has {len(splits[name])} examples of one class; expected clicks and non-clicks. Give a longer log"
            )
    components = int(codebook.tags["shape"].split("x")[1])
    codes = _codes(ids, items)
    with_ids = _trained("with semantic IDs", splits, codes, components, config, told)
    control = _trained("control", splits, shuffled_codes(codes, config.train.seed), components, config, told)
    result = TrainResult(
        version=0,
        **_named(with_ids.test, ""),
        **_named(control.test, "_control"),
        examples=table.num_rows,
        without_id=int((codes[1:, 0] < 0).sum()),
        note=log.note,
    )
    picture = pictures / f"ctr-{codebook.tags['codebook_hash'][:12]}.png"
    draw_ctr(with_ids.validation_auc, control.validation_auc, *_by_rarity(splits, with_ids, control), picture)
    tags = {
        "train_key": train_key,
        "codebook_version": str(codebook.version),
        "codebook_hash": codebook.tags["codebook_hash"],
        "table_versions": pinned({**versions, CTR_EXAMPLES.name: examples_version}),
        "run_date": str(run_date),
        "result": json.dumps(asdict(result)),
    }
    with (
        registry.run("train", config, {k: v for k, v in tags.items() if k != "result"}) as run_,
        tempfile.TemporaryDirectory() as scratch,
    ):
        for name, value in asdict(result).items():
            if isinstance(value, float):
                registry.client.log_metric(run_.info.run_id, name, value)
        registry.client.log_artifact(run_.info.run_id, str(picture), "pictures")
        folder = Path(scratch) / "dmqn"
        _save(folder, with_ids, codes, components, items, tags)
        model = register(registry, CTR_MODEL, Path(__file__).parent / "ctr" / "dmqn_model.py", folder, tags)
    registry.set_alias(CTR_MODEL, CANDIDATE, model.version)
    return TrainResult(**{**asdict(result), "version": model.version, "seconds": time.monotonic() - began})


def as_tensors(table: pa.Table, keep: int) -> tuple[dict[str, Examples], list[str]]:
    """Each split as tensors, and the items: item n of the list has row n + 1, row 0 is padding."""
    history = table.column("history").combine_chunks()
    flat = history.flatten()
    vocabulary = pc.unique(pa.chunked_array([table.column("item_id").combine_chunks(), flat])).sort()
    row_of = lambda values: pc.index_in(values, vocabulary).to_numpy(zero_copy_only=False).astype(np.int32) + 1  # noqa: E731
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
    return train_dmqn(
        *(splits[split] for split in SPLITS), codes, components, config.train,
        lambda epoch, auc: told(f"{name}, epoch {epoch}, validation AUC {auc:.4f}"),
    )  # fmt: skip


def _named(metrics: Metrics, suffix: str) -> dict[str, float]:
    return {f"{name}{suffix}": value for name, value in asdict(metrics).items()}


def _by_rarity(
    splits: dict[str, Examples], with_ids: Trained, control: Trained
) -> tuple[list[str], list[float], list[float]]:
    """Test AUC of both models by how often the item was shown in training."""
    from jobs.ctr.training import auc

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
        if rows.sum() >= 50:
            names.append("0" if high == 0 else f"{low + 1}-{high}")
            ours.append(auc(test.label.numpy()[rows], with_ids.scores[rows]))
            theirs.append(auc(test.label.numpy()[rows], control.scores[rows]))
    return names, ours, theirs


def _save(
    folder: Path, trained: Trained, codes: torch.Tensor, components: int, items: list[str], tags: Mapping[str, str]
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
        "codebook_hash": tags["codebook_hash"],
        "table_versions": json.loads(tags["table_versions"]),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest) + "\n")
