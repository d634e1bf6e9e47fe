"""The arrows infra -> pipelines -> jobs -> tokenizer, read off the imports."""

from __future__ import annotations

import ast
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "tokenizer": {"tokenizer"},
    "jobs": {"jobs", "tokenizer"},
    "pipelines": {"pipelines", "jobs", "tokenizer", "benchmarks"},  # for `sid bench`
    "benchmarks": {"benchmarks", "jobs", "tokenizer"},
}
TOKENIZER_USES = {"torch", "numpy", "safetensors", "faiss", "tokenizer"}
STAGES = ("load", "fit", "encode", "evaluate", "train", "cache")
SHARED = ("files", "spark", "warehouse", "embeddings", "models", "ctr")  # each may import those before it
FILES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    ours = imported(path) & {"tokenizer", "jobs", "pipelines", "infra", "tests", "benchmarks"}
    assert ours <= MAY_IMPORT[package]
    if package == "tokenizer":
        assert imported(path) <= TOKENIZER_USES | set(sys.stdlib_module_names)
        assert "environ" not in path.read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines").rglob("*.py")), ids=lambda path: path.name)
def test_pipelines_ask_the_tables_by_named_functions(path: Path) -> None:
    """Queries are in jobs/warehouse/queries.py and in the stages: no Spark, no SQL and no table is read here."""
    assert "pyspark" not in imported(path)
    attributes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
    owners = [(getattr(node.value, "id", getattr(node.value, "attr", "")), node.attr) for node in attributes]
    assert [name for owner, name in owners if owner == "warehouse" and name != "root"] == []


def parts_of_jobs(path: Path) -> set[str]:
    """The modules and folders of `jobs/` that a file imports, by name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("jobs.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "jobs":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jobs."):
            names.add((node.module or "").split(".")[1])
    return names


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_imports_another(stage: str) -> None:
    assert parts_of_jobs(ROOT / "jobs" / f"{stage}.py").isdisjoint({*STAGES, "__main__"} - {stage})


@pytest.mark.parametrize("stage", STAGES)
def test_results_of_stages_follow_one_rule(stage: str) -> None:
    """`run` returns a frozen <Stage>Result that says in one line what happened, and whether there was nothing to do."""
    result = get_type_hints(import_module(f"jobs.{stage}").run)["return"]
    assert result.__name__ == f"{stage.title()}Result"
    assert result.__dataclass_params__.frozen
    assert {field.name for field in fields(result)} >= {"nothing_to_do", "seconds"}
    assert get_type_hints(result.summary) == {"return": str}


@pytest.mark.parametrize("folder", SHARED)
def test_shared_folders_import_only_those_before_them(folder: str) -> None:
    allowed = set(SHARED[: SHARED.index(folder) + 1])
    for path in sorted((ROOT / "jobs" / folder).rglob("*.py")):
        assert parts_of_jobs(path) & {*SHARED, *STAGES, "__main__"} <= allowed, path


def test_every_folder_of_jobs_has_its_rank() -> None:
    assert {path.parent.name for path in (ROOT / "jobs").glob("*/*.py")} == set(SHARED)


def test_one_file_of_the_library_knows_processes_and_one_knows_speed() -> None:
    """torch.distributed in collectives, thread pools and oneDNN in kernels, nowhere else."""
    texts = {path.name: path.read_text() for path in sorted((ROOT / "tokenizer").glob("*.py"))}
    for word, home in (
        ("distributed as dist", "collectives.py"),
        ("ThreadPoolExecutor", "kernels.py"),
        ("mkldnn", "kernels.py"),
    ):
        assert [name for name, text in texts.items() if word in text] == [home]
    for name, text in texts.items():
        imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
        modules = {getattr(node, "module", None) for node in imports} | {
            alias.name for node in imports for alias in node.names
        }
        assert name == "collectives.py" or not any(str(module).startswith("torch.distributed") for module in modules)
        assert text.count("\n") <= 400


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_has_the_name_of_a_standard_module(path: Path) -> None:
    assert path.stem.startswith("__") or path.stem not in sys.stdlib_module_names
