"""fit through TorchDistributor: as many workers as wanted, the same codebook."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest
import torch
from data import topics, write_vectors

from jobs import fit, load
from jobs.config import Config, ConfigError
from jobs.fit import EmbeddingFiles
from jobs.load import Fusion
from jobs.registry import open_registry
from jobs.tables import ITEM_EMBEDDINGS, Warehouse

DAY = date(2026, 1, 1)


def loaded(tmp_path: Path, warehouse: Warehouse, config: Config) -> EmbeddingFiles:
    load.run(config, warehouse, DAY)
    fusion = Fusion.from_json(warehouse.property(ITEM_EMBEDDINGS, "sid.fusion") or "")
    files = warehouse.files(ITEM_EMBEDDINGS, warehouse.version(ITEM_EMBEDDINGS))
    return EmbeddingFiles(tuple(files), fusion.dim, batch_rows=50)


def test_two_spark_workers_fit_what_one_process_fits(
    tmp_path: Path, warehouse: Warehouse, settings: Callable[..., Config]
) -> None:
    path = write_vectors(tmp_path / "v.parquet", list(range(300)), text_embedding=topics(300, 6, groups=12))
    one = settings(f"load.source={path}", "fit.components=8", "fit.batch_rows=50")
    data = loaded(tmp_path, warehouse, one)
    assert sum(len(batch) for rank in range(2) for batch in EmbeddingFiles(data.files, data.dim, 50, rank, 2)) == 300
    alone = fit._fit(one, data, None, tmp_path / "one", None).rqgmm
    (tmp_path / "two").mkdir()
    two = settings(f"load.source={path}", "fit.components=8", "fit.batch_rows=50", "fit.workers=2")
    together = fit._fit(two, data, None, tmp_path / "two", None).rqgmm
    x = torch.cat(list(data))
    assert together.encode(x).shape == alone.encode(x).shape
    errors = [float((x - rqgmm.decode(rqgmm.encode(x))).square().mean()) for rqgmm in (alone, together)]
    assert errors[1] == pytest.approx(errors[0], rel=0.2)  # the same rows; the start is drawn in another order


def test_more_workers_than_slots_is_a_sentence(
    tmp_path: Path, warehouse: Warehouse, settings: Callable[..., Config]
) -> None:
    path = write_vectors(tmp_path / "v.parquet", list(range(60)), text_embedding=topics(60, 6))
    config = settings(f"load.source={path}", "fit.components=8", "fit.workers=64")
    load.run(config, warehouse, DAY)
    with pytest.raises(ConfigError, match=r"fit\.workers is 64 and Spark has 2 slots"):
        fit.run(config, warehouse, open_registry(config, warehouse.root), DAY, tmp_path / "pictures")
