"""The commands of the documents are commands that exist, and the folders' READMEs list their files."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
from delta_rows import write_ids, write_releases

from pipelines.__main__ import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^ +(?:\.venv/bin/)?sid (.+?)(?: {2,}#.*| +# .*)?$", README, re.MULTILINE)
MAKE = re.findall(r"^ +make (\w+)", README, re.MULTILINE)


def parsed(arguments: list[str]) -> dict[str, Any]:
    """The parameters that a command line gives its command; click raises on what it does not know."""
    group: Any = typer.main.get_command(app)
    context = group.make_context("sid", list(arguments))
    command = group.get_command(context, arguments[0])
    assert command is not None, f"sid has no command {arguments[0]}"
    params: dict[str, Any] = command.make_context(arguments[0], arguments[1:], parent=context).params
    return params


def test_the_readme_shows_commands() -> None:
    assert len(COMMANDS) >= 6
    assert MAKE


@pytest.mark.parametrize("line", COMMANDS)
def test_each_command_of_the_readme_parses(line: str) -> None:
    parsed(shlex.split(line.replace("ITEM_ID", "item-1")))


def test_an_unknown_flag_would_not_parse() -> None:
    with pytest.raises(Exception, match="No such option"):
        parsed(["status", "--no-such-flag"])


def test_the_reader_of_released_ids_gives_the_rows_that_the_newest_release_pins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path / "warehouse" / "demo")
    write_ids(root, (1, "a"), (1, "a"))
    write_ids(root, (2, "b"), (2, "b"))  # version 1, which the releases pin
    write_ids(root, (2, "not released"), (3, "not released"))
    write_releases(root, (1, "a", "promoted"), (2, "b", "promoted"))
    code = next(block for block in re.findall(r"```python\n(.+?)```", README, re.DOTALL) if "deltalake" in block)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert (
        names["table"].select(["codebook_version", "codebook_hash"]).to_pylist()
        == [{"codebook_version": 2, "codebook_hash": "b"}] * 2
    )


@pytest.mark.parametrize("target", MAKE)
def test_each_target_of_the_readme_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def files_in_tables(text: str) -> set[str]:
    """The paths in the tables of a README: of the first column, or of the second below a folder in the first."""
    paths, folder = set(), ""
    for line in text.splitlines():
        if not line.startswith("|"):
            folder = ""
            continue
        first, second = [cell.strip() for cell in line.split("|")][1:3]
        if named := re.fullmatch(r"`([\w/]+/)`", first):
            folder = named[1]
        names = second if named or not first else first
        paths |= {folder + name for name in re.findall(r"`([\w/]+\.py)`", names)}
    return paths


@pytest.mark.parametrize("folder", ["benchmarks", "jobs", "pipelines", "tests", "tokenizer"])
def test_the_readme_of_a_folder_lists_each_of_its_files(folder: str) -> None:
    files = {path.relative_to(ROOT / folder).as_posix() for path in (ROOT / folder).rglob("*.py")}
    files = {file for file in files if not file.endswith("__init__.py")}
    assert files
    assert files_in_tables((ROOT / folder / "README.md").read_text()) == files


@pytest.mark.parametrize(
    "document", ["README.md", "docs/concepts.md", "jobs/README.md", "tokenizer/README.md", "infra/README.md"]
)
def test_links_lead_to_files(document: str) -> None:
    path = ROOT / document
    links = re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_the_files_and_names_of_the_page_on_extending_exist() -> None:
    text = (ROOT / "docs" / "extending.md").read_text()
    paths = {name for name in re.findall(r"`([\w./]+/[\w.]*)`", text) if "NAME" not in name}
    assert len(paths) > 15
    assert [path for path in paths if not (ROOT / path).exists()] == []
    code = "".join(
        path.read_text() for folder in ("jobs", "benchmarks", "tokenizer") for path in (ROOT / folder).rglob("*.py")
    )
    names = set(re.findall(r"`(\w+)`", text)) - {"description", "codes"}
    assert [name for name in names if not re.search(rf"\b{name}\b", code)] == []
