"""The text of a semantic ID and the numbering of its tokens: the only place that knows either."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenizer.errors import DataError

SEPARATOR = "-"
PADDING = 0  # row of a token table for what has no semantic ID


def text_of(codes: Sequence[int], suffix: int) -> str:
    """`12-87`; with a suffix above 0, which tells items of equal codes apart, `12-87-1`."""
    return SEPARATOR.join(str(part) for part in [*codes, *([suffix] if suffix else [])])


def parse(text: str, levels: int) -> tuple[tuple[int, ...], int]:
    """Codes and suffix of a semantic ID.

    Raises:
        DataError: not `levels` codes and at most one suffix above 0.
    """
    parts = text.split(SEPARATOR)
    canonical = all(re.fullmatch(r"0|[1-9]\d{0,17}", part, re.ASCII) for part in parts)
    if len(parts) not in (levels, levels + 1) or not canonical or parts[levels:] == ["0"]:
        raise DataError(
            f"{text!r} is not a semantic ID of {levels} levels; expected {levels} codes and perhaps a suffix above 0, "
            "such as 12-87-1"
        )
    numbers = tuple(int(part) for part in parts)
    return numbers[:levels], numbers[levels] if len(numbers) > levels else 0


def level_tokens(level: int, components: int) -> slice:
    """The rows of a token table for all levels that are those of one level (from 0); row 0 is PADDING."""
    return slice(1 + level * components, 1 + (level + 1) * components)


def tokens(codes: Tensor, components: int) -> Tensor:
    """Codes (N, L) or (N, L, m) below K -> int64 rows of the same shape in one token table for all levels."""
    starts = [level_tokens(level, components).start for level in range(codes.shape[1])]
    return codes.long() + torch.tensor(starts, device=codes.device).view(-1, *[1] * (codes.ndim - 2))
