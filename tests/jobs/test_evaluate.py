"""evaluate: its metrics against slow loops, and tables of a development version before 0.1.0. One small warehouse."""

from __future__ import annotations

from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data import topics, write_vectors
from pyspark.sql import SparkSession

from jobs import encode, evaluate, fit, load
from jobs.config import Config
from jobs.embeddings.packed import unpack
from jobs.errors import SchemaError
from jobs.evaluate import catalogue_metrics, code_counts, collision_metrics
from jobs.models.codebooks import codebook_files, load_files
from jobs.models.registry import Registry, open_registry
from jobs.models.versions import CodebookVersion
from jobs.read_config import load_config
from jobs.warehouse.delta_spark import Warehouse
from jobs.warehouse.reports import report
from jobs.warehouse.tables import ITEM_EMBEDDINGS, QUALITY_REPORTS, SEMANTIC_IDS

DAY, NEXT = date(2026, 1, 1), date(2026, 1, 2)
ITEMS, DIM = 200, 8
IDS = (
    "codebook_version INT, item_id STRING, codes ARRAY<INT>, confidence FLOAT, log_likelihood FLOAT, held BOOLEAN, "
    "content_hash STRING, squared_error FLOAT"
)


def random_ids(version: int, items: range, seed: int) -> list[tuple[Any, ...]]:
    generator = np.random.default_rng(seed)
    return [
        (
            version,
            f"i{item}",
            generator.integers(3, size=2).tolist(),
            float(generator.random()),
            float(generator.normal()),
            bool(generator.random() < 0.3),
            f"h{item // 2 + 1000 * (generator.random() < 0.2)}",
            float(generator.random()),
        )
        for item in items
    ]


def test_metrics_of_the_ids_are_those_of_a_slow_loop(spark: SparkSession) -> None:
    rows, champion = random_ids(2, range(60), seed=0), random_ids(1, range(20, 90), seed=1)
    ids, champion_ids = spark.createDataFrame(rows, IDS), spark.createDataFrame(champion, IDS)
    by_item = {row[1]: row for row in champion}
    both = [(row, by_item[row[1]]) for row in rows if row[1] in by_item]
    common = [(own, other) for own, other in both if own[6] == other[6]]
    assert 0 < len(common) < len(both) < len(rows)
    expected = {
        "rmse": np.sqrt(np.mean([row[7] for row in rows]) / DIM),
        "common_rmse": np.sqrt(np.mean([own[7] for own, _ in common]) / DIM),
        "champion_rmse": np.sqrt(np.mean([other[7] for _, other in common]) / DIM),
        "churn": np.mean([own[2] != other[2] for own, other in both]),
        "mean_confidence": np.mean([row[3] for row in rows]),
        "mean_log_likelihood": np.mean([row[4] for row in rows]),
        "std_log_likelihood": np.std([row[4] for row in rows]),
        "held": np.mean([row[5] for row in rows]),
    }
    assert catalogue_metrics(ids, champion_ids, DIM) == pytest.approx(expected, rel=1e-6)
    alone = catalogue_metrics(ids, champion_ids.limit(0), DIM)
    assert alone == pytest.approx({name: expected[name] for name in alone}, rel=1e-6)
    assert set(expected) - set(alone) == {"common_rmse", "champion_rmse", "churn"}

    groups = Counter(tuple(row[2]) for row in rows)
    assert collision_metrics(ids) == {
        "items": 60,
        "distinct_ids": len(groups),
        "distinct": len(groups) / 60,
        "largest_collision": max(groups.values()),
        "largest_collision_share": max(groups.values()) / 60,
        "items_with_a_twin": 60 - len({row[6] for row in rows}),
    }
    counts = [[sum(row[2][level] == code for row in rows) for code in range(3)] for level in range(2)]
    assert code_counts(ids, 2, 3).tolist() == counts


@pytest.mark.parametrize("incomplete", [1, 2])
def test_rows_without_squared_error_are_a_sentence(spark: SparkSession, incomplete: int) -> None:
    frames = {version: spark.createDataFrame(random_ids(version, range(5), seed=0), IDS) for version in (1, 2)}
    frames[incomplete] = frames[incomplete].selectExpr("* EXCEPT (squared_error)", "CAST(NULL AS FLOAT) squared_error")
    with pytest.raises(
        SchemaError, match=f"version {incomplete} have rows without squared_error.*--codebook {incomplete}"
    ):
        catalogue_metrics(frames[2], frames[1], DIM)


@pytest.fixture(scope="module")
def catalogue(
    spark: SparkSession, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, Warehouse, Registry, list[CodebookVersion]]:
    """Items with the IDs of two codebooks; the second starts from the first and is fitted on more items."""
    root = tmp_path_factory.mktemp("evaluate")
    source = root / "in" / "vectors.parquet"
    overrides = [f"load.source={source}", "fit.components=8", "encode.alternates=2", "evaluate.neighbour_sample=100"]
    config = load_config(overrides=overrides, warehouse=str(root))
    warehouse, registry = Warehouse(spark, str(root)), open_registry(config, str(root))
    x = topics(ITEMS, DIM, groups=20, spread=0.4)
    codebooks: list[CodebookVersion] = []
    for day, items in ((DAY, ITEMS - 40), (NEXT, ITEMS)):
        write_vectors(source, list(range(items)), text_embedding=x[:items])
        load.run(config, warehouse, day)
        champion = codebooks[-1] if codebooks else None
        codebooks.append(fit.run(config, warehouse, registry, day, root / "pictures", champion).codebook)
        for codebook in codebooks:
            encode.run(config, warehouse, registry, codebook, day)
    return config, warehouse, registry, codebooks


