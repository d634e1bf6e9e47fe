"""Generated rows of `ctr_examples`: every impression is read once, and requests from the cache score as the whole
model.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import cache, ctr_memory
from benchmarks.ctr.example_rows import default_model
from jobs.ctr.stream import ExampleStream, row_groups


def test_a_generated_log_has_the_impressions_that_were_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctr_memory, "USERS", 5)
    monkeypatch.setattr(ctr_memory, "LONGEST", 100)
    in_memory = ctr_memory.write_log(tmp_path, 1000)
    groups = row_groups(sorted(map(str, tmp_path.iterdir())))
    assert len(groups) > 2
    assert in_memory > 1000 * 100
    inputs, _ = default_model(history=40)
    sizes = {}
    for split in ("train", "validation", "test"):
        batches = list(ExampleStream(groups, split, inputs, 500))
        sizes[split] = sum(map(len, batches))
        assert all((batch.last - batch.first <= 40).all() for batch in batches)
        clicks = np.mean(torch.cat([batch.label for batch in batches]).numpy())
        assert 0.3 < clicks < 0.7
    assert sum(sizes.values()) == 1000
    assert sizes["validation"] + sizes["test"] < 300


def test_a_request_has_the_candidates_and_the_history_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "USERS", 2)
    ctr = cache.untrained_model(history=30)
    figures = cache.timed(ctr, length=20, many=1)
    assert figures["largest_difference"] < 1e-5
    for request in cache.requests(ctr, 20):
        assert request.batch.length.tolist() == [20]
        assert len(request.batch) == cache.CANDIDATES
        assert (request.batch.last - request.batch.first == 20).all()
