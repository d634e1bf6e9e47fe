"""Errors that several folders of jobs/ raise, and how they quote those of libraries."""

from __future__ import annotations


class SchemaError(ValueError):
    """A table or an input does not have the columns, types or values that it must have."""


class WarehouseError(RuntimeError):
    """The warehouse cannot be used: not writable, or in use by another command."""


def first_line(error: BaseException) -> str:
    """The first line of an exception of a library, at most 200 characters, for a sentence of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
