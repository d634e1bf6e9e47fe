"""evaluate: `semantic_ids` of a version + `item_embeddings` -> `quality_reports`, with the verdict of the gate and pictures.

Every number is exact over the whole catalogue, except neighbour recall, which is exact over a sample of stated size.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from jobs.config import Config
from jobs.embeddings.packed import unpack
from jobs.errors import SchemaError
from jobs.fingerprint import fingerprint
from jobs.models.champion import check_rows
from jobs.models.codebooks import Files, codebook_files, usable_files, worker_codebook
from jobs.models.registry import Registry
from jobs.models.versions import CodebookVersion
from jobs.pictures import draw_likelihood, draw_usage
from jobs.warehouse.delta_spark import Warehouse
from jobs.warehouse.releases import versions_to_judge
from jobs.warehouse.reports import QualityReport, UncertainItem, report
from jobs.warehouse.tables import ITEM_EMBEDDINGS, QUALITY_REPORTS, SEMANTIC_IDS
from tokenizer import RQGMM, Thresholds, check_gate, level_usage, neighbour_recall

RECIPE = 2  # of the metrics: a report of an earlier one is made anew
LIKELIHOOD_SAMPLE = 50_000
LEAST_CERTAIN = 20  # items that a report names
ERRORS = pa.schema(
    [
        ("dim", pa.int32()),
        ("items", pa.int64()),
        ("squared_error", pa.float64()),
        ("common", pa.int64()),
        ("common_squared_error", pa.float64()),
        ("champion_squared_error", pa.float64()),
    ]
)


@dataclass(frozen=True)
class EvaluateResult(QualityReport):
    pictures: tuple[Path, ...] = ()
    seconds: float = 0.0
    nothing_to_do: bool = False


def run(
    config: Config, warehouse: Warehouse, registry: Registry, model: CodebookVersion, champion: CodebookVersion | None,
    run_date: date, pictures: Path,
) -> EvaluateResult:  # fmt: skip
    """Measure the IDs of `model` and judge them, against the champion's where there is one.

    Raises:
        SchemaError: the version has no IDs yet, or not for the whole catalogue, or was fitted on vectors of another recipe.
        RegistryMismatch: the version has IDs of another codebook, or its files are gone.
        CodebookError: its files are damaged.
    """
    began = time.monotonic()
    check_rows(warehouse.root, model)
    versions = versions_to_judge(warehouse, model.number)
    rival = champion if champion is not None and champion.number != model.number else None
    run_id = fingerprint([RECIPE, versions, model.hash, config.digest("gate", "evaluate")])[:16]
    # A champion was judged against its predecessor when it was promoted; that report stands.
    judged_against = rival.number if rival else None
    found = report(warehouse.root, model.number, run_id)
    if found is not None and (rival is None or found.judged_against == judged_against):
        drawn = tuple(sorted(pictures.glob(f"*-{model.hash[:12]}.png")))
        stored = {field.name: getattr(found, field.name) for field in fields(found)}
        return EvaluateResult(**stored, pictures=drawn, seconds=time.monotonic() - began, nothing_to_do=True)

    embeddings = warehouse.read(ITEM_EMBEDDINGS, versions[ITEM_EMBEDDINGS.name])
    published = warehouse.read(SEMANTIC_IDS, versions[SEMANTIC_IDS.name])
    ids = published.where(F.col("codebook_version") == model.number).cache()
    missing = embeddings.join(ids, ["item_id", "content_hash"], how="left_anti").count()
    if missing or ids.isEmpty():
        raise SchemaError(
            f"{missing} items of item_embeddings have no semantic ID of codebook version {model.number}; the report is over the "
            "whole catalogue. Run `sid encode` first"
        )
    rivals = published.where(F.col("codebook_version") == (rival.number if rival else -1))
    counts = code_counts(ids, model.levels, model.components)
    files = usable_files(warehouse, registry, model)
    codebook = worker_codebook(files, model.hash)
    rival_codebook = (codebook_files(registry, rival), rival.hash) if rival else None
    metrics = {
        **_usage_metrics(counts),
        **_collision_metrics(ids, embeddings),
        **_id_metrics(ids, rivals),
        **_error_metrics(warehouse, embeddings, ids, rivals, (files, model.hash), rival_codebook),
        "neighbour_recall": _sampled_recall(embeddings, ids, codebook, config.evaluate.neighbour_sample),
    }
    least_certain = tuple(
        UncertainItem(**row.asDict())
        # Held ones last: their codes are an earlier codebook's, so that of this one's the posterior is near 0 by intent.
        for row in ids.orderBy("held", "confidence", "item_id").limit(LEAST_CERTAIN)
        .select("item_id", "semantic_id", "confidence", "log_likelihood").collect()
    )  # fmt: skip
    baseline = {"rmse": metrics["champion_rmse"]} if "champion_rmse" in metrics else None
    verdict = check_gate(
        {**metrics, "rmse": metrics.get("common_rmse", metrics["rmse"])}, _thresholds(config), baseline
    )

    short = model.hash[:12]
    usage, likelihood = pictures / f"usage-{short}.png", pictures / f"likelihood-{short}.png"
    draw_usage(counts, usage)
    draw_likelihood(*_likelihoods(ids, embeddings, run_date), likelihood)
    ids.unpersist()
    tags = {
        "codebook_version": str(model.number),
        "codebook_hash": model.hash,
        "table_versions": json.dumps(versions),
    }
    with registry.run("evaluate", config, {**tags, "verdict": "passed" if verdict.passed else "failed"}) as run_:
        for name, value in metrics.items():
            registry.client.log_metric(run_.info.run_id, name, value)
        for picture in (usage, likelihood):
            registry.client.log_artifact(run_.info.run_id, str(picture), "pictures")
    row = {
        "codebook_version": model.number,
        "run_id": run_id,
        "codebook_hash": model.hash,
        "metrics": metrics,
        "passed": verdict.passed,
        "reasons": list(verdict.reasons),
        "least_certain": [asdict(item) for item in least_certain],
        "judged_against": judged_against,
        "table_versions": versions,
        "run_date": run_date,
    }
    warehouse.merge(QUALITY_REPORTS, warehouse.rows(QUALITY_REPORTS, [row]), update=True)
    return EvaluateResult(
        model.number,
        run_id,
        verdict.passed,
        tuple(verdict.reasons),
        metrics,
        least_certain,
        versions,
        judged_against,
        (usage, likelihood),
        time.monotonic() - began,
    )


def code_counts(ids: DataFrame, levels: int, components: int) -> npt.NDArray[np.int64]:
    """Items per component of each level, (L, K)."""
    counts = np.zeros((levels, components), np.int64)
    for row in ids.select(F.posexplode("codes").alias("level", "code")).groupBy("level", "code").count().collect():
        counts[row["level"], row["code"]] = row["count"]
    return counts


def _usage_metrics(counts: npt.NDArray[np.int64]) -> dict[str, float]:
    usage = level_usage(torch.from_numpy(counts))
    per_level = {
        f"{name}_{level}": float(getattr(u, name))
        for level, u in enumerate(usage, 1)
        for name in ("utilization", "perplexity", "dead", "gini")
    }
    return {
        **per_level,
        "utilization": min(u.utilization for u in usage),
        "perplexity": min(u.perplexity for u in usage),
        "dead": float(sum(u.dead for u in usage)),
        "gini": max(u.gini for u in usage),
    }


def _collision_metrics(ids: DataFrame, embeddings: DataFrame) -> dict[str, float]:
    """Distinct code tuples and the largest group that shares one; items with equal vectors, which nothing can separate, apart."""
    groups = (
        ids.groupBy("codes")
        .count()
        .agg(F.count(F.lit(1)).alias("distinct"), F.max("count").alias("largest"), F.sum("count").alias("items"))
        .first()
    )
    assert groups is not None
    vectors = embeddings.select(F.countDistinct("content_hash").alias("vectors")).first()
    assert vectors is not None
    return {
        "items": float(groups["items"]),
        "distinct_ids": float(groups["distinct"]),
        "distinct": groups["distinct"] / groups["items"],
        "largest_collision": float(groups["largest"]),
        "largest_collision_share": groups["largest"] / groups["items"],
        "items_with_a_twin": float(groups["items"] - vectors["vectors"]),
    }


def _id_metrics(ids: DataFrame, rivals: DataFrame) -> dict[str, float]:
    means = ids.agg(
        F.mean("confidence").alias("mean_confidence"),
        F.mean("log_likelihood").alias("mean_log_likelihood"),
        F.stddev_pop("log_likelihood").alias("std_log_likelihood"),
        F.mean(F.col("held").cast("double")).alias("held"),
    ).first()
    assert means is not None
    metrics = {name: float(value) for name, value in means.asDict().items()}
    former = rivals.select("item_id", F.col("codes").alias("former"))
    moved = (
        ids.join(former, "item_id", how="inner")
        .agg(F.mean((F.col("codes") != F.col("former")).cast("double")).alias("churn"))
        .first()
    )
    assert moved is not None
    return metrics if moved["churn"] is None else {**metrics, "churn": float(moved["churn"])}


def _error_metrics(
    warehouse: Warehouse, embeddings: DataFrame, ids: DataFrame, rivals: DataFrame,
    codebook: tuple[Files, str], rival: tuple[Files, str] | None,
) -> dict[str, float]:  # fmt: skip
    """RMSE over the catalogue and, where the champion encoded the same vector, of both codebooks over those items."""
    former = rivals.select("item_id", "content_hash", F.col("codes").alias("former"))
    rows = (
        embeddings.select("item_id", "content_hash", "embedding", "dim")
        .join(ids.select("item_id", "content_hash", "codes"), ["item_id", "content_hash"], how="inner")
        .join(former, ["item_id", "content_hash"], how="left")
        .select("embedding", "dim", "codes", "former")
    )
    shared = warehouse.spark.sparkContext.broadcast((codebook, rival))
    total = (
        rows.mapInArrow(_error_summer(shared), from_arrow_schema(ERRORS))
        .groupBy()
        .agg(*(F.sum(c).alias(c) for c in ERRORS.names[1:]), F.max("dim").alias("dim"))
        .first()
    )
    shared.unpersist()
    assert total is not None
    metrics = {"rmse": float(np.sqrt(total["squared_error"] / total["items"] / total["dim"]))}
    if total["common"]:
        scale = total["common"] * total["dim"]
        metrics["common_rmse"] = float(np.sqrt(total["common_squared_error"] / scale))
        metrics["champion_rmse"] = float(np.sqrt(total["champion_squared_error"] / scale))
    return metrics


def _error_summer(shared: Any) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def sums(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        from jobs.models.codebooks import worker_codebook

        torch.set_num_threads(1)
        codebook, rival = shared.value
        for batch in batches:
            if batch.num_rows:
                yield _error_sums(batch, worker_codebook(*codebook), worker_codebook(*rival) if rival else None)

    return sums


def _error_sums(batch: pa.RecordBatch, rqgmm: RQGMM, rival: RQGMM | None) -> pa.RecordBatch:
    x = torch.tensor(unpack(batch.column("embedding"), rqgmm.dim))  # (n, D)
    error = _squared_errors(x, rqgmm, batch.column("codes"))
    common = batch.column("former").is_valid().to_numpy(zero_copy_only=False)
    rival_error = 0.0
    if rival is not None and common.any():
        rival_error = float(_squared_errors(x[common], rival, batch.column("former").filter(pa.array(common))).sum())
    row = [rqgmm.dim, len(x), float(error.sum()), int(common.sum()), float(error[common].sum()), rival_error]
    return pa.RecordBatch.from_arrays(
        [pa.array([v], kind.type) for v, kind in zip(row, ERRORS, strict=True)], schema=ERRORS
    )


def _squared_errors(x: torch.Tensor, rqgmm: RQGMM, codes: pa.Array) -> npt.NDArray[np.float64]:
    chosen = torch.tensor(codes.flatten().to_numpy(zero_copy_only=False).reshape(len(x), -1))  # (n, L)
    errors: npt.NDArray[np.float64] = (x - rqgmm.decode(chosen)).double().square().sum(1).numpy()
    return errors


def _sampled_recall(embeddings: DataFrame, ids: DataFrame, rqgmm: RQGMM, sample: int) -> float:
    """Neighbour recall@10 of the code space, over the `sample` items with the least hash of their id."""
    rows = (
        embeddings.orderBy(F.xxhash64("item_id"), "item_id").limit(sample).select("item_id", "embedding", "content_hash")
        .join(ids.select("item_id", "codes"), "item_id", how="inner").orderBy("item_id").toArrow()
    )  # fmt: skip
    x = torch.tensor(unpack(rows.column("embedding").combine_chunks(), rqgmm.dim))
    codes = torch.tensor(np.stack(rows.column("codes").to_pylist()).astype(np.int32))
    return float(neighbour_recall(x, rqgmm.decode(codes)))


def _likelihoods(
    ids: DataFrame, embeddings: DataFrame, run_date: date
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    first = embeddings.select("item_id", (F.col("first_seen") == F.lit(run_date)).alias("new"))
    rows = (
        ids.join(first, "item_id", how="inner")
        .orderBy(F.xxhash64("item_id"))
        .limit(LIKELIHOOD_SAMPLE)
        .select("log_likelihood", "new")
        .toArrow()
    )
    values, new = rows.column("log_likelihood").to_numpy(), rows.column("new").to_numpy()
    return values[~new], values[new]


def _thresholds(config: Config) -> Thresholds:
    return Thresholds(**config.gate.model_dump())
