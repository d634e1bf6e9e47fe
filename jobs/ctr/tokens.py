"""How the codes of an item become rows of a CTR model's token table.

Every model embeds an item as `item_embedding[row of its id] + sum_t weights[t] * token_embedding[rows[t]]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from jobs.ctr.hashing import codes_hash
from jobs.ctr.pieces import Pieces, levels_problem
from tokenizer.alternates import FULL_WEIGHT
from tokenizer.semantic_id import PADDING, level_tokens, tokens

TokenKind = Literal["level", "prefix", "soft", "soft-prefix", "pieces"]


@dataclass(frozen=True)
class TokenScheme:
    """Codes of items -> rows and weights of one token table with `table_rows` rows; row 0 is padding.

    kind:
        "level"        a token for the code of each level, and one for the whole tuple of codes.
        "prefix"       a token for each prefix of the codes: level 1, levels 1-2, ... (prefix n-gram, arXiv 2504.02137).
        "soft"         as "level", but a level is the weighted mean of the tokens of its most probable codes.
        "soft-prefix"  as "prefix", but the last code of each prefix is one of the most probable, with its weight.
        "pieces"       a token for each piece of the codes; codes that are often seen together are one piece (learned
                       pieces, arXiv 2306.08121; see `jobs.ctr.pieces`).

    Tokens of single codes have rows of their own. Prefixes and tuples of several codes are hashed to the other rows, so
    that the table does not grow with the number of items; learned pieces have a row each.

    Attributes:
        levels: L, codes of an item.
        components: K, number of different codes at a level.
        alternates: m, codes a level that the input carries; the first is the item's own.
        table_rows: Rows of the token table, padding included.
        pieces: Of the kind "pieces", else None.

    Raises:
        ValueError: `scheme_problem`, or the pieces do not fit.
    """

    kind: TokenKind
    levels: int
    components: int
    alternates: int
    table_rows: int
    pieces: Pieces | None = None

    def __post_init__(self) -> None:
        if problem := scheme_problem(self.kind, self.levels, self.components, self.alternates, self.table_rows):
            raise ValueError(problem)
        if (self.kind == "pieces") != (self.pieces is not None):
            raise ValueError(f"{self.kind!r} tokens {'with' if self.pieces else 'without'} pieces; expected the other")
        if self.pieces is not None:
            own = (self.pieces.levels, self.pieces.components)
            if own != (self.levels, self.components) or len(self.pieces) >= self.table_rows:
                raise ValueError(
                    f"{len(self.pieces):,} pieces of {own[0]} levels of {own[1]} codes; expected {self.levels} levels "
                    f"of {self.components} codes, and fewer pieces than the {self.table_rows:,} rows of the table"
                )

    @property
    def settings(self) -> dict[str, Any]:
        """All attributes but the pieces."""
        names = ("kind", "levels", "components", "alternates", "table_rows")
        return {name: getattr(self, name) for name in names}

    @property
    def fields(self) -> tuple[int, ...]:
        """Tokens of each field, coarsest first: the levels or prefixes in turn, then the tuple of all codes; or the
        pieces by the level at which they begin.
        """
        each = self.alternates if self._soft else 1
        return (each,) * self.levels + ((1,) if self._with_tuple else ())

    @property
    def tokens(self) -> int:
        """T, tokens of an item."""
        return sum(self.fields)

    @property
    def level_rows(self) -> tuple[slice, ...]:
        """For each level whose codes have rows of their own, these rows."""
        levels = 1 if self._by_prefix else self.levels
        return tuple(level_tokens(level, self.components) for level in range(levels))

    @property
    def sums(self) -> tuple[Tensor, Tensor] | None:
        """The rows (P,) of pieces of several codes, and of each the rows (P, L) of its single codes, 0 for none."""
        if self.pieces is None:
            return None
        return torch.arange(self._hashed_from, 1 + len(self.pieces)), self.pieces.parts + 1

    @property
    def _soft(self) -> bool:
        return self.kind.startswith("soft")

    @property
    def _by_prefix(self) -> bool:
        return self.kind.endswith("prefix")

    @property
    def _with_tuple(self) -> bool:
        return self.kind in ("level", "soft")

    @property
    def _hashed_from(self) -> int:
        return _single_rows(self.kind, self.levels, self.components)

    def rows(self, codes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (N, T) int64 and weights (N, T) float32 of N items.

        Args:
            codes: (N, L, m) integers; `codes[:, :, 0]` is the item's semantic ID, -1 is no code.
            weights: (N, L, m) integers, the probability of each code in 1/255; not read by the hard kinds.
        """
        expected = (self.levels, self.alternates)
        if codes.shape[1:] != expected or weights.shape != codes.shape:
            raise ValueError(
                f"codes have shape {tuple(codes.shape)} and weights {tuple(weights.shape)}; "
                f"expected both (N, {expected[0]}, {expected[1]})"
            )
        codes = codes.long()
        own = codes[:, :, 0]
        if self.pieces is not None:
            begins = torch.where(own[:, :1] >= 0, self.pieces.segment(own), -1)
            rows = torch.where(begins >= 0, begins + 1, PADDING)
            return rows, (begins >= 0).float()
        if not self._soft:
            codes = codes[:, :, :1]
            weights = torch.full_like(codes, FULL_WEIGHT)
        of_levels = tokens(codes, self.components)  # (N, L, m or 1)
        columns = list(of_levels[:, :1].unbind(1) if self._by_prefix else of_levels.unbind(1))
        if self._by_prefix:
            for level in range(1, self.levels):
                code = codes[:, level]
                prefix = own[:, None, :level].expand(-1, code.shape[1], -1)
                columns.append(self._hash(torch.cat([prefix, code[:, :, None]], dim=2)))
        rows, known = torch.cat(columns, dim=1), codes.flatten(1) >= 0
        weight = weights.flatten(1).float() / FULL_WEIGHT
        if self._with_tuple:
            rows = torch.cat([rows, self._hash(own)[:, None]], dim=1)
            known = torch.cat([known, own[:, :1] >= 0], dim=1)
            weight = torch.cat([weight, torch.ones_like(weight[:, :1])], dim=1)
        known &= own[:, :1] >= 0
        return torch.where(known, rows, PADDING), torch.where(known, weight, 0.0)

    def _hash(self, codes: Tensor) -> Tensor:
        """Row of each tuple of codes (..., any length), after the rows of single codes."""
        return self._hashed_from + codes_hash(codes).remainder(self.table_rows - self._hashed_from)


def scheme_problem(kind: TokenKind, levels: int, components: int, alternates: int, table_rows: int) -> str:
    """Why there is no such scheme, whatever the pieces; empty where there is."""
    for name, value in (("levels", levels), ("components", components), ("alternates", alternates)):
        if value < 1:
            return f"{name} is {value}; expected at least 1"
    if table_rows <= (single := _single_rows(kind, levels, components)):
        return (
            f"a token table of {table_rows:,} rows is too small for {levels} levels of {components} codes as {kind!r} "
            f"tokens; expected more than {single:,} rows"
        )
    return levels_problem(levels) if kind == "pieces" else ""


def _single_rows(kind: TokenKind, levels: int, components: int) -> int:
    """Rows of padding and of the single codes that have rows of their own."""
    rows: int = level_tokens(0 if kind.endswith("prefix") else levels - 1, components).stop
    return rows
