"""fit through TorchDistributor: as many workers as wanted, the same codebook."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data import topics, write_vectors

from jobs import fit, load
from jobs.config import Config, ConfigError
from jobs.fit import EmbeddingFiles, FitFailed
from jobs.load import Fusion
from jobs.registry import open_registry
from jobs.tables import ITEM_EMBEDDINGS, Warehouse
from tokenizer import FIT_BLOCK

DAY = date(2026, 1, 1)


def loaded(tmp_path: Path, warehouse: Warehouse, config: Config) -> EmbeddingFiles:
    load.run(config, warehouse, DAY)
    fusion = Fusion.from_json(warehouse.property(ITEM_EMBEDDINGS, "sid.fusion") or "")
    files = warehouse.files(ITEM_EMBEDDINGS, warehouse.version(ITEM_EMBEDDINGS))
    return EmbeddingFiles(tuple(files), fusion.dim, batch_rows=1000)


@pytest.mark.parametrize("step", [1, 3])
def test_ranks_share_the_rows_in_order_and_start_at_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(fit, "FIT_BLOCK", 16)
    rows = torch.arange(300 * 4, dtype=torch.float32).reshape(300, 4)
    for number, part in enumerate(rows.split(130)):
        packed = pa.table({"embedding": [row.numpy().tobytes() for row in part]})
        pq.write_table(packed, tmp_path / f"{number}.parquet", row_group_size=33)
    files = tuple(f"file://{tmp_path}/{number}.parquet" for number in range(3))
    for world in (1, 2, 3, 7):
        shares = [list(EmbeddingFiles(files, 4, 10, rank, world, step)) for rank in range(world)]
        assert torch.equal(torch.cat([batch for share in shares for batch in share]), rows[::step])
        assert all(sum(map(len, share)) % 16 == 0 for share in shares[:-1])


def test_two_spark_workers_fit_what_one_process_fits(
    tmp_path: Path, warehouse: Warehouse, settings: Callable[..., Config]
) -> None:
    rows = 2 * FIT_BLOCK + 500
    path = write_vectors(tmp_path / "v.parquet", list(range(rows)), text_embedding=topics(rows, 6, groups=12))
    one = settings(f"load.source={path}", "fit.components=8")
    data = loaded(tmp_path, warehouse, one)
    alone = fit._fit(one, data, None, tmp_path / "one", None).rqgmm
    x = torch.cat(list(data))
    assert len(x) == rows
    (tmp_path / "two").mkdir()
    two = settings(f"load.source={path}", "fit.components=8", "fit.workers=2")
    together = fit._fit(two, data, None, tmp_path / "two", None).rqgmm
    assert torch.equal(together.encode(x), alone.encode(x))


# TorchDistributor leaves the pipe to its workers open when they fail.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_worker_s_own_words_reach_the_user(
    tmp_path: Path, warehouse: Warehouse, settings: Callable[..., Config]
) -> None:
    config = settings("fit.components=8", "fit.workers=2")
    missing = EmbeddingFiles((f"file://{tmp_path}/gone.parquet",), 6, 50)
    with pytest.raises(FitFailed, match=r"worker \d of the fit failed(.|\n)*gone\.parquet"):
        fit._fit(config, missing, None, tmp_path, None)


def test_more_workers_than_slots_is_a_sentence(
    tmp_path: Path, warehouse: Warehouse, settings: Callable[..., Config]
) -> None:
    path = write_vectors(tmp_path / "v.parquet", list(range(60)), text_embedding=topics(60, 6))
    config = settings(f"load.source={path}", "fit.components=8", "fit.workers=64")
    load.run(config, warehouse, DAY)
    with pytest.raises(ConfigError, match=r"fit\.workers is 64 and Spark has 2 slots"):
        fit.run(config, warehouse, open_registry(config, warehouse.root), DAY, tmp_path / "pictures")