def rows_of(warehouse: Warehouse) -> dict[tuple[int, str], dict[str, Any]]:
    rows = [row.asDict(recursive=True) for row in warehouse.read(SEMANTIC_IDS).collect()]
    return {(row["codebook_version"], row["item_id"]): row for row in rows}


def slow_rmse(warehouse: Warehouse, registry: Registry, codebook: CodebookVersion) -> float:
    """Of each item the distance to the sum of its means, one at a time in float64."""
    levels = load_files(codebook_files(registry, codebook), codebook.hash).rqgmm.levels
    vectors = warehouse.read(ITEM_EMBEDDINGS).select("item_id", "embedding").toArrow().combine_chunks()
    x = dict(zip(vectors["item_id"].to_pylist(), unpack(vectors["embedding"].combine_chunks(), DIM), strict=True))
    total = 0.0
    for (version, item), row in rows_of(warehouse).items():
        if version == codebook.number:
            means = [levels[level].means[code].double().numpy() for level, code in enumerate(row["codes"])]
            total += float(((x[item].astype(np.float64) - sum(means)) ** 2).sum())
    return float(np.sqrt(total / len(x) / DIM))


def test_both_rmse_are_those_of_a_slow_loop(
    catalogue: tuple[Config, Warehouse, Registry, list[CodebookVersion]], tmp_path: Path
) -> None:
    config, warehouse, registry, (first, second) = catalogue
    result = evaluate.run(config, warehouse, registry, second, first, NEXT, tmp_path)
    expected = [slow_rmse(warehouse, registry, codebook) for codebook in (second, second, first)]
    metrics = [result.metrics[name] for name in ("rmse", "common_rmse", "champion_rmse")]
    assert metrics == pytest.approx(expected, rel=1e-6)
    assert result.judged_against == first.number
    assert 0 < result.metrics["neighbour_recall"] <= 1
    assert {path.name.split("-")[0] for path in result.pictures} == {"usage", "likelihood"}
    assert evaluate.run(config, warehouse, registry, second, first, NEXT, tmp_path).nothing_to_do


def test_a_report_that_is_reused_is_the_newest_again(
    catalogue: tuple[Config, Warehouse, Registry, list[CodebookVersion]], tmp_path: Path
) -> None:
    """So `sid promote` follows the last `sid evaluate`, whichever limits it had."""
    config, warehouse, registry, (first, _) = catalogue
    strict = load_config(
        overrides=[f"load.source={config.load.source}", "encode.alternates=2", "gate.min_distinct=1"],
        warehouse=warehouse.root,
    )
    verdicts = []
    for settings in (config, strict, config):
        result = evaluate.run(settings, warehouse, registry, first, None, NEXT, tmp_path)
        newest = report(warehouse.root, first.number)
        assert newest is not None
        assert newest.run_id == result.run_id
        verdicts.append((newest.passed, result.nothing_to_do))
    assert verdicts[1] == (False, False)
    assert verdicts[2] == (verdicts[0][0], True)
    version = warehouse.version(QUALITY_REPORTS)
    evaluate.run(config, warehouse, registry, first, None, NEXT, tmp_path)
    assert warehouse.version(QUALITY_REPORTS) == version


@pytest.mark.slow
def test_a_table_of_an_earlier_release_gets_its_errors_with_the_next_encode(
    catalogue: tuple[Config, Warehouse, Registry, list[CodebookVersion]], spark: SparkSession, tmp_path: Path
) -> None:
    """The same rows in a table without the columns added since, in a copy of the warehouse."""
    config, warehouse, registry, (first, second) = catalogue
    new = rows_of(warehouse)
    old = Warehouse(spark, str(tmp_path))
    embeddings = warehouse.read(ITEM_EMBEDDINGS)
    embeddings.write.format("delta").save(old.path(ITEM_EMBEDDINGS))
    former = warehouse.read(SEMANTIC_IDS).drop(*encode.ADDED)
    former.write.format("delta").partitionBy("codebook_version").save(old.path(SEMANTIC_IDS))
    with pytest.raises(SchemaError, match=f"sid encode --codebook {second.number}"):
        evaluate.run(config, old, registry, second, first, NEXT, tmp_path)

    later = date(2026, 1, 5)
    done = encode.run(config, old, registry, second, later)
    assert (done.encoded, done.completed, done.nothing_to_do) == (0, ITEMS, False)
    kept = rows_of(old)
    for key, row in new.items():
        if key[0] == first.number:
            row = {**row, **dict.fromkeys(encode.ADDED)}
        assert kept[key] == row
    again = encode.run(config, old, registry, second, later)
    assert (again.encoded, again.completed, again.version, again.nothing_to_do) == (0, 0, done.version, True)
    with pytest.raises(SchemaError, match=f"sid encode --codebook {first.number}"):
        evaluate.run(config, old, registry, second, first, NEXT, tmp_path)
    encode.run(config, old, registry, first, later)
    assert rows_of(old) == new
