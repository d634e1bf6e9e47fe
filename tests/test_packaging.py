"""Our `tokenizer` is the one imported, and an intruder is named."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

from jobs.identity import check_packages

ROOT = Path(__file__).parent.parent


def test_our_packages_are_the_ones_imported() -> None:
    check_packages()


def test_another_tokenizer_is_named(tmp_path: Path) -> None:
    """A real distribution on the path that installs a package `tokenizer`."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "__init__.py").write_text("")
    info = tmp_path / "intruder-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: intruder\nVersion: 1.0\n")
    (info / "RECORD").write_text("tokenizer/__init__.py,,\nintruder-1.0.dist-info/METADATA,,\n")
    (info / "top_level.txt").write_text("tokenizer\n")
    code = (
        f"import sys; sys.path.append({str(tmp_path)!r}); sys.argv = ['sid', 'status']; "
        "from pipelines.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 5
    assert "distribution 'intruder' installs a package named 'tokenizer'" in done.stderr
    assert "pip uninstall intruder" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_installation_brings_every_package_that_is_imported() -> None:
    """Also what is imported late; what is optional, the Java runtime and the client of Redis, is an extra."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    lists = [setup["options"]["install_requires"], *(extras[name] for name in extras if name != "dev")]
    required = {re.split(r"[ <>=!~;]", line)[0] for text in lists for line in text.split("\n") if line}
    owners = packages_distributions()
    files = [path for package in ("jobs", "pipelines", "tokenizer") for path in (ROOT / package).rglob("*.py")]
    imports = [node for path in files for node in ast.walk(ast.parse(path.read_text()))]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in imports if isinstance(node, ast.ImportFrom) and node.module}
    theirs = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    theirs -= {"jobs", "pipelines", "tokenizer", "benchmarks"}
    assert "faiss" in theirs
    for name in theirs:
        distributions = {owner.lower().replace("_", "-") for owner in owners[name]}
        assert distributions & required, f"{name} is imported, and none of {distributions} is required"
