"""A story of nights on real Spark, Delta and MLflow: first night, idle night, new items, refit, failed gate."""

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
from house import ITEMS, House, Progress

from jobs.config import ConfigError
from jobs.errors import SchemaError
from jobs.models.registry import CANDIDATE, CHAMPION
from jobs.warehouse.releases import current_release
from jobs.warehouse.reports import report
from jobs.warehouse.tables import ITEM_EMBEDDINGS, RELEASES, SEMANTIC_IDS
from pipelines.lineage import print_item
from pipelines.nightly import Night
from pipelines.report import facts
from tokenizer import text_of

DAY = date(2026, 1, 1)


def test_the_first_night_ends_in_a_release_and_a_model(house: House, first: Night) -> None:
    assert first.refit_because == "there is no champion yet"
    assert first.loaded.rows_in == first.loaded.rows_stored + first.loaded.rows_rejected == ITEMS
    release = current_release(house.warehouse.root)
    assert release is not None
    assert (release.release_id, release.codebook_version) == (1, 1)
    champion = house.registry.codebooks.with_alias(CHAMPION)
    assert champion is not None
    assert champion.hash == release.codebook_hash
    assert house.registry.ctr_models.with_alias(CANDIDATE) is not None
    assert first.trained is not None
    assert (first.trained.without_id, first.trained.items) == (5, 405)
    assert 0.005 < first.trained.share_without_id < 0.025
    assert first.trained.rows_in == first.trained.rows_used == 4000
    told = facts(first, "w", Path("p"), 1.0)
    json.dumps(told)
    expected = (
        "rows_in rmse utilization perplexity distinct largest_collision verdict champion_version "
        "codebook_hash interactions_in interactions_used interactions_dropped items_without_id "
        "share_without_id auc auc_control gauc gauc_users log_loss seconds warehouse pictures"
    )
    assert set(expected.split()) <= set(told)
    drawn = {path.name.split("-")[0] for path in (house.root / "pictures").glob("*.png")}
    assert drawn == {"convergence", "usage", "likelihood", "ctr"}


def test_every_item_has_one_unique_id_with_its_hashes(house: House, first: Night) -> None:
    ids = house.ids(1)
    release = current_release(house.warehouse.root)
    assert release is not None
    assert len(ids) == ITEMS
    assert len({row["semantic_id"] for row in ids.values()}) == ITEMS
    for row in ids.values():
        assert row["semantic_id"] == text_of(row["codes"], row["suffix"])
        assert row["codebook_hash"] == release.codebook_hash
        assert not row["held"]


def test_the_report_names_the_least_certain_items(house: House, first: Night) -> None:
    least = first.evaluated.least_certain
    confidence = {row["item_id"]: row["confidence"] for row in house.ids(1).values()}
    assert [item.confidence for item in least] == sorted(confidence.values())[:20]
    assert all(confidence[item.item_id] == item.confidence for item in least)
    stored = report(house.warehouse.root, 1)
    assert stored is not None
    assert stored.least_certain == least


def test_the_same_night_again_does_nothing(house: House, first: Night) -> None:
    before = {table.name: house.warehouse.version(table) for table in (ITEM_EMBEDDINGS, SEMANTIC_IDS, RELEASES)}
    again = house.night(DAY)
    assert again.nothing_to_do
    assert {table.name: house.warehouse.version(table) for table in (ITEM_EMBEDDINGS, SEMANTIC_IDS, RELEASES)} == before
    assert again.trained is not None
    assert first.trained is not None
    assert again.trained.auc == first.trained.auc


def clicks(house: House, name: str, **columns: object) -> str:
    """A setting that names a log like the night's own but for some columns; None is a log without rows."""
    log = pq.read_table(house.root / "in" / "clicks.parquet").to_pandas()
    path = house.root / "in" / f"{name}.parquet"
    (log.assign(**columns) if columns else log.head(0)).to_parquet(path, index=False)
    return f"train.interactions={path}"


