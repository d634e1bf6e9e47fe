"""Batches for the fit: workers share the rows of a table without gaps, from block to block."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jobs.embeddings import batches
from jobs.embeddings.batches import EmbeddingFiles


@pytest.mark.parametrize("step", [1, 3])
def test_ranks_share_the_rows_in_order_and_start_at_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(batches, "FIT_BLOCK", 16)
    rows = torch.arange(300 * 4, dtype=torch.float32).reshape(300, 4)
    for number, part in enumerate(rows.split(130)):
        packed = pa.table({"embedding": [row.numpy().tobytes() for row in part]})
        pq.write_table(packed, tmp_path / f"{number}.parquet", row_group_size=33)
    files = tuple(f"file://{tmp_path}/{number}.parquet" for number in range(3))
    for world in (1, 2, 3, 7):
        shares = [list(EmbeddingFiles(files, 4, 10, rank, world, step)) for rank in range(world)]
        assert torch.equal(torch.cat([batch for share in shares for batch in share]), rows[::step])
        assert all(sum(map(len, share)) % 16 == 0 for share in shares[:-1])
