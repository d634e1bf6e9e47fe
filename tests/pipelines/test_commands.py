"""The command line: what it refuses before it works, what it prints, and that looking changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest
from rich.table import Table as Grid
from typer.testing import CliRunner

from jobs.__main__ import app as stages
from jobs.command_line import version_number
from jobs.config import Config
from jobs.models.registry import open_registry
from jobs.warehouse.delta_spark import Warehouse
from jobs.warehouse.tables import REJECTED_EMBEDDINGS
from pipelines.__main__ import app
from pipelines.lineage import print_item
from pipelines.report import Terminal, page

ROOT = Path(__file__).parents[2]
NASTY = ["[/b]", "[red]x[/red]", ":smile:", "[link=x]y[/link]", "\\[b]"]


def sid(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(arguments), prog_name="sid")
    return done.exit_code, done.stderr


@pytest.mark.parametrize(
    "command", [["status"], ["explain", "a"], ["backfill", "--codebook", "1", "--all", "--dry-run"]]
)
def test_looking_at_a_warehouse_that_is_not_there_makes_none(command: list[str], tmp_path: Path) -> None:
    code, message = sid(*command, "--warehouse", str(tmp_path / "warehose"))
    assert code == 2
    assert f"sid: warehouse {tmp_path}/warehose does not exist" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["status"], ["nightly"], ["load"], ["promote"], ["rollback"], ["demo"], ["fit"]])
def test_a_json_file_that_cannot_be_written_is_found_before_the_work(command: list[str], tmp_path: Path) -> None:
    warehouse = ["--warehouse", str(tmp_path / "w")]
    code, message = sid(*command, *warehouse, "--json", str(tmp_path / "no" / "x.json"))
    assert (code, message) == (
        2,
        f"sid: --json {tmp_path}/no/x.json: there is no folder {tmp_path}/no; expected one to write the file in. Make "
        "it first\n",
    )
    code, message = sid(*command, *warehouse, "--json", str(tmp_path))
    assert (code, message) == (2, f"sid: --json {tmp_path} is a folder; expected the path of a file to write\n")
    assert list(tmp_path.iterdir()) == []


def test_settings_days_and_json_are_wrong_together(tmp_path: Path) -> None:
    code, message = sid("nightly", "--date", "2026-W05-6", "--set", "fit.seed=1e20", "--json", str(tmp_path))
    assert code == 2
    assert message.splitlines() == [
        "sid: 3 settings are wrong:",
        "  1. fit.seed = 1e+20; expected a whole number from 0 to 4294967295",
        "  2. date '2026-W05-6' is not a day of the calendar; expected YYYY-MM-DD, such as 2026-01-31",
        f"  3. --json {tmp_path} is a folder; expected the path of a file to write",
    ]


def test_an_id_that_begins_with_a_dash_gets_a_hint() -> None:
    for item in ("-5", "--all-black"):
        code, message = sid("explain", item)
        assert code == 2
        assert "goes after '--': sid explain -- -ITEM_ID" in message


@pytest.mark.parametrize(
    ("name", "number"),
    [("4", 4), ("²", None), ("٤", None), ("-1", None), ("9" * 30, None), ("champion", None), ("", None)],
)
def test_a_codebook_version_is_a_number_in_ascii_digits(name: str, number: int | None) -> None:
    assert version_number(name) == number


def test_releases_are_counted_from_one() -> None:
    code, message = sid("rollback", "--to", "0")
    assert code == 2
    assert "--to" in message


def test_the_stages_of_both_commands_are_the_same() -> None:
    names = {command.callback.__name__ for command in stages.registered_commands if command.callback}
    assert names == {"load", "fit", "encode", "evaluate", "train", "cache"}
    assert names <= {command.callback.__name__ for command in app.registered_commands if command.callback}


# ---- what is printed ----


@pytest.mark.parametrize("text", NASTY)
def test_ids_are_printed_as_they_are(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    grid = Grid(show_header=False, box=None)
    grid.add_row("id", text)
    page().print(f"item {text}")
    page().print(grid)
    assert capsys.readouterr().out.split() == ["item", text, "id", text]


@pytest.mark.parametrize("text", NASTY)
def test_progress_prints_them_as_they_are(
    text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    assert terminal.console.is_terminal
    with terminal.step("load", text):
        terminal.note(text)
    terminal.done("load", text)
    assert f"s  load: {text}" in capsys.readouterr().err


@pytest.mark.parametrize("item", ["[/b]", "[red]x[/red]"])
def test_explain_prints_an_item_as_it_is(
    warehouse: Warehouse, settings: Callable[..., Config], capsys: pytest.CaptureFixture[str], item: str
) -> None:
    row = {
        "item_id": item,
        "occurrence": 1,
        "reason": "nan",
        "detail": "[bold]",
        "excerpt": "[1, nan]",
        "run_date": date(2026, 1, 1),
    }
    warehouse.append(REJECTED_EMBEDDINGS, warehouse.rows(REJECTED_EMBEDDINGS, [row]))
    registry = open_registry(settings(), warehouse.root)
    assert print_item(warehouse, registry, item)
    shown = capsys.readouterr().out
    assert f"item {item}\n" in shown
    assert "2026-01-01: nan: [bold]; [1, nan]" in shown
    assert not print_item(warehouse, registry, "[/i]")
    assert "item '[/i]' is in no table of this warehouse" in capsys.readouterr().out


# ---- looking changes nothing ----


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_status_of_a_folder_without_tables_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    command = [sys.executable, "-m", "pipelines", "status", "--warehouse", str(tmp_path / "w")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "No release yet" in done.stdout
    assert list(tree(tmp_path)) == ["w"]
