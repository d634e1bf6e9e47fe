"""Codebooks written by the first version: they stay readable, and their codes do not drift.

Each folder of tests/golden holds a codebook of format 1 and, for sixty rows, the codes, confidences and vectors that
the version which wrote it gave. The log-likelihood has been defined anew since.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tokenizer import load

GOLDEN = Path(__file__).parents[1] / "golden"
HASHES = {
    "annealed": "ad78f5757f3278eb05ecfe48c7f2ad2f0cf609fe7a1e9e372dad0a7305dafb8d",
    "em-beam3": "ed626dbf4c8bf989c2c269ce01b06583bc7d7c0970ccada5b321b6ad382f124f",
}


@pytest.mark.parametrize("name", sorted(HASHES))
def test_a_codebook_of_format_1_gives_the_codes_it_gave(name: str) -> None:
    codebook = load(GOLDEN / name, expect_hash=HASHES[name])
    expected = load_file(GOLDEN / name / "expected.safetensors")
    ids = codebook.encode(expected["x"])
    assert torch.equal(ids.codes, expected["codes"])
    torch.testing.assert_close(ids.confidence, expected["confidence"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(codebook.decode(ids.codes), expected["decoded"], rtol=0, atol=1e-6)
    assert codebook.rqgmm.beam == (3 if name == "em-beam3" else 1)
    assert codebook.fusion is not None
    assert codebook.fusion.dims == {"image_embedding": 2, "text_embedding": 4}
    assert codebook.fusion.dtype == "float16"


@pytest.mark.parametrize("name", sorted(HASHES))
def test_a_golden_codebook_saved_again_is_the_same(name: str, tmp_path: Path) -> None:
    assert load(GOLDEN / name).save(tmp_path) == HASHES[name]
    for file in ("codebook.safetensors", "manifest.json"):
        assert (tmp_path / file).read_bytes() == (GOLDEN / name / file).read_bytes()
