"""kill -9 after each commit: the next run completes the night, with the IDs of a night that was never killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data import topics, write_vectors
from deltalake import DeltaTable

pytestmark = [pytest.mark.spark, pytest.mark.slow]

# What has just come into being when the night is killed.
MOMENTS = {
    "load": "_staging/load",
    "fit": "item_embeddings/_delta_log/00000000000000000003.json",
    "encode": "semantic_ids/codebook_version=1",
    "evaluate": "semantic_ids/_delta_log/00000000000000000001.json",
    "promote": "quality_reports/_delta_log/00000000000000000001.json",
    "release": "releases/_delta_log/00000000000000000000.json",
}


def night(warehouse: Path, source: Path) -> subprocess.Popen[bytes]:
    command = [
        *(sys.executable, "-m", "pipelines", "nightly", "--date", "2026-01-01"),
        *("--warehouse", str(warehouse), "--json", f"{warehouse}.json"),
        *("--set", f"load.source={source}", "--set", "fit.components=16", "--set", "spark.master=local[2]"),
    ]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)


def completed(warehouse: Path, source: Path) -> dict[str, str]:
    """Semantic ID by item after a night that ran to its end."""
    process = night(warehouse, source)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr.decode()
    facts = json.loads(Path(f"{warehouse}.json").read_text())
    assert facts["champion_version"] == 1
    assert facts["rows_in"] == facts["rows_stored"] + facts["rows_rejected"] == 400
    assert DeltaTable(warehouse / "releases").to_pyarrow_table().num_rows == 1
    ids = DeltaTable(warehouse / "semantic_ids").to_pyarrow_table()
    assert ids.num_rows == 400
    return dict(zip(ids["item_id"].to_pylist(), ids["semantic_id"].to_pylist(), strict=True))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    return Path(
        write_vectors(folder / "v.parquet", list(range(400)), text_embedding=topics(400, 8, groups=30, spread=0.8))
    )


@pytest.fixture(scope="module")
def undisturbed(source: Path) -> dict[str, str]:
    return completed(source.parent / "undisturbed", source)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_night_run_again_is_a_night(
    tmp_path: Path, source: Path, undisturbed: dict[str, str], moment: str
) -> None:
    warehouse = tmp_path / "warehouse"
    process = night(warehouse, source)
    while not (warehouse / MOMENTS[moment]).exists():
        assert process.poll() is None, f"the night ended before {MOMENTS[moment]} was there"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)  # the session we started: python, Java and its workers
    process.communicate()
    assert completed(warehouse, source) == undisturbed
