"""The comparison reads every form of vectors, measures what it says, and every quantizer takes part."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data import topics
from typer import Typer
from typer.testing import CliRunner

from benchmarks.opponents import QUANTIZERS
from benchmarks.quantizers import quantizers
from benchmarks.vectors import WrongVectors, read_vectors, split


@pytest.mark.parametrize("form", ["list", "double", "binary", "npy"])
def test_vectors_of_every_form_are_the_same_rows(tmp_path: Path, form: str) -> None:
    x = topics(50, 6)
    path = tmp_path / ("x.npy" if form == "npy" else "x.parquet")
    if form == "npy":
        np.save(path, x)
    else:
        kinds = {"list": pa.list_(pa.float32()), "double": pa.list_(pa.float64()), "binary": pa.binary()}
        rows = [row.tobytes() for row in x] if form == "binary" else [row.tolist() for row in x]
        pq.write_table(pa.table({"v": pa.array([*rows, None], kinds[form])}), path)
    vectors, left_out = read_vectors(path, [] if form == "npy" else ["v"])
    assert left_out == (0 if form == "npy" else 1)
    np.testing.assert_allclose(vectors, x / np.linalg.norm(x, axis=1, keepdims=True), rtol=1e-5, atol=1e-6)


def test_principal_components_keep_distances(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", topics(40, 5))
    whole, _ = read_vectors(tmp_path / "x.npy", [], normalize=False)
    rotated, _ = read_vectors(tmp_path / "x.npy", [], normalize=False, pca=5)
    torch.testing.assert_close(torch.pdist(rotated), torch.pdist(whole), rtol=1e-4, atol=1e-4)


def test_a_split_loses_no_row() -> None:
    x = torch.arange(100.0)[:, None]
    parts = split(x, 3)
    assert len(parts.held_out) == 10
    assert torch.equal(torch.cat([parts.train, parts.held_out]).sort(0).values, x)


def test_every_quantizer_is_measured(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", topics(400, 8, groups=30))
    app, out = Typer(), tmp_path / "out.json"
    app.command()(quantizers)
    flags = f"--embeddings {tmp_path}/x.npy --levels 2 --components 8 --seeds 1 --json {out} --picture {tmp_path}/p.png"
    result = CliRunner().invoke(app, flags.split())
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    assert {row["quantizer"] for row in rows} == set(QUANTIZERS)
    assert {row["split"] for row in rows} == {"train", "held-out"}
    for row in rows:
        assert row["rmse"] > 0
        assert len(row["utilization"]) == len(row["perplexity"]) == (1 if row["quantizer"] == "vq-vae" else 2)
        assert 0 < row["distinct"] <= 1
    assert (tmp_path / "p.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--quantizers rq-gmm,other", "expected some of rq-gmm"),
        ("--components 500", "too few for 500 components"),
        ("--pca 99", "expected at most as many"),
    ],
)
def test_wrong_flags_are_answered_with_a_sentence(tmp_path: Path, flags: str, says: str) -> None:
    np.save(tmp_path / "x.npy", topics(60, 8))
    app = Typer()
    app.command()(quantizers)
    result = CliRunner().invoke(app, f"--embeddings {tmp_path}/x.npy {flags}".split())
    assert isinstance(result.exception, WrongVectors)
    assert says in str(result.exception)
