"""Semantic IDs from embeddings: residual-quantized Gaussian mixtures (arXiv 2602.12593). Tensors in, tensors out.

In a notebook: `Fusion`, `fit` and `load`, the latter under the name load_codebook too.

A module is imported when a name of it is first used: torch takes seconds and half a gigabyte, which a task that only
fuses or unpacks vectors can do without.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizer.alternates import Alternates
    from tokenizer.annealing import Method
    from tokenizer.codebook import Codebook, SemanticIds, content_hash, fit, load_codebook, save_codebook
    from tokenizer.data import FIT_BLOCK
    from tokenizer.errors import CodebookError, DataError, LostWorker, TokenizerError
    from tokenizer.fitting import RQGMMFit, fit_rqgmm
    from tokenizer.fusion import Fusion
    from tokenizer.gate import Thresholds, Verdict, check_gate
    from tokenizer.gmm import DiagonalGMM, GMMStatistics, e_step, m_step
    from tokenizer.iterations import Iteration
    from tokenizer.quality import LevelUsage, Quality, level_usage, measure_quality, neighbour_recall
    from tokenizer.rqgmm import RQGMM, Assignment
    from tokenizer.semantic_id import level_tokens, parse, text_of, tokens

    load = load_codebook
else:
    _NAMES = {
        "alternates": ("Alternates",),
        "annealing": ("Method",),
        "codebook": ("Codebook", "SemanticIds", "content_hash", "fit", "load_codebook", "save_codebook"),
        "data": ("FIT_BLOCK",),
        "errors": ("CodebookError", "DataError", "LostWorker", "TokenizerError"),
        "fitting": ("RQGMMFit", "fit_rqgmm"),
        "fusion": ("Fusion",),
        "gate": ("Thresholds", "Verdict", "check_gate"),
        "gmm": ("DiagonalGMM", "GMMStatistics", "e_step", "m_step"),
        "iterations": ("Iteration",),
        "quality": ("LevelUsage", "Quality", "level_usage", "measure_quality", "neighbour_recall"),
        "rqgmm": ("RQGMM", "Assignment"),
        "semantic_id": ("level_tokens", "parse", "text_of", "tokens"),
    }
    _MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

    def __getattr__(name: str) -> Any:
        original = "load_codebook" if name == "load" else name
        if original not in _MODULE_OF:
            raise AttributeError(f"module 'tokenizer' has no attribute {name!r}")
        return getattr(importlib.import_module(f"tokenizer.{_MODULE_OF[original]}"), original)


__all__ = [
    "FIT_BLOCK",
    "RQGMM",
    "Alternates",
    "Assignment",
    "Codebook",
    "CodebookError",
    "DataError",
    "DiagonalGMM",
    "Fusion",
    "GMMStatistics",
    "Iteration",
    "LevelUsage",
    "LostWorker",
    "Method",
    "Quality",
    "RQGMMFit",
    "SemanticIds",
    "Thresholds",
    "TokenizerError",
    "Verdict",
    "check_gate",
    "content_hash",
    "e_step",
    "fit",
    "fit_rqgmm",
    "level_tokens",
    "level_usage",
    "load",
    "load_codebook",
    "m_step",
    "measure_quality",
    "neighbour_recall",
    "parse",
    "save_codebook",
    "text_of",
    "tokens",
]