def test_an_unusable_log_stops_the_night_before_load(house: House, first: Night) -> None:
    for setting, kind, message in (
        (
            clicks(house, "moment", timestamp=1_750_000_000),
            SchemaError,
            "one value in all 4,000 rows (2025-06-15 15:06:40)",
        ),
        (clicks(house, "comma", rating="5,0"), SchemaError, "column 'rating' holds the text '5,0'"),
        (f"train.interactions={house.root}/nowhere.parquet", ConfigError, "does not exist"),
    ):
        progress = Progress()
        with pytest.raises(kind, match=re.escape(message)):
            house.run(house.configured(setting), DAY, progress)
        assert progress.began == ["interactions"]


def test_a_log_of_another_catalogue_stops_the_night_before_fit(house: House, first: Night) -> None:
    setting = clicks(house, "padded", item_id=[f"{n % 400:06d}" for n in range(4000)])
    progress = Progress()
    with pytest.raises(SchemaError, match=r"100% of the interactions .*\('000000' is '0'\)"):
        house.run(house.configured(setting), DAY, progress)
    assert progress.began == ["interactions", "load", "interactions"]


def test_an_empty_log_of_the_day_is_said_and_the_ids_are_released(house: House, first: Night) -> None:
    night = house.night(DAY, clicks(house, "empty"))
    assert night.release is not None
    assert night.trained is not None
    assert night.trained.version is None
    assert "the log has no rows" in night.trained.summary()
    values = facts(night, "w", Path("p"), 1.0)
    assert json.loads(json.dumps(values, allow_nan=False))["auc"] is None
    assert values["interactions_in"] == 0


def test_delta_rs_and_duckdb_read_the_ids_both_ways(house: House, first: Night) -> None:
    table = DeltaTable(house.warehouse.path(SEMANTIC_IDS)).to_pyarrow_dataset()  # noqa: F841  duckdb finds it by name
    row = next(iter(house.ids(1).values()))
    with duckdb.connect() as db:
        found = db.sql(
            "SELECT semantic_id FROM table WHERE item_id = ?".replace("table", '"table"'), params=[row["item_id"]]
        ).fetchall()
        assert found == [(row["semantic_id"],)]
        same = db.sql('SELECT item_id FROM "table" WHERE codes = ?', params=[list(row["codes"])]).fetchall()
    assert (row["item_id"],) in same


