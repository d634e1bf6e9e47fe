"""The codebooks of a warehouse by content: `codebooks/<hash>/` holds a codebook's two files and what it was registered as.

They are written before any row or registered version names them, so that tasks, rollback, a moved or copied warehouse and a
registry that is made anew need nothing else. The manifest comes last: without it a folder does not count.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyarrow import fs

from jobs.errors import SchemaError
from jobs.files.sources import filesystem_of, read_file, write_file
from jobs.models.registry import (
    CODEBOOK_MODEL,
    ROLLED_BACK_TAG,
    WAREHOUSE_TAG,
    ModelVersion,
    Registry,
    RegistryMismatch,
    register,
)
from tokenizer import Codebook, CodebookError, load_codebook
from tokenizer.codebook import MANIFEST, TENSORS

FOLDER = "codebooks"
VERSIONS = "versions.json"  # number -> tags of each version registered with this content

Files = Mapping[str, bytes]


def keep(root: str, folder: Path, codebook_hash: str) -> None:
    """Put the codebook in the local `folder` where the warehouse keeps it; nothing happens where it stands already."""
    stored = stored_files(root, codebook_hash)
    if stored is not None and _is_whole(stored, codebook_hash):
        return
    filesystem, path = _place(root, codebook_hash)
    for name in (TENSORS, MANIFEST):
        write_file(filesystem, f"{path}/{name}", (folder / name).read_bytes())


def register_codebook(registry: Registry, folder: Path, tags: Mapping[str, str]) -> ModelVersion:
    """Keep the codebook in the local `folder` and register it. Call inside `Registry.run`."""
    keep(registry.root, folder, tags["codebook_hash"])
    model = register(registry, CODEBOOK_MODEL, Path(__file__).with_name("codebook_model.py"), folder, tags)
    note_version(registry.root, model)
    return model


def codebook_files(registry: Registry, model: ModelVersion) -> Files:
    """The files of a registered codebook out of the warehouse, verified; first copied in where only the registry has them,
    as it is where an earlier release of this software registered it.

    Raises:
        CodebookError: they are damaged.
        RegistryMismatch: neither the warehouse nor the registry has them.
    """
    codebook_hash = model.tags["codebook_hash"]
    files = stored_files(registry.root, codebook_hash)
    if files is None:
        with tempfile.TemporaryDirectory() as scratch:
            keep(registry.root, _downloaded(registry, model, Path(scratch)), codebook_hash)
        files = stored_files(registry.root, codebook_hash)
        assert files is not None
    load_files(files, codebook_hash)
    note_version(registry.root, model)
    return files


def stored_files(root: str, codebook_hash: str) -> Files | None:
    """The two files as the warehouse has them, not verified; None where it lacks one."""
    filesystem, path = _place(root, codebook_hash)
    found = {name: read_file(filesystem, f"{path}/{name}") for name in (MANIFEST, TENSORS)}
    files = {name: content for name, content in found.items() if content is not None}
    return files if len(files) == len(found) else None


def load_files(files: Files, codebook_hash: str) -> Codebook:
    """The codebook in these files.

    Raises:
        CodebookError: they are damaged, or of another codebook.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / codebook_hash
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        try:
            return load_codebook(folder, expect_hash=codebook_hash)
        except CodebookError as error:
            raise CodebookError(
                f"{FOLDER}/{codebook_hash} in the warehouse cannot be used: {error}. Restore that folder from a backup, or remove it: "
                "the next command copies it from the MLflow registry if that still has it"
            ) from error


def note_version(root: str, model: ModelVersion) -> None:
    """Write down beside the codebook as what it is registered, for a registry that must be made anew."""
    filesystem, path = _place(root, model.tags["codebook_hash"])
    known = _noted(filesystem, path)
    if str(model.version) not in known:
        known[str(model.version)] = {k: v for k, v in model.tags.items() if k not in (ROLLED_BACK_TAG, WAREHOUSE_TAG)}
        write_file(filesystem, f"{path}/{VERSIONS}", json.dumps(known, indent=2).encode() + b"\n")


def noted_versions(root: str) -> list[tuple[int, dict[str, str]]]:
    """Number and tags of every version that was written down."""
    filesystem, path = _place(root)
    return [
        (int(number), tags)
        for folder in stored_hashes(root)
        for number, tags in _noted(filesystem, f"{path}/{folder}").items()
    ]


def stored_hashes(root: str) -> list[str]:
    """The codebooks that the warehouse has a folder of."""
    filesystem, path = _place(root)
    found: list[Any] = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return sorted(entry.base_name for entry in found if entry.type == fs.FileType.Directory)


def check_recipe(manifest: Mapping[str, Any], model: ModelVersion, table_recipe: str | None) -> None:
    """A codebook is for vectors of the recipe it was fitted on: the same modalities, dimensions, weights, scaling and order.

    Raises:
        SchemaError: `item_embeddings` is of another.
    """
    fitted, stored = manifest.get("fusion"), json.loads(table_recipe) if table_recipe else None
    if fitted is None or stored is None:
        return
    parts = ["dims", "weights", "normalize"]  # the column of ids and the stored width do not change what a code means
    if fitted.get("order") and stored.get("order"):  # older recipes do not say it
        parts.append("order")
    if [fitted.get(part) for part in parts] != [stored.get(part) for part in parts]:
        of = [json.dumps({part: recipe.get(part) for part in parts}, sort_keys=True) for recipe in (fitted, stored)]
        raise SchemaError(
            f"codebook version {model.version} (hash {model.tags['codebook_hash'][:12]}) was fitted on vectors of the recipe {of[0]}, "
            f"item_embeddings holds {of[1]}; expected the same. Fit a codebook on these vectors: `sid fit`"
        )


def _noted(filesystem: fs.FileSystem, path: str) -> dict[str, dict[str, str]]:
    try:
        noted: dict[str, dict[str, str]] = json.loads(read_file(filesystem, f"{path}/{VERSIONS}") or b"{}")
    except ValueError as error:
        raise CodebookError(
            f"{VERSIONS} in {FOLDER}/{path.rsplit('/', 1)[1]} of the warehouse is damaged ({error}); expected JSON. Restore it from a "
            "backup, or remove it: the next command that uses the codebook writes it again"
        ) from error
    return noted


def _is_whole(files: Files, codebook_hash: str) -> bool:
    try:
        load_files(files, codebook_hash)
    except CodebookError:
        return False
    return True


def _downloaded(registry: Registry, model: ModelVersion, scratch: Path) -> Path:
    """The codebook out of the registry's artefacts, verified."""
    from mlflow.exceptions import MlflowException

    codebook_hash = model.tags["codebook_hash"]
    try:
        folder = registry.download(model, scratch) / "artifacts" / "codebook"
        load_codebook(folder, expect_hash=codebook_hash)
    except (OSError, MlflowException, CodebookError) as error:
        raise RegistryMismatch(
            f"codebook version {model.version} has its files neither in {FOLDER}/{codebook_hash} of the warehouse nor, whole, among the "
            f"artefacts of the MLflow registry ({type(error).__name__}); expected them in one of the two. Restore that folder from a backup, or "
            "go back to another release with `sid rollback --to RELEASE`"
        ) from error
    return folder


def _place(root: str, codebook_hash: str = "") -> tuple[fs.FileSystem, str]:
    filesystem, folder = filesystem_of(root)
    return filesystem, f"{folder}/{FOLDER}/{codebook_hash}".rstrip("/")
