"""Interactions against the catalogue and the warehouse: ids that match, paths and formats, and when examples are
built anew.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ctr_data import LEVELS, codes_of, ctr_model, events_batch, random_events
from delta_rows import registry_at, version_of
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from jobs import train
from jobs.config import Config, ConfigError
from jobs.ctr import example_table
from jobs.ctr.artefact import FORMAT, MANIFEST, save_model
from jobs.ctr.coverage import coverage_of
from jobs.ctr.example_table import EXAMPLES_OF, check_interactions, examples_key, most_shown_codes
from jobs.ctr.examples import user_rows
from jobs.ctr.log import examine, read_rows
from jobs.ctr.train_result import TrainResult
from jobs.errors import SchemaError
from jobs.files.sources import open_source
from jobs.models.registry import CTR_MODEL, register
from jobs.models.versions import ctr_tags
from jobs.read_config import load_config
from jobs.warehouse.delta_spark import Warehouse
from jobs.warehouse.tables import CTR_EXAMPLES


def write_log(path: Path, **columns: Any) -> Path:
    """1,000 interactions of 20 users with the items 0 to 99."""
    g = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "user_id": g.integers(20, size=1000),
            "item_id": np.arange(1000) % 100,
            "timestamp": 1_750_000_000 + 60 * np.arange(1000),
            "label": g.integers(2, size=1000),
        }
    ).assign(**columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_parquet(path, index=False)
    return path


def coverage(path: Path, catalogue: list[str], spark: SparkSession, **train: Any) -> Any:
    config = load_config(overrides=[f"train.{name}={value}" for name, value in train.items()])
    chosen = config.train.model_copy(update={"interactions": str(path)})
    log = examine(open_source(str(path)), chosen, spark)
    return coverage_of(log, spark.createDataFrame(pa.table({"item_id": catalogue})), chosen)


# ---- ids of the log and of the catalogue ----


def test_some_items_without_an_id_are_counted(spark: SparkSession, tmp_path: Path) -> None:
    result = coverage(write_log(tmp_path / "log.parquet"), [str(n) for n in range(80)], spark)
    assert (result.interactions, result.interactions_without, result.items, result.items_without) == (
        1000,
        200,
        100,
        20,
    )
    assert result.share_without == 0.2


def test_ids_that_are_floats_since_one_is_missing_match(spark: SparkSession, tmp_path: Path) -> None:
    ids = np.where(np.arange(1000) == 7, np.nan, np.arange(1000) % 100)
    result = coverage(write_log(tmp_path / "log.parquet", item_id=ids), [str(n) for n in range(100)], spark)
    assert (result.interactions, result.interactions_without) == (999, 0)


def test_another_catalogue_is_refused_with_ids_of_both(spark: SparkSession, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.parquet", item_id=[f"shop-{n % 100}" for n in range(1000)])
    with pytest.raises(SchemaError) as caught:
        coverage(log, ["B000", "B001", "B002"], spark)
    message = str(caught.value)
    assert "100% of the interactions (1,000 of 1,000) and 100 of 100 items of " in message
    assert (
        "The log has ids such as 'shop-0', 'shop-1', 'shop-10', the catalogue such as 'B000', 'B001', 'B002'" in message
    )
    assert "allow more with train.max_share_without_id (now 0.5)" in message
    assert coverage(log, ["B000", "B001", "B002"], spark, max_share_without_id=1).share_without == 1.0


@pytest.mark.parametrize(
    ("spelled", "without", "example"),
    [
        (lambda n: f"{n:02d}", 10, "'00' is '0'"),  # most ids have two digits anyway: 10 % are without, below the limit
        (lambda n: f"{n}.0", 100, "'0.0' is '0'"),
        (lambda n: f" {n}", 100, "' 0' is '0'"),
    ],
    ids=["zero-padded", "text of floats", "spaces"],
)
def test_ids_that_differ_only_in_how_they_are_written_are_refused(
    spelled: Callable[[int], str], without: int, example: str, spark: SparkSession, tmp_path: Path
) -> None:
    log = write_log(tmp_path / "log.parquet", item_id=[spelled(n % 100) for n in range(1000)])
    with pytest.raises(SchemaError) as caught:
        coverage(log, [str(n) for n in range(100)], spark)
    assert f"{without} of 100 items" in str(caught.value)
    assert f"most differ only in how they are written ({example})" in str(caught.value)


# ---- where the log is ----


@pytest.mark.parametrize(
    "name",
    ["a:10:00.parquet", "clicks[1].parquet", "d[1]/clicks.parquet", "c{a,b}.parquet", "50%20 ü.parquet", "*.parquet"],
)
def test_no_character_of_a_path_is_a_pattern(name: str, spark: SparkSession, tmp_path: Path) -> None:
    path = write_log(tmp_path / name)
    write_log(tmp_path / "clicks1.parquet")
    train = load_config().train.model_copy(update={"interactions": str(path)})
    log = examine(open_source(str(path)), train, spark)
    assert log.rows_in == 1000
    assert read_rows(log, spark).count() == 1000


def test_a_delta_log_is_its_newest_version(spark: SparkSession, tmp_path: Path) -> None:
    frame = spark.createDataFrame(pq.read_table(write_log(tmp_path / "log.parquet")))
    table = str(tmp_path / "table[1].parquet")
    frame.write.format("delta").save(table)
    spark.sql(f"DELETE FROM delta.`{table}` WHERE item_id >= 50")
    train = load_config().train.model_copy(update={"interactions": table})
    log = examine(open_source(table), train, spark)
    assert log.rows_in == log.rows_used == 500
    assert {row["item_id"] for row in read_rows(log, spark).select("item_id").distinct().collect()} == {
        str(n) for n in range(50)
    }


def test_files_of_one_log_may_store_ids_and_times_in_different_widths(spark: SparkSession, tmp_path: Path) -> None:
    big = 2**53 + 1  # a type for both files would round it
    times = pd.Series(1_750_000_000 + 60 * np.arange(1000)).astype("datetime64[s]")
    write_log(tmp_path / "log" / "a.parquet", item_id=big, timestamp=times.astype("datetime64[ns]"))
    missing = np.where(np.arange(1000) == 7, np.nan, 5.0)
    write_log(tmp_path / "log" / "b.parquet", item_id=missing, timestamp=times.astype("datetime64[us]"))
    train = load_config().train.model_copy(update={"interactions": str(tmp_path / "log")})
    log = examine(open_source(str(tmp_path / "log")), train, spark)
    assert (log.rows_in, log.rows_used, log.dropped) == (2000, 1999, {"null_item": 1})
    rows = read_rows(log, spark).groupBy("item_id").agg(F.min("ts").alias("first")).collect()
    assert {row["item_id"]: row["first"] for row in rows} == {
        str(big): 1_750_000_000_000_000,
        "5": 1_750_000_000_000_000,
    }


# ---- examples of an earlier recipe ----


def test_examples_of_another_recipe_or_log_are_not_known(
    warehouse: Warehouse, settings: Callable[..., Config], tmp_path: Path
) -> None:
    config = settings(f"train.interactions={write_log(tmp_path / 'log.parquet')}")
    log = check_interactions(config, warehouse)
    assert not log.seen_before
    warehouse.create(CTR_EXAMPLES)
    key = examples_key(config, log.source.fingerprint)
    recipe, stamp = key.split("-", 1)
    for text, known in (
        (stamp, False),  # of the first recipe
        (json.dumps({"key": f"{int(recipe) - 1}-{stamp}", "log": log.to_json()}), False),
        (json.dumps({"key": key, "log": log.to_json()}), True),
    ):
        warehouse.set_property(CTR_EXAMPLES, EXAMPLES_OF, text)
        again = check_interactions(config, warehouse)
        assert again.seen_before is known
        assert (again.rows_in, again.rows_used, again.note) == (log.rows_in, log.rows_used, log.note)


# ---- what the model reads ----


@pytest.mark.parametrize("kind", ["soft", "pieces"])
def test_the_key_of_a_training_is_made_of_what_is_set_not_of_what_is_learned(kind: str) -> None:
    """With other content every warehouse would train its model anew."""
    settings = train.input_settings(load_config(overrides=[f"train.tokens={kind}"]), version_of("c" * 64))
    assert settings == {
        "scheme": {"kind": kind, "levels": 2, "components": 4, "alternates": 8, "table_rows": 65536},
        "item_rows": 65536,
        "history": 200,
    }


@pytest.mark.parametrize(
    ("levels", "setting", "message"),
    [
        (2, "train.token_rows=9", "train.tokens = pieces, train.token_rows = 9: a token table of 9 rows is too small"),
        (9, "train.token_rows=1000", "9 levels; learned pieces need 1 to 8"),
    ],
)
def test_codes_that_no_pieces_can_be_learned_of_are_refused_before_examples_are_built(
    levels: int, setting: str, message: str
) -> None:
    codebook = replace(version_of("c" * 64), levels=levels)
    with pytest.raises(ConfigError, match=message):
        train.input_settings(load_config(overrides=["train.tokens=pieces", setting]), codebook)


def test_the_codes_of_training_impressions_are_counted(warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of the semantic ID of each level, whatever the number of alternates; the most frequent tuples only."""
    events = random_events(3, users=40, longest=30)
    rows = user_rows(events_batch(events), history=5)
    warehouse.create(CTR_EXAMPLES)
    warehouse.replace(CTR_EXAMPLES, warehouse.spark.createDataFrame(pa.Table.from_batches([rows])), "")
    shown = [event.item for event in events if event.split == "train" and codes_of(event.item)]
    expected = Counter((codes_of(item)[0], codes_of(item)[2]) for item in shown)
    version = warehouse.version(CTR_EXAMPLES)
    codes, counts = most_shown_codes(warehouse, version, LEVELS)
    assert dict(zip(map(tuple, codes.tolist()), counts.tolist(), strict=True)) == expected
    monkeypatch.setattr(example_table, "MOST_TUPLES", 5)
    few, of_few = most_shown_codes(warehouse, version, LEVELS)
    assert of_few.tolist() == sorted(expected.values(), reverse=True)[:5]
    assert torch.equal(few, codes[:5])


