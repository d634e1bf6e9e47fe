"""The library as a notebook uses it: fuse, fit, encode, decode, save, load."""

from __future__ import annotations

import ast
import io
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data import topics
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizer
from tokenizer import CodebookError, DataError, Fusion, Iteration, fit, load, parse


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_from_vectors_to_semantic_ids_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, image = topics(300, 8, groups=12), topics(300, 5, groups=9, seed=1)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    fusion = Fusion({"text": 8, "image": 5}, weights={"text": 1.0, "image": 0.5})
    x = fusion(text=text, image=image)
    assert x.shape == (300, 13)
    codebook = fit(x, levels=2, components=16, seed=0, fusion=fusion)
    assert "RMSE" in terminal.getvalue()
    ids = codebook.encode(x)
    assert ids.codes.shape == (300, 2)
    assert [parse(name, 2)[0] for name in ids.text] == [tuple(codes) for codes in ids.codes.tolist()]
    assert ((ids.confidence > 0) & (ids.confidence <= 1)).all()
    assert ids.log_likelihood.isfinite().all()
    quality = codebook.quality(x)
    assert quality.rmse == pytest.approx(float((x - codebook.decode(ids.codes)).square().mean().sqrt()), rel=1e-5)
    name = codebook.save(tmp_path / "codebook")
    loaded = load(tmp_path / "codebook", expect_hash=name)
    assert loaded.hash == codebook.hash == name
    assert loaded.fusion == fusion
    assert loaded.manifest["fit"] == {"levels": 2, "components": 16, "seed": 0, "method": "annealed", "beam": 1}
    one = loaded.fusion(text=text[7:8], image=image[7:8])
    assert loaded.encode(one).text == ids.text[7:8]
    assert fit(x, levels=2, components=16, seed=0, fusion=fusion).hash == name


def test_the_example_of_both_readmes_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(tokenizer.__file__).parent
    code, short = (
        (path / "README.md").read_text().split("```python\n")[1].split("```")[0] for path in (folder, folder.parent)
    )
    statements = {ast.unparse(statement) for statement in ast.parse(code).body}
    assert {ast.unparse(statement) for statement in ast.parse(short).body} <= statements
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"text": topics(300, 384, groups=12), "image": topics(300, 1280, groups=9, seed=1)}
    exec(code, names)
    assert names["x"].shape == (300, 1664)  # type: ignore[attr-defined]
    assert len(names["ids"].text) == 300  # type: ignore[attr-defined]
    assert load(tmp_path / "codebook").fusion == names["fusion"]
    assert sorted(file.name for file in (tmp_path / "codebook").iterdir()) == ["codebook.safetensors", "manifest.json"]


def test_progress_is_called_with_each_step_and_nothing_is_printed_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    steps: list[Iteration] = []
    x = torch.from_numpy(topics(200, 6))
    fit(x, components=4, progress=steps.append)
    fit(x, components=4)
    assert {step.level for step in steps} == {0, 1, 2}
    assert [step.iteration for step in steps if step.level == 1] == list(
        range(1, 1 + sum(step.level == 1 for step in steps))
    )
    assert capsys.readouterr() == ("", "")


def test_a_recipe_that_is_none_is_refused(tmp_path: Path) -> None:
    codebook = fit(torch.from_numpy(topics(100, 4)), components=4)
    assert codebook.fusion is None
    strange = type(codebook)(codebook.rqgmm, {"fusion": {"a": 1}})
    with pytest.raises(CodebookError, match="recipe is wrong"):
        _ = strange.fusion


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 8),
    normalize=st.booleans(),
    weights=st.lists(st.floats(0.1, 4), min_size=2, max_size=2),
    dtype=st.sampled_from(["float32", "float16"]),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_fusion_is_the_slow_loop(
    rows: int, normalize: bool, weights: list[float], dtype: str, seed: int, data: st.DataObject
) -> None:
    """By single items, in Python numbers; missing modalities are zeros and cost nothing of the unit length."""
    dims = {"text": 3, "image": 2}
    generator = np.random.default_rng(seed)
    vectors = {name: generator.normal(size=(rows, dim)).astype(np.float32).tolist() for name, dim in dims.items()}
    for row in range(rows):
        missing = data.draw(st.sampled_from([None, "text", "image"]))
        if missing:
            vectors[missing][row] = None
    fusion = Fusion(dims, dict(zip(dims, weights, strict=True)), normalize=normalize, dtype=dtype)  # type: ignore[arg-type]
    x = fusion(**vectors)
    for row in range(rows):
        whole: list[float] = []
        for name in ("image", "text"):  # in alphabetical order
            vector = vectors[name][row] or [0.0] * dims[name]
            length = (math.hypot(*vector) or 1.0) if normalize else 1.0
            whole += [math.sqrt(dict(zip(dims, weights, strict=True))[name]) * value / length for value in vector]
        length = math.hypot(*whole) if normalize else 1.0
        np.testing.assert_allclose(
            x[row], [value / length for value in whole], rtol=1e-3 if dtype == "float16" else 1e-6, atol=1e-6
        )
    assert torch.equal(x, x.half().float()) or dtype == "float32"
    assert torch.equal(
        torch.cat([fusion(**{name: [part[row]] for name, part in vectors.items()}) for row in range(rows)]), x
    )


