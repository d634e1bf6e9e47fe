"""evaluate: `semantic_ids` of a version + `item_embeddings` -> a row of `quality_reports` with the verdict of the gate.

Every metric is exact over the whole catalogue, except neighbour recall, which is over a sample of
`evaluate.neighbour_sample` items.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, fields
from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from jobs.config import Config
from jobs.embeddings.packed import unpack
from jobs.errors import SchemaError
from jobs.fingerprint import fingerprint
from jobs.models.champion import check_hashes
from jobs.models.codebooks import load_files, usable_files
from jobs.models.registry import Registry
from jobs.models.versions import CodebookVersion
from jobs.pictures import draw_likelihood, draw_usage
from jobs.warehouse.delta_spark import Warehouse
from jobs.warehouse.releases import versions_to_evaluate
from jobs.warehouse.reports import QualityReport, UncertainItem, make_newest, report
from jobs.warehouse.tables import ITEM_EMBEDDINGS, QUALITY_REPORTS, SEMANTIC_IDS
from tokenizer import RQGMM, Thresholds, check_gate, level_usage, neighbour_recall

RECIPE = 2  # version of the metrics: with another one every report is computed again
LIKELIHOOD_SAMPLE = 50_000
LEAST_CERTAIN = 20  # items with the lowest confidence in a report


@dataclass(frozen=True)
class EvaluateResult(QualityReport):
    pictures: tuple[Path, ...] = ()
    seconds: float = 0.0
    nothing_to_do: bool = False

    def summary(self) -> str:
        return f"RMSE {self.metrics['rmse']:.5f}, gate {'passed' if self.passed else 'failed'}"


def run(
    config: Config,
    warehouse: Warehouse,
    registry: Registry,
    codebook: CodebookVersion,
    champion: CodebookVersion | None,
    run_date: date,
    pictures: Path,
) -> EvaluateResult:
    """Compute the metrics of the IDs of `codebook`, compared with those of the champion, and the verdict of the gate.

    A report of the same tables, codebook and settings is reused.

    Raises:
        SchemaError: some item has no ID of the version, or the version was fitted on vectors of another recipe.
        RegistryMismatch: the version has IDs of another codebook, or its files are gone.
        CodebookError: its files are damaged.
    """
    began = time.monotonic()
    check_hashes(warehouse.root, codebook)
    versions = versions_to_evaluate(warehouse, codebook.number)
    other = champion if champion is not None and champion.number != codebook.number else None
    run_id = fingerprint([RECIPE, versions, codebook.hash, config.digest("gate", "evaluate")])[:16]
    # The report of a champion compares it with its predecessor, from before its promotion; it is reused.
    judged_against = other.number if other else None
    stored = report(warehouse.root, codebook.number, run_id)
    if stored is not None and (other is None or stored.judged_against == judged_against):
        make_newest(warehouse, stored)
        values = {field.name: getattr(stored, field.name) for field in fields(stored)}
        drawn = tuple(sorted(pictures.glob(f"*-{codebook.hash[:12]}.png")))
        return EvaluateResult(**values, pictures=drawn, seconds=time.monotonic() - began, nothing_to_do=True)

    embeddings = warehouse.read(ITEM_EMBEDDINGS, versions[ITEM_EMBEDDINGS.name])
    published = warehouse.read(SEMANTIC_IDS, versions[SEMANTIC_IDS.name])
    ids = published.where(F.col("codebook_version") == codebook.number).drop("alternates").cache()
    missing = embeddings.join(ids, ["item_id", "content_hash"], how="left_anti").count()
    if missing or ids.isEmpty():
        raise SchemaError(
            f"{missing} items of item_embeddings have no semantic ID of codebook version {codebook.number}; the report "
            "is over the whole catalogue. Run `sid encode` first"
        )
    champion_ids = published.where(F.col("codebook_version") == (other.number if other else -1))
    counts = code_counts(ids, codebook.levels, codebook.components)
    rqgmm = load_files(usable_files(warehouse, registry, codebook), codebook.hash).rqgmm
    metrics = {
        **_usage_metrics(counts),
        **collision_metrics(ids),
        **catalogue_metrics(ids, champion_ids, codebook.dim),
        "neighbour_recall": _sampled_recall(embeddings, ids, rqgmm, config.evaluate.neighbour_sample),
    }
    # Held items last: their codes are not the most probable ones, so their confidence is low by intent.
    uncertain = ids.orderBy("held", "confidence", "item_id").limit(LEAST_CERTAIN)
    columns = [field.name for field in fields(UncertainItem)]
    least_certain = tuple(UncertainItem(**row.asDict()) for row in uncertain.select(columns).collect())
    baseline = {"rmse": metrics["champion_rmse"]} if "champion_rmse" in metrics else None
    verdict = check_gate(
        {**metrics, "rmse": metrics.get("common_rmse", metrics["rmse"])}, _thresholds(config), baseline
    )

    short = codebook.hash[:12]
    usage, likelihood = pictures / f"usage-{short}.png", pictures / f"likelihood-{short}.png"
    draw_usage(counts, usage)
    draw_likelihood(*_likelihoods(ids, embeddings, run_date), likelihood)
    ids.unpersist()
    tags = {
        "codebook_version": str(codebook.number),
        "codebook_hash": codebook.hash,
        "table_versions": json.dumps(versions),
    }
    with registry.run("evaluate", config, {**tags, "verdict": "passed" if verdict.passed else "failed"}) as mlflow_run:
        for name, value in metrics.items():
            registry.client.log_metric(mlflow_run.info.run_id, name, value)
        for picture in (usage, likelihood):
            registry.client.log_artifact(mlflow_run.info.run_id, str(picture), "pictures")
    row = {
        "codebook_version": codebook.number,
        "run_id": run_id,
        "codebook_hash": codebook.hash,
        "metrics": metrics,
        "passed": verdict.passed,
        "reasons": list(verdict.reasons),
        "least_certain": [asdict(item) for item in least_certain],
        "judged_against": judged_against,
        "table_versions": versions,
        "run_date": run_date,
        "evaluated_at": datetime.now(UTC),
    }
    warehouse.merge(QUALITY_REPORTS, warehouse.rows(QUALITY_REPORTS, [row]))
    return EvaluateResult(
        codebook_version=codebook.number,
        run_id=run_id,
        passed=verdict.passed,
        reasons=tuple(verdict.reasons),
        metrics=metrics,
        least_certain=least_certain,
        table_versions=versions,
        judged_against=judged_against,
        pictures=(usage, likelihood),
        seconds=time.monotonic() - began,
    )


def code_counts(ids: DataFrame, levels: int, components: int) -> npt.NDArray[np.int64]:
    """(L, K): number of items per level and component."""
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


def collision_metrics(ids: DataFrame) -> dict[str, float]:
    """Counts of items, of distinct code tuples and of the largest group of items with equal codes.

    `items_with_a_twin` counts items beyond the first with the same vector, which no codes can tell apart.
    """
    groups = ids.groupBy("codes").count()
    largest = groups.agg(F.count(F.lit(1)).alias("distinct"), F.max("count").alias("largest")).first()
    total = ids.agg(F.count(F.lit(1)).alias("items"), F.countDistinct("content_hash").alias("vectors")).first()
    assert largest is not None
    assert total is not None
    return {
        "items": float(total["items"]),
        "distinct_ids": float(largest["distinct"]),
        "distinct": largest["distinct"] / total["items"],
        "largest_collision": float(largest["largest"]),
        "largest_collision_share": largest["largest"] / total["items"],
        "items_with_a_twin": float(total["items"] - total["vectors"]),
    }


def catalogue_metrics(ids: DataFrame, champion_ids: DataFrame, dim: int) -> dict[str, float]:
    """Means over the IDs of a version, and a comparison with those of the champion.

    `rmse` is over the whole catalogue, per component of a vector. `common_rmse` and `champion_rmse` are over the items
    that both encoded from the same vector. `churn` is the share of the champion's items whose codes differ.

    Raises:
        SchemaError: rows have no squared error, as a development version before 0.1.0 wrote them.
    """
    champion = champion_ids.select(
        "item_id",
        F.col("codebook_version").alias("champion_version"),
        F.col("codes").alias("champion_codes"),
        F.col("content_hash").alias("champion_hash"),
        F.col("squared_error").cast("double").alias("champion_error"),
    )
    error = F.col("squared_error").cast("double")
    common = F.col("champion_hash") == F.col("content_hash")
    row = (
        ids.join(champion, "item_id", how="left")
        .agg(
            F.count(F.lit(1)).alias("items"),
            F.sum(error).alias("error"),
            F.count(F.when(common, 1)).alias("common"),
            F.sum(F.when(common, error)).alias("common_error"),
            F.sum(F.when(common, F.col("champion_error"))).alias("champion_error"),
            F.max(F.when(error.isNull(), F.col("codebook_version"))).alias("incomplete"),
            F.max(F.when(common & F.col("champion_error").isNull(), F.col("champion_version"))).alias(
                "champion_incomplete"
            ),
            F.mean("confidence").alias("mean_confidence"),
            F.mean("log_likelihood").alias("mean_log_likelihood"),
            F.stddev_pop("log_likelihood").alias("std_log_likelihood"),
            F.mean(F.col("held").cast("double")).alias("held"),
            F.mean((F.col("codes") != F.col("champion_codes")).cast("double")).alias("churn"),
        )
        .first()
    )
    assert row is not None
    for version in (row["incomplete"], row["champion_incomplete"]):
        if version is not None:
            raise SchemaError(
                f"semantic_ids of codebook version {version} have rows without squared_error, which a development "
                f"version before 0.1.0 wrote; expected it in every row. Run `sid encode --codebook {version}`, which "
                "computes it; no ID changes"
            )
    names = ("mean_confidence", "mean_log_likelihood", "std_log_likelihood", "held")
    metrics = {name: float(row[name]) for name in names}
    metrics["rmse"] = math.sqrt(row["error"] / (row["items"] * dim))
    if row["churn"] is not None:
        metrics["churn"] = float(row["churn"])
    if row["common"]:
        metrics["common_rmse"] = math.sqrt(row["common_error"] / (row["common"] * dim))
        metrics["champion_rmse"] = math.sqrt(row["champion_error"] / (row["common"] * dim))
    return metrics


def _sampled_recall(embeddings: DataFrame, ids: DataFrame, rqgmm: RQGMM, sample: int) -> float:
    """Neighbour recall@10 of the decoded codes over `sample` items, those with the smallest hash of their id."""
    sampled = ids.orderBy(F.xxhash64("item_id"), "item_id").limit(sample).select("item_id", "codes").toArrow()
    sampled_ids = ids.sparkSession.createDataFrame(sampled)
    rows = embeddings.select("item_id", "embedding").join(F.broadcast(sampled_ids), "item_id", how="inner").toArrow()
    rows = rows.sort_by("item_id")
    x = torch.tensor(unpack(rows.column("embedding").combine_chunks(), rqgmm.dim))
    codes = torch.tensor(np.stack(rows.column("codes").to_pylist()).astype(np.int32))
    return float(neighbour_recall(x, rqgmm.decode(codes)))


def _likelihoods(
    ids: DataFrame, embeddings: DataFrame, run_date: date
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Log-likelihoods of earlier items and of items first seen on `run_date`, of LIKELIHOOD_SAMPLE items at most."""
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
