"""`python -m jobs.documents`: writes docs/tables.md and docs/configuration.md from the declared tables and settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from jobs.read_config import all_settings
from jobs.warehouse.tables import TABLES, Table

DOCS = Path(__file__).parent.parent / "docs"


def tables_page() -> str:
    """docs/tables.md: every table with its key, partitions, checks and columns."""
    parts = [
        "# Tables",
        "*Generated from `jobs/warehouse/tables.py` by `python -m jobs.documents`.* Plain Delta tables under the "
        "warehouse; any Delta reader reads them. A column is NOT NULL unless its type says nullable.",
    ]
    for table in TABLES:
        facts = [f"Key: {_names(table.key)}."]
        if table.partition_by:
            facts.append(f"Partitioned by {_names(table.partition_by)}.")
        facts += [f"Check `{name}`: `{condition}`." for name, condition in table.checks.items()]
        if table.change_feed:
            facts.append("Its change data feed is on: it gives consumers the rows that changed between two versions.")
        parts += [f"## {table.name}", table.description, " ".join(facts), _columns(table)]
    return "\n\n".join(parts) + "\n"


def _names(columns: tuple[str, ...]) -> str:
    return ", ".join(f"`{column}`" for column in columns)


def _columns(table: Table) -> str:
    lines = ["| column | type | meaning |", "|---|---|---|"]
    for column in table.schema:
        kind = column.dataType.simpleString() + (", nullable" if column.nullable else "")
        lines.append(f"| `{column.name}` | {kind} | {table.meaning[column.name]} |")
    return "\n".join(lines)


def configuration_page() -> str:
    """docs/configuration.md: every setting with its type, default, bounds and description."""
    parts = [
        "# Configuration",
        "*Generated from `jobs/config.py` by `python -m jobs.documents`.* Give settings as `--set section.key=value`, "
        "or in TOML files with `--config`; later ones win. `warehouse` is `--warehouse DIR`.",
    ]
    section: list[str] = []
    for name, setting in all_settings().items():
        kind: Any = setting.annotation
        if hasattr(kind, "model_fields"):
            section = ["| setting | type | default | meaning |", "|---|---|---|---|"]
            parts += [f"## {name}", ""]
            continue
        meaning = (setting.description or "").replace("|", "\\|")  # a bar would end the cell
        line = f"| `{name}` | {_type(kind, setting.metadata)} | {_default(setting.default)} | {meaning} |"
        if "." not in name:
            parts.append(f"`{name}`: {setting.description}; default {_default(setting.default)}.")
        else:
            section.append(line)
            parts[-1] = "\n".join(section)
    return "\n\n".join(parts) + "\n"


def _type(kind: Any, metadata: list[Any]) -> str:
    """The type with its bounds, in words."""
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) is dict:
        return "table"
    words = {bool: "true or false", int: "whole number", float: "number", str: "text"}[kind]
    signs = (("ge", "from "), ("gt", "above "), ("le", "to "))
    bounds = [
        f"{sign}{value}"
        for name, sign in signs
        for bound in metadata
        if (value := getattr(bound, name, None)) is not None
    ]
    return " ".join([words, *bounds])


def _default(value: Any) -> str:
    """As it is written in TOML; tables and texts that are empty have no default to show."""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`" if value not in ("", {}) else "none"


def main() -> None:
    (DOCS / "tables.md").write_text(tables_page())
    (DOCS / "configuration.md").write_text(configuration_page())


if __name__ == "__main__":
    main()
