"""The generated documents are current and complete."""

from __future__ import annotations

from jobs.documents import DOCS, configuration_page, tables_page
from jobs.read_config import all_settings
from jobs.warehouse.tables import TABLES


def test_the_documents_are_current() -> None:
    """If this fails, run `python -m jobs.documents`."""
    assert (DOCS / "tables.md").read_text() == tables_page()
    assert (DOCS / "configuration.md").read_text() == configuration_page()


def test_every_column_is_described_and_no_other() -> None:
    for table in TABLES:
        assert table.description
        assert set(table.meaning) == set(table.schema.names)
        assert all(table.meaning.values())


def test_every_setting_is_described() -> None:
    assert [name for name, setting in all_settings().items() if "." in name and not setting.description] == []
