"""Semantic IDs from embeddings: residual-quantized Gaussian mixtures (arXiv 2602.12593). Tensors in, tensors out."""

from tokenizer.codebook import Codebook, content_hash, load_codebook, save_codebook
from tokenizer.errors import CodebookError, DataError, LostWorker, TokenizerError
from tokenizer.gate import Thresholds, Verdict, check_gate
from tokenizer.gmm import DiagonalGMM, GMMStatistics, e_step, m_step
from tokenizer.quality import LevelUsage, Quality, level_usage, measure_quality, neighbour_recall
from tokenizer.rqgmm import FIT_BLOCK, RQGMM, Assignment, Iteration, RQGMMFit, fit_rqgmm
from tokenizer.semantic_id import parse, text_of, tokens

__all__ = [
    "FIT_BLOCK", "RQGMM", "Assignment", "Codebook", "CodebookError", "DataError", "DiagonalGMM", "GMMStatistics", "Iteration", "LevelUsage",
    "LostWorker", "Quality", "RQGMMFit", "Thresholds", "TokenizerError", "Verdict", "check_gate", "content_hash", "e_step", "fit_rqgmm",
    "level_usage", "load_codebook", "m_step", "measure_quality", "neighbour_recall", "parse", "save_codebook", "text_of", "tokens",
]  # fmt: skip
