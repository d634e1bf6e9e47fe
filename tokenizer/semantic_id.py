"""The text of a semantic ID and the numbering of its tokens: the only place that knows either."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenizer.errors import DataError

SEPARATOR = "-"
PADDING = 0  # the token of what has no semantic ID


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


def tokens(codes: Tensor, components: int) -> Tensor:
    """(N, L) rows of one embedding table for all levels: level * K + code."""
    return codes.long() + torch.arange(codes.shape[1], device=codes.device) * components


def item_tokens(codes: Tensor, components: int) -> tuple[Tensor, int]:
    """Token rows (I, L + 1) of every item, and the size of their table: one token per level, one for the whole tuple of
    codes.

    Row 0 is PADDING, then come the tokens of `tokens`, then those of the tuples in ascending order. An item whose codes
    are -1 has no semantic ID and only padding tokens.
    """
    known = codes[:, 0] >= 0
    _, tuple_number = torch.unique(codes, dim=0, return_inverse=True)
    first_tuple = codes.shape[1] * components + 1
    rows = torch.cat([tokens(codes, components) + 1, (tuple_number + first_tuple)[:, None]], dim=1)
    return torch.where(known[:, None], rows, PADDING), first_tuple + int(tuple_number.max()) + 1
