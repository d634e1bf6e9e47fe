"""Sources of item tokens: nothing, item ids, codes of four quantizers, soft ones of two, the embedding itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from torch import Tensor

from benchmarks.ctr.embedding import Inputs
from benchmarks.ctr.impressions import Impressions, ItemTokens
from benchmarks.opponents import QUANTIZERS, softened_rq_kmeans
from benchmarks.vectors import WrongVectors
from jobs.ctr.pieces import Pieces, learn
from jobs.ctr.tokens import TokenKind, TokenScheme
from tokenizer import fit_rqgmm
from tokenizer.alternates import ALTERNATES, FULL_WEIGHT

SOURCES = ("none", "item-id", "vq-vae", "rq-vae", "rq-kmeans", "rq-kmeans-soft", "rq-gmm", "rq-gmm-soft", "embedding")
OTHER_TOKENS = (
    "rq-gmm-prefix",
    "rq-gmm-soft-prefix",
    "rq-gmm-pieces",
)  # the codes of rq-gmm as other tokens, see TokenScheme
HASHED_ROWS = 2**17  # for tuples of codes; rows that no item has are left out of the table
PIECES_PER_CODE = 2  # learned pieces at most, as a multiple of the single codes: as many of several codes
NO_TOKENS = "none", "item-id", "embedding"


@dataclass(frozen=True, eq=False)
class Catalogue:
    """The items of a log and the embeddings of those that have one.

    Attributes:
        x: (N, D) float32, unit length.
        row: (N,) the item row of each.
        levels, components: of the quantizers.
    """

    log: Impressions
    x: Tensor
    row: Tensor
    levels: int
    components: int

    def vectors(self) -> Tensor:
        """(items + 1, D), zeros for padding and for items without an embedding."""
        return torch.zeros(self.log.items + 1, self.x.shape[1]).index_copy(0, self.row, self.x)

    def tokens(self, source: str, seed: int) -> ItemTokens:
        """The tokens of every item by a source; the quantizer is fitted on all items, with this seed."""
        items = self.log.items + 1
        if source in NO_TOKENS:
            return ItemTokens(torch.zeros(items, 0, dtype=torch.int64), torch.zeros(items, 0), 1, ())
        quantizer, kind = quantizer_and_kind(source)
        if kind in ("soft", "soft-prefix"):
            if quantizer == "rq-gmm":
                rqgmm = fit_rqgmm(self.x, levels=self.levels, components=self.components, seed=seed).rqgmm
            else:
                rqgmm = softened_rq_kmeans(self.x, self.levels, self.components, seed)
            soft = rqgmm.alternates(self.x, rqgmm.encode(self.x), ALTERNATES)
            codes, weights = soft.codes, soft.weights.int()
        else:
            codes = QUANTIZERS[quantizer](self.x, self.levels, self.components, seed).encode(self.x)[:, :, None]
            weights = torch.full_like(codes, FULL_WEIGHT)
        _, levels, alternates = codes.shape
        single = levels * self.components
        pieces = self._pieces(codes[:, :, 0], single * PIECES_PER_CODE) if kind == "pieces" else None
        table_rows = 1 + (len(pieces) if pieces else single + HASHED_ROWS)
        scheme = TokenScheme(kind, levels, self.components, alternates, table_rows, pieces)
        own, shares = scheme.rows(codes, weights)
        rows = torch.zeros(items, own.shape[1], dtype=torch.int64).index_copy(0, self.row, own)
        weights = torch.zeros(items, own.shape[1]).index_copy(0, self.row, shares)
        if pieces:
            return ItemTokens(rows, weights, table_rows, scheme.fields, scheme)
        used, rows = torch.unique(rows, return_inverse=True)  # sorted: row 0, which padding has, stays row 0
        return ItemTokens(rows, weights, len(used), scheme.fields)

    def _pieces(self, codes: Tensor, size: int) -> Pieces:
        """At most `size` pieces of codes (N, L), by how often the training split shows the items."""
        shown = np.bincount(self.log.item[self.log.of("train")], minlength=self.log.items + 1)
        return learn(codes, torch.from_numpy(shown)[self.row], self.components, size)

    def inputs(self, source: str, tokens: ItemTokens, *, with_embedding: bool) -> Inputs:
        return Inputs(
            users=self.log.users,
            items=self.log.items,
            tokens=tokens,
            item_ids=source != "none",
            vectors=self.vectors() if with_embedding or source == "embedding" else None,
        )

    def level_one(self, seed: int) -> Tensor:
        """(items + 1,): the level-1 code of each item by RQ-GMM, -1 where there is none."""
        rqgmm = fit_rqgmm(self.x, levels=1, components=self.components, seed=seed).rqgmm
        codes = rqgmm.encode(self.x)[:, 0].long()
        return torch.full((self.log.items + 1,), -1).index_copy(0, self.row, codes)


def quantizer_and_kind(source: str) -> tuple[str, TokenKind]:
    """Whose codes a source has, and how they become tokens."""
    kinds: tuple[TokenKind, ...] = ("soft-prefix", "prefix", "soft", "pieces")
    for kind in kinds:
        if source.endswith(f"-{kind}"):
            return source.removesuffix(f"-{kind}"), kind
    return source, "level"


def read_catalogue(folder: Path, log: Impressions, column: str, levels: int, components: int) -> Catalogue:
    """The embeddings of `embeddings.parquet`, of the items of the log.

    Args:
        column: By default the first that ends with _embedding.

    Raises:
        WrongVectors: no such file or column, or no item of the log has an embedding.
    """
    file = folder / "embeddings.parquet"
    if not file.exists():
        raise WrongVectors(f"{file} does not exist; expected a folder with embeddings.parquet and interactions.parquet")
    names = pq.read_schema(file).names
    column = column or next((name for name in names if name.endswith("_embedding")), "")
    if column not in names:
        raise WrongVectors(f"column {column!r} is missing from {file}; it has {names}")
    table = pd.read_parquet(file, columns=["item_id", column]).dropna()
    row = log.item_ids.get_indexer(table["item_id"]) + 1
    vectors = np.stack(table[column][row > 0]).astype(np.float32) if (row > 0).any() else np.empty((0, 1), np.float32)
    norm = np.linalg.norm(vectors, axis=1)
    usable = np.isfinite(norm) & (norm > 0)
    if usable.sum() <= components:
        raise WrongVectors(
            f"{usable.sum()} items of the log have an embedding in {file}; expected more than {components} components"
        )
    x = vectors[usable] / norm[usable, None]
    return Catalogue(log, torch.from_numpy(x), torch.from_numpy(row[row > 0][usable]), levels, components)