# ---- what a refused model means ----


@pytest.mark.parametrize(
    ("same_codebook", "consequence"),
    [
        (True, "Version 2 stays;"),
        (False, "Version 2 is of an earlier codebook, so the current one has no CTR champion;"),
    ],
)
def test_a_refusal_says_which_model_serves(same_codebook: bool, consequence: str) -> None:
    values = {field.name: None for field in fields(TrainResult)}
    refused = TrainResult(
        **{**values, "version": 3, "champion": 2, "same_codebook": same_codebook, "reasons": ("auc is low",)}
    )
    assert not refused.passed
    assert f"CTR model version 3 did not pass the gate: auc is low. {consequence}" in refused.refusal
    assert TrainResult(**{**values, "reasons": ()}).refusal is None


def test_a_champion_of_another_format_stops_no_training(tmp_path: Path) -> None:
    """Else no night could train the model of this format; a damaged one is still an error."""
    codebook = version_of("c" * 64)
    registry = registry_at(tmp_path / "warehouse")
    ctr = ctr_model()
    folder = tmp_path / "dmqn"
    save_model(folder, ctr.model, ctr.inputs, codebook.hash, {})
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format": FORMAT - 1}))
    tags = ctr_tags(
        codebook=codebook, train_key="", passed=True, table_versions={}, run_date=date(2026, 1, 1), result={}
    )
    with registry.run("train", load_config(), {}):
        register(registry, CTR_MODEL, Path(train.__file__).parent / "ctr" / "dmqn_model.py", folder, tags)
    said: list[str] = []
    unused: Any = None
    stage = train._Stage(load_config(), unused, registry, codebook, {}, said.append, unused, ctr.inputs.settings)
    assert stage.champion() is None
    expected = f"not comparing with CTR model version 1: the CTR model has format {FORMAT - 1}; expected {FORMAT}"
    assert said[0].startswith(expected)
