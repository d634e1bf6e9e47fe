"""The names of the library: those that type checkers see are those that are imported on first use."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import tokenizer


def declared() -> dict[str, str]:
    """Name -> module, of the imports that `tokenizer/__init__.py` shows to type checkers."""
    imports = ast.walk(ast.parse(Path(tokenizer.__file__).read_text()))
    return {
        alias.name: node.module or ""
        for node in imports
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tokenizer.")
        for alias in node.names
    }


def test_every_public_name_is_the_one_of_its_module() -> None:
    assert sorted([*declared(), "load"]) == sorted(tokenizer.__all__)
    for name, module in declared().items():
        assert getattr(tokenizer, name) is getattr(importlib.import_module(module), name)
    assert tokenizer.load is tokenizer.load_codebook


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'tokenizer' has no attribute 'Fusoin'"):
        tokenizer.Fusoin  # type: ignore[attr-defined]  # noqa: B018
