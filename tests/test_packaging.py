"""Our `tokenizer` is the one imported, and an intruder is named."""

from __future__ import annotations

import subprocess
import sys
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
    code = f"import sys; sys.path.append({str(tmp_path)!r}); sys.argv = ['sid', 'status']; from pipelines.__main__ import main; main()"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert told.returncode == 5
    assert "distribution 'intruder' installs a package named 'tokenizer'" in told.stderr
    assert "pip uninstall intruder" in told.stderr
    assert "Traceback" not in told.stderr
