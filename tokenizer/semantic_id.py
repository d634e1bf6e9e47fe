"""The text of a semantic ID, and its tokens: the only place that knows the format."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, arange

from tokenizer.errors import DataError


def text_of(codes: Sequence[int], suffix: int) -> str:
    """`12-87`; with a suffix above 0, `12-87-1`."""
    return "-".join(str(part) for part in [*codes, *([suffix] if suffix else [])])


def parse(text: str, levels: int) -> tuple[tuple[int, ...], int]:
    """Codes and suffix of a semantic ID.

    Raises:
        DataError: not `levels` codes and at most one suffix above 0.
    """
    parts = text.split("-")
    if len(parts) not in (levels, levels + 1) or not all(part.isdecimal() for part in parts) or parts[levels:] == ["0"]:
        raise DataError(
            f"{text!r} is not a semantic ID of {levels} levels; expected {levels} codes and perhaps a suffix above 0, such as 12-87-1"
        )
    numbers = tuple(int(part) for part in parts)
    return numbers[:levels], numbers[levels] if len(numbers) > levels else 0


def tokens(codes: Tensor, components: int) -> Tensor:
    """(N, L) rows of one embedding table for all levels: level * K + code."""
    return codes.long() + arange(codes.shape[1]) * components