def test_a_modality_may_be_missing_for_all_items_or_for_some() -> None:
    fusion = Fusion({"text": 2, "image": 3})
    some = fusion(text=[[3.0, 4.0], None], image=[None, [0.0, 0.0, 2.0]])
    assert some.tolist() == [[0, 0, 0, pytest.approx(0.6), pytest.approx(0.8)], [0, 0, 1, 0, 0]]
    assert torch.equal(fusion(text=[[3.0, 4.0]], image=None), some[:1])
    assert torch.equal(fusion(text=[[3.0, 4.0]]), some[:1])
    assert torch.equal(fusion(image=torch.tensor([[0.0, 0.0, 2.0]])), some[1:])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "no modality is given"),
        ({"text": None}, "no modality is given"),
        ({"sound": [[1.0]]}, "are no modalities"),
        ({"text": [[1.0, 2.0, 3.0]]}, r"'text' has shape \(1, 3\); expected \(1, 2\)"),
        ({"text": [[1.0, math.nan]]}, "NaN, Inf or numbers too large for float32 in row 0"),
        ({"text": [None, [1.0, math.inf]], "image": [[1.0] * 3] * 2}, "in row 1"),
        ({"text": [[1.0, 1e39]]}, "too large for float32"),
        ({"text": [[1.0, 2.0], [0.0, 0.0]]}, "all zeros in row 1"),
        ({"text": [[1.0, 2.0], None]}, "item 1 has no modality at all"),
        ({"text": [[1.0, 2.0]], "image": [[1.0] * 3] * 2}, "expected as many in each"),
        ({"text": ["a cat"]}, "does not hold vectors of numbers"),
        ({"text": [[1.0, 2.0], [1.0]]}, "does not hold vectors of numbers"),
    ],
)
def test_vectors_that_cannot_be_fused_are_refused(given: dict[str, object], says: str) -> None:
    with pytest.raises(DataError, match=says):
        Fusion({"text": 2, "image": 3})(**given)  # type: ignore[arg-type]


def test_what_float16_cannot_hold_is_refused() -> None:
    with pytest.raises(DataError, match="too large for float16"):
        Fusion({"text": 1}, normalize=False, dtype="float16")(text=[[1e6]])
    assert Fusion({"text": 1}, normalize=False)(text=[[1e6]]).tolist() == [[1e6]]


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ({"dims": {}}, "without modalities"),
        ({"dims": {"text": 0}}, "dimension 0"),
        ({"dims": {"text": True}}, "dimension True"),
        ({"dims": {"text": 2}, "weights": {"image": 1.0}}, "weights name"),
        ({"dims": {"text": 2}, "weights": {"text": 0.0}}, "above 0"),
        ({"dims": {"text": 2}, "weights": {"text": math.nan}}, "above 0"),
        ({"dims": {"text": 2}, "dtype": "int8"}, "expected float32 or float16"),
    ],
)
def test_a_wrong_recipe_is_refused(recipe: dict[str, object], says: str) -> None:
    with pytest.raises(DataError, match=says):
        Fusion(**recipe)  # type: ignore[arg-type]


def test_a_recipe_comes_back_from_json_in_any_order_and_with_other_keys() -> None:
    fusion = Fusion({"text": 2, "image": 3}, weights={"image": 0.5}, normalize=False, dtype="float16")
    assert (
        Fusion.from_json(fusion.to_json())
        == fusion
        == Fusion({"image": 3, "text": 2}, {"text": 1, "image": 0.5}, False, "float16")
    )
    assert Fusion.from_dict({**fusion.to_dict(), "item_id": "asin"}) == fusion
    assert list(fusion.dims) == ["image", "text"]
    for broken in (
        None,
        [],
        {"dims": {"text": 2}},
        {**fusion.to_dict(), "dims": 3},
        {**fusion.to_dict(), "normalize": "yes"},
    ):
        with pytest.raises(DataError):
            Fusion.from_dict(broken)


def test_blocks_stand_in_the_order_of_the_recipe() -> None:
    vectors = {"text": np.array([[3.0, 4.0]]), "image": np.array([[0.0, 2.0]])}
    sizes = {"text": 2, "image": 2}
    assert Fusion(sizes, normalize=False)(**vectors).tolist() == [[0.0, 2.0, 3.0, 4.0]]
    ordered = Fusion(sizes, normalize=False, order=["text", "image"])
    assert ordered(**vectors).tolist() == [[3.0, 4.0, 0.0, 2.0]]
    assert Fusion.from_json(ordered.to_json()) == ordered != Fusion(sizes, normalize=False)
    with pytest.raises(DataError, match="each of"):
        Fusion(sizes, order=["text"])


def test_a_recipe_of_several_modalities_without_an_order_does_not_fuse() -> None:
    """As codebooks have it that were made before the order was kept: a guess would give other codes without a word."""
    recipe = {"dims": {"image": 2, "text": 2}, "weights": {}, "normalize": True, "dtype": "float32"}
    fusion = Fusion.from_dict(recipe)
    vectors = {"text": np.array([[3.0, 4.0]]), "image": np.array([[0.0, 2.0]])}
    with pytest.raises(DataError, match="does not say in which order"):
        fusion(**vectors)
    assert Fusion.from_json(fusion.to_json()) == fusion
    ordered = replace(fusion, order=["text", "image"], normalize=False)
    assert ordered(**vectors).tolist() == [[3.0, 4.0, 0.0, 2.0]]
    assert Fusion.from_dict({**recipe, "dims": {"text": 2}})(text=vectors["text"]).shape == (1, 2)
