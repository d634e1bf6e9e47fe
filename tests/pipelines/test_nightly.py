"""Nights on real Spark, Delta and MLflow: the first, an idle one, new items, a changed vector, a refit, logs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from warehouse import CLICKS, ITEMS, Progress, SmallWarehouse

from jobs.config import ConfigError
from jobs.errors import SchemaError
from jobs.models.registry import CANDIDATE, CHAMPION
from jobs.warehouse.reports import report
from jobs.warehouse.tables import ITEM_EMBEDDINGS, SEMANTIC_IDS
from pipelines.lineage import print_item
from pipelines.nightly import Night
from pipelines.report import facts
from tokenizer import text_of

DAY, NEXT = date(2026, 1, 1), date(2026, 1, 2)
ROOT = Path(__file__).parents[2]


# ---- after the first night ----


def test_the_first_night_ends_in_a_release_and_a_model(first: tuple[SmallWarehouse, Night]) -> None:
    small, night = first
    assert night.refit_because == "there is no champion yet"
    assert night.loaded.rows_in == night.loaded.rows_stored + night.loaded.rows_rejected == ITEMS
    assert (small.release.release_id, small.release.codebook_version) == (1, 1)
    champion = small.registry.codebooks.with_alias(CHAMPION)
    assert champion is not None
    assert champion.hash == small.release.codebook_hash
    assert small.registry.ctr_models.with_alias(CANDIDATE) is not None
    assert night.trained is not None
    assert (night.trained.without_id, night.trained.items) == (5, 405)
    assert 0.005 < night.trained.share_without_id < 0.025
    assert night.trained.rows_in == night.trained.rows_used == CLICKS
    written = facts(night, "w", Path("p"), 1.0)
    json.dumps(written)
    expected = (
        "rows_in rmse utilization perplexity distinct largest_collision verdict champion_version "
        "codebook_hash interactions_in interactions_used interactions_dropped items_without_id "
        "share_without_id auc auc_control gauc gauc_users log_loss seconds warehouse pictures"
    )
    assert set(expected.split()) <= set(written)
    drawn = {path.name.split("-")[0] for path in (small.root / "pictures").glob("*.png")}
    assert {"convergence", "usage", "likelihood"} <= drawn


def test_every_item_has_one_unique_id_with_its_hashes(first: tuple[SmallWarehouse, Night]) -> None:
    small, _ = first
    ids = small.ids(1)
    assert len(ids) == ITEMS
    assert len({row["semantic_id"] for row in ids.values()}) == ITEMS
    for row in ids.values():
        assert row["semantic_id"] == text_of(row["codes"], row["suffix"])
        assert row["codebook_hash"] == small.release.codebook_hash
        assert not row["held"]


def test_the_report_names_the_least_certain_items(first: tuple[SmallWarehouse, Night]) -> None:
    small, night = first
    least = night.evaluated.least_certain
    confidence = {row["item_id"]: row["confidence"] for row in small.ids(1).values()}
    assert [item.confidence for item in least] == sorted(confidence.values())[:20]
    assert all(confidence[item.item_id] == item.confidence for item in least)
    stored = report(str(small.root), 1)
    assert stored is not None
    assert stored.least_certain == least


def test_delta_rs_and_duckdb_read_the_ids_both_ways(first: tuple[SmallWarehouse, Night]) -> None:
    small, _ = first
    ids = DeltaTable(small.tables.path(SEMANTIC_IDS)).to_pyarrow_dataset()
    row = next(iter(small.ids(1).values()))
    with duckdb.connect() as db:
        db.register("ids", ids)
        by_item = db.sql("SELECT semantic_id FROM ids WHERE item_id = ?", params=[row["item_id"]]).fetchall()
        by_codes = db.sql("SELECT item_id FROM ids WHERE codes = ?", params=[list(row["codes"])]).fetchall()
    assert by_item == [(row["semantic_id"],)]
    assert (row["item_id"],) in by_codes


def test_the_models_load_without_spark_and_without_this_project_and_give_the_codes_of_the_table(
    first: tuple[SmallWarehouse, Night], tmp_path: Path
) -> None:
    small, _ = first
    code = f"""