def test_the_models_load_without_spark_and_without_this_project_and_give_the_codes_of_the_table(
    house: House, first: Night, tmp_path: Path
) -> None:
    code = f"""
import importlib.util, os, sys
sys.modules["pyspark"] = None  # as on a machine that does not have it
sys.path = [folder for folder in sys.path if not os.path.exists(os.path.join(folder, "jobs", "__main__.py"))]
sys.meta_path = [finder for finder in sys.meta_path if "ditable" not in repr(finder)]
assert not any(importlib.util.find_spec(name) for name in ("jobs", "tokenizer", "pipelines"))
import json, mlflow, pandas as pd
from deltalake import DeltaTable
mlflow.set_tracking_uri({house.registry.tracking_uri!r})
model = mlflow.pyfunc.load_model("models:/semantic-id-codebook@champion")
rows = DeltaTable({house.warehouse.path(ITEM_EMBEDDINGS)!r}).to_pandas()
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
    told = json.loads((tmp_path / "codes.json").read_text())
    assert told == {item: list(row["codes"]) for item, row in house.ids(1).items()}
    needed = [line.split("==") for line in done.stdout.split()]
    assert [name for name, _ in needed] == ["mlflow", "numpy", "pandas", "safetensors", "torch"] * 2
    assert all(version(name).partition("+")[0] == pinned for name, pinned in needed)


def test_new_items_are_encoded_and_incumbents_do_not_move(house: House, first: Night) -> None:
    before = house.ids(1)
    house.write(ITEMS + 40)
    night = house.night(date(2026, 1, 2), "train.interactions=")
    assert night.refit_because is None
    assert night.encoded.encoded == 40
    after = house.ids(1)
    assert len(after) == ITEMS + 40
    assert {item: after[item] for item in before} == before
    assert len({row["semantic_id"] for row in after.values()}) == len(after)
    assert night.release is not None
    assert (night.release.release_id, night.release.previous) == (2, 1)


def test_a_changed_vector_keeps_its_published_id(house: House, first: Night) -> None:
    before = house.ids(1)
    house.x[7] = -house.x[7]
    house.write(ITEMS + 40)
    night = house.night(date(2026, 1, 3), "train.interactions=")
    after = house.ids(1)
    assert night.encoded.encoded == 1
    assert after["7"]["semantic_id"] == before["7"]["semantic_id"]
    assert after["7"]["content_hash"] != before["7"]["content_hash"]
    assert after["7"]["held"]
    assert after["7"]["confidence"] < min(item.confidence for item in night.evaluated.least_certain)
    assert "7" not in {item.item_id for item in night.evaluated.least_certain}  # it is where it is by intent


def test_a_failed_gate_leaves_champion_and_release(house: House, first: Night) -> None:
    night = house.night(date(2026, 2, 5), "gate.min_distinct=1.0", "fit.seed=1")
    assert night.refit_because is not None
    assert "due for a refit" in night.refit_because
    assert night.gate_message is not None
    assert "distinct is" in night.gate_message
    assert "The champion stays" in night.gate_message
    champion = house.registry.codebooks.with_alias(CHAMPION)
    release = current_release(house.warehouse.root)
    assert champion is not None
    assert release is not None
    assert champion.number == release.codebook_version == 1
    assert night.trained is None


def test_a_refit_starts_from_the_champion_and_moves_few_ids(house: House, first: Night) -> None:
    before = house.ids(1)
    house.write(ITEMS + 50)
    night = house.night(date(2026, 2, 10), "train.interactions=")
    assert night.evaluated.passed, night.evaluated.reasons
    assert night.evaluated.metrics["churn"] <= 0.1
    release = current_release(house.warehouse.root)
    assert release is not None
    after = house.ids(release.codebook_version)
    assert len(after) == ITEMS + 50
    assert len({row["semantic_id"] for row in after.values()}) == len(after)
    kept = [item for item in before if after[item]["codes"] == before[item]["codes"] and item != "7"]
    assert all(after[item]["suffix"] == before[item]["suffix"] for item in kept)
    assert house.night(date(2026, 2, 10), "train.interactions=").nothing_to_do


def test_fewer_items_than_components_is_a_sentence(house: House, first: Night) -> None:
    with pytest.raises(ConfigError, match=r"has 450 items and fit\.components is 1000"):
        house.night(date(2026, 2, 11), "fit.components=1000")


def sid(house: House, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipelines", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent.parent,
    )


def test_status_fits_one_screen(house: House, first: Night, tmp_path: Path) -> None:
    told = sid(house, "status", "--warehouse", str(house.root), "--json", str(tmp_path / "status.json"))
    assert told.returncode == 0, told.stderr
    assert "Release" in told.stdout
    assert len(told.stdout.splitlines()) < 24
    assert json.loads((tmp_path / "status.json").read_text())["semantic_ids_rows"] > ITEMS


def test_explain_tells_where_an_id_comes_from(house: House, first: Night, capsys: pytest.CaptureFixture[str]) -> None:
    assert print_item(house.warehouse, house.registry, "7")
    told = capsys.readouterr().out
    assert "semantic ID" in told
    assert "held" in told
    assert not print_item(house.warehouse, house.registry, "nobody")
    assert "is in no table of this warehouse" in capsys.readouterr().out


def test_a_wrong_setting_is_a_sentence_and_exit_code_2(house: House) -> None:
    told = sid(house, "nightly", "--set", "fit.component=3")
    assert told.returncode == 2
    assert "did you mean fit.components?" in told.stderr
    assert "Traceback" not in told.stderr
