"""Errors that several folders of jobs/ raise."""

from __future__ import annotations


class SchemaError(ValueError):
    """A table or an input does not have the columns, types or values that it must have."""


class WarehouseError(RuntimeError):
    """The warehouse cannot be used: not writable, or in use by another command."""