import importlib.util, os, sys
sys.modules["pyspark"] = None  # as on a machine that does not have it
sys.path = [folder for folder in sys.path if not os.path.exists(os.path.join(folder, "jobs", "__main__.py"))]
sys.meta_path = [finder for finder in sys.meta_path if "ditable" not in repr(finder)]
assert not any(importlib.util.find_spec(name) for name in ("jobs", "tokenizer", "pipelines"))
import json, mlflow, pandas as pd
from deltalake import DeltaTable
mlflow.set_tracking_uri({small.registry.tracking_uri!r})
model = mlflow.pyfunc.load_model("models:/semantic-id-codebook@champion")
rows = DeltaTable({small.tables.path(ITEM_EMBEDDINGS)!r}).to_pandas()
out = model.predict(rows[["embedding"]])
json.dump(dict(zip(rows["item_id"], out["codes"])), open({str(tmp_path / "codes.json")!r}, "w"))
mlflow.pyfunc.load_model("models:/dmqn-ctr@candidate")
for name in ("semantic-id-codebook@champion", "dmqn-ctr@candidate"):
    print(open(mlflow.pyfunc.get_model_dependencies(f"models:/{{name}}")).read())
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    predicted = json.loads((tmp_path / "codes.json").read_text())
    assert predicted == {item: list(row["codes"]) for item, row in small.ids(1).items()}
    needed = [line.split("==") for line in done.stdout.split()]
    assert [name for name, _ in needed] == ["mlflow", "numpy", "pandas", "safetensors", "torch"] * 2
    assert all(version(name).partition("+")[0] == pinned for name, pinned in needed)


def test_status_fits_one_screen(first: tuple[SmallWarehouse, Night], tmp_path: Path) -> None:
    small, _ = first
    command = [sys.executable, "-m", "pipelines", "status", "--warehouse", str(small.root)]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "status.json")], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "Release" in done.stdout
    assert len(done.stdout.splitlines()) < 24
    assert json.loads((tmp_path / "status.json").read_text())["semantic_ids_rows"] == ITEMS


# ---- nights after it ----


def test_the_same_night_again_does_nothing(small: SmallWarehouse, first: tuple[SmallWarehouse, Night]) -> None:
    before = small.versions()
    again = small.night(DAY)
    assert again.nothing_to_do
    assert small.versions() == before
    assert again.trained is not None
    assert first[1].trained is not None
    assert again.trained.auc == first[1].trained.auc


def log_like(small: SmallWarehouse, name: str, **columns: object) -> str:
    """A setting that names a log like the warehouse's own but for `columns`; without any, a log without rows."""
    log = pq.read_table(small.clicks).to_pandas()
    path = small.root / "in" / f"{name}.parquet"
    (log.assign(**columns) if columns else log.head(0)).to_parquet(path, index=False)
    return f"train.interactions={path}"


def test_an_unusable_log_stops_the_night_before_load(small: SmallWarehouse) -> None:
    one_time = f"one value in all {CLICKS:,} rows (2025-06-15 15:06:40)"
    for setting, kind, message in (
        (log_like(small, "one time", timestamp=1_750_000_000), SchemaError, one_time),
        (log_like(small, "comma", rating="5,0"), SchemaError, "column 'rating' holds the text '5,0'"),
        (f"train.interactions={small.root}/nowhere.parquet", ConfigError, "does not exist"),
    ):
        progress = Progress()
        with pytest.raises(kind, match=re.escape(message)):
            small.night(NEXT, setting, progress=progress)
        assert progress.began == ["interactions"]


