"""How the codes of an item become rows of a CTR model's token table.

Every model embeds an item as `item_embedding[row of its id] + sum_t weights[t] * token_embedding[rows[t]]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenizer.semantic_id import PADDING, level_tokens, tokens

TokenKind = Literal["level", "prefix", "soft", "soft-prefix"]
FULL_WEIGHT = 255  # the weights of a level's alternates add to this


@dataclass(frozen=True)
class TokenScheme:
    """Codes of items -> rows and weights of one token table with `table_rows` rows; row 0 is padding.

    kind:
        "level"        a token for the code of each level, and one for the whole tuple of codes.
        "prefix"       a token for each prefix of the codes: level 1, levels 1-2, ... (prefix n-gram, arXiv 2504.02137).
        "soft"         as "level", but a level is the weighted mean of the tokens of its most probable codes.
        "soft-prefix"  as "prefix", but the last code of each prefix is one of the most probable, with its weight.

    Tokens of single codes have rows of their own. Prefixes and tuples of several codes are hashed to the other rows, so
    that the table does not grow with the number of items.

    Attributes:
        levels: L, codes of an item.
        components: K, number of different codes at a level.
        alternates: m, codes a level that the input carries; the first is the item's own.
        table_rows: Rows of the token table, padding included.
    """

    kind: TokenKind
    levels: int
    components: int
    alternates: int
    table_rows: int

    def __post_init__(self) -> None:
        for name in ("levels", "components", "alternates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.table_rows <= self._hashed_from:
            raise ValueError(
                f"a token table of {self.table_rows:,} rows is too small for {self.levels} levels of {self.components} "
                f"codes as {self.kind!r} tokens; expected more than {self._hashed_from:,} rows"
            )

    @property
    def fields(self) -> tuple[int, ...]:
        """Tokens of each field, coarsest first: the levels or prefixes in turn, then the tuple of all codes."""
        each = self.alternates if self._soft else 1
        return (each,) * self.levels + (() if self._by_prefix else (1,))

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
    def _soft(self) -> bool:
        return self.kind.startswith("soft")

    @property
    def _by_prefix(self) -> bool:
        return self.kind.endswith("prefix")

    @property
    def _hashed_from(self) -> int:
        rows: int = self.level_rows[-1].stop
        return rows

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
        if not self._by_prefix:
            rows = torch.cat([rows, self._hash(own)[:, None]], dim=1)
            known = torch.cat([known, own[:, :1] >= 0], dim=1)
            weight = torch.cat([weight, torch.ones_like(weight[:, :1])], dim=1)
        known &= own[:, :1] >= 0
        return torch.where(known, rows, PADDING), torch.where(known, weight, 0.0)

    def _hash(self, codes: Tensor) -> Tensor:
        """Row of each tuple of codes (..., any length), after the rows of single codes."""
        mixed = torch.full(codes.shape[:-1], codes.shape[-1], dtype=torch.int64, device=codes.device)
        for code in codes.unbind(-1):
            mixed = _mix(mixed * 0x100000001B3 + code)
        return self._hashed_from + mixed.remainder(self.table_rows - self._hashed_from)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer on int64, which wraps: of numbers that differ in one bit about half the bits differ."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))