def test_a_log_of_another_catalogue_stops_the_night_before_fit(small: SmallWarehouse) -> None:
    setting = log_like(small, "padded", item_id=[f"{n % 400:06d}" for n in range(CLICKS)])
    progress = Progress()
    with pytest.raises(SchemaError, match=r"100% of the interactions .*\('000000' is '0'\)"):
        small.night(NEXT, setting, progress=progress)
    assert progress.began == ["interactions", "load", "interactions"]


@pytest.fixture(scope="module")
def second(
    first: tuple[SmallWarehouse, Night], tmp_path_factory: pytest.TempPathFactory
) -> tuple[SmallWarehouse, Night]:
    """A warehouse after a second night, of forty new items, a changed vector and an empty log, and that night."""
    small = first[0].copy(tmp_path_factory.mktemp("second") / "warehouse")
    small.x[7] = -small.x[7]
    small.write_items(ITEMS + 40)
    return small, small.night(NEXT, log_like(small, "empty"))


def test_new_items_are_encoded_and_incumbents_do_not_move(
    first: tuple[SmallWarehouse, Night], second: tuple[SmallWarehouse, Night]
) -> None:
    small, night = second
    assert night.refit_because is None
    assert night.encoded.encoded == 41
    before, after = first[0].ids(1), small.ids(1)
    assert len(after) == ITEMS + 40
    assert {item: after[item] for item in before if item != "7"} == {i: before[i] for i in before if i != "7"}
    assert len({row["semantic_id"] for row in after.values()}) == len(after)
    assert night.release is not None
    assert (night.release.release_id, night.release.previous) == (2, 1)


def test_a_changed_vector_keeps_its_published_id(
    first: tuple[SmallWarehouse, Night], second: tuple[SmallWarehouse, Night], capsys: pytest.CaptureFixture[str]
) -> None:
    small, night = second
    before, after = first[0].ids(1)["7"], small.ids(1)["7"]
    assert after["semantic_id"] == before["semantic_id"]
    assert after["content_hash"] != before["content_hash"]
    assert after["held"]
    least = night.evaluated.least_certain
    assert after["confidence"] < min(item.confidence for item in least)
    assert "7" not in {item.item_id for item in least}  # its low confidence is by intent

    assert print_item(small.tables, small.registry, "7")
    shown = capsys.readouterr().out
    assert "semantic ID" in shown
    assert "held" in shown
    assert not print_item(small.tables, small.registry, "nobody")
    assert "is in no table of this warehouse" in capsys.readouterr().out


def test_a_night_with_an_empty_log_releases_the_ids_and_says_so(second: tuple[SmallWarehouse, Night]) -> None:
    _, night = second
    assert night.release is not None
    assert night.trained is not None
    assert night.trained.version is None
    assert "the log has no rows" in night.trained.summary()
    values = facts(night, "w", Path("p"), 1.0)
    assert json.loads(json.dumps(values, allow_nan=False))["auc"] is None
    assert values["interactions_in"] == 0


def test_a_refit_starts_from_the_champion_and_moves_few_ids(refitted: tuple[SmallWarehouse, Night]) -> None:
    small, night = refitted
    assert night.evaluated.passed, night.evaluated.reasons
    assert night.evaluated.metrics["churn"] <= 0.1
    assert small.release.codebook_version == 2
    before, after = small.ids(1), small.ids(2)
    assert len(before) == len(after) == ITEMS + 50
    assert len({row["semantic_id"] for row in after.values()}) == len(after)
    kept = [item for item in before if after[item]["codes"] == before[item]["codes"]]
    assert len(kept) >= 0.9 * ITEMS
    assert all(after[item]["suffix"] == before[item]["suffix"] for item in kept)


def test_fewer_items_than_components_is_a_sentence(small: SmallWarehouse) -> None:
    with pytest.raises(ConfigError, match=r"has 400 items and fit\.components is 1000"):
        small.night(NEXT, "fit.components=1000")
