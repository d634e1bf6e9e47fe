"""Codebooks in the warehouse: `codebooks/<hash>/` has the two files of a codebook and the tags of its versions.

The files are written before any row or registered version refers to them. So tasks, a rollback, a moved or copied
warehouse and a new registry need nothing else. The manifest is written last; a folder without it is ignored.
"""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from pyarrow import fs

from jobs.embeddings.recipe import FUSION
from jobs.errors import SchemaError
from jobs.files.filesystem import filesystem_of, read_file, write_file
from jobs.models.registry import CODEBOOK_MODEL, Registry, register
from jobs.models.versions import CodebookVersion, RegistryMismatch, codebook_tags
from jobs.warehouse.delta_spark import Warehouse
from jobs.warehouse.tables import ITEM_EMBEDDINGS
from tokenizer import RQGMM, Codebook, CodebookError, load_codebook
from tokenizer.codebook import MANIFEST, TENSORS

FOLDER = "codebooks"
VERSIONS = "versions.json"  # version number -> tags of each version that has this content

Files = Mapping[str, bytes]

_loaded: dict[str, RQGMM] = {}  # one codebook per worker process, by content hash


# ---- use a registered codebook ----


def codebook_files(registry: Registry, codebook: CodebookVersion) -> Files:
    """The verified files of a registered codebook, from the warehouse.

    Files that only the registry has, as after a development version before 0.1.0, are copied into the warehouse first.

    Raises:
        CodebookError: the files are damaged.
        RegistryMismatch: neither the warehouse nor the registry has them.
    """
    files = read_codebook(registry.root, codebook.hash)
    if files is None:
        with tempfile.TemporaryDirectory() as scratch:
            store_codebook(registry.root, _download(registry, codebook, Path(scratch)), codebook.hash)
        files = read_codebook(registry.root, codebook.hash)
        assert files is not None
    load_files(files, codebook.hash)
    store_tags(registry.root, codebook)
    return files


def usable_files(warehouse: Warehouse, registry: Registry, codebook: CodebookVersion) -> Files:
    """The verified files of a codebook, after a check that its fusion is that of this warehouse's vectors.

    Raises:
        CodebookError, RegistryMismatch: see `codebook_files`.
        SchemaError: it was fitted on vectors of another recipe.
    """
    files = codebook_files(registry, codebook)
    check_recipe(json.loads(files[MANIFEST]), codebook, warehouse.property(ITEM_EMBEDDINGS, FUSION))
    return files


def worker_codebook(files: Files, codebook_hash: str) -> RQGMM:
    """The codebook in these files; a worker process loads it once."""
    if codebook_hash not in _loaded:
        # Spark collects garbage after every task, which takes 0.1 s over all objects that importing torch created.
        gc.freeze()
        _loaded[codebook_hash] = load_files(files, codebook_hash).rqgmm
    return _loaded[codebook_hash]


def check_recipe(manifest: Mapping[str, Any], codebook: CodebookVersion, table_recipe: str | None) -> None:
    """Check that table and codebook have the same recipe: modalities, dimensions, weights, scaling, order.

    Raises:
        SchemaError: `item_embeddings` has another recipe.
    """
    fitted, stored = manifest.get("fusion"), json.loads(table_recipe) if table_recipe else None
    if fitted is None or stored is None:
        return
    parts = ["dims", "weights", "normalize"]  # the name of the id column and the dtype do not change codes
    if fitted.get("order") and stored.get("order"):  # older recipes have no order
        parts.append("order")
    if [fitted.get(part) for part in parts] != [stored.get(part) for part in parts]:
        of = [json.dumps({part: recipe.get(part) for part in parts}, sort_keys=True) for recipe in (fitted, stored)]
        raise SchemaError(
            f"codebook version {codebook.number} (hash {codebook.hash[:12]}) was fitted on vectors of the recipe "
            f"{of[0]}, item_embeddings holds {of[1]}; expected the same. Fit a codebook on these vectors: `sid fit`"
        )


# ---- register ----


def register_codebook(registry: Registry, folder: Path, tags: Mapping[str, str]) -> CodebookVersion:
    """Copy the codebook from a local folder into the warehouse and register it. Call inside `Registry.run`."""
    store_codebook(registry.root, folder, tags["codebook_hash"])
    code = Path(__file__).with_name("codebook_model.py")
    codebook = CodebookVersion.of(register(registry, CODEBOOK_MODEL, code, folder, tags))
    store_tags(registry.root, codebook)
    return codebook


def tags_of_manifest(content: bytes, codebook_hash: str, versions: Mapping[int, str]) -> dict[str, str]:
    """The tags of a codebook, from the content of its manifest; `versions` is version number -> hash.

    Raises:
        CodebookError: the manifest lacks an entry.
    """
    manifest = json.loads(content)
    start = manifest.get("started_from")
    try:
        return codebook_tags(
            codebook_hash=codebook_hash,
            levels=manifest["levels"],
            components=manifest["components"],
            dim=manifest["dim"],
            method=manifest.get("fit", {}).get("method", "annealed"),
            fit_key="",
            started_from=start,
            started_from_version=next((number for number, known in versions.items() if known == start), None),
            table_versions=manifest.get("table_versions", {}),
            run_date=date.fromisoformat(manifest["run_date"]),
        )
    except KeyError as error:
        raise CodebookError(
            f"{MANIFEST} in {FOLDER}/{codebook_hash} has no {error}; expected the manifest of a codebook that "
            "`sid fit` wrote. Restore that folder from a backup, or remove it"
        ) from error


# ---- the folder of a codebook ----


def store_codebook(root: str, folder: Path, codebook_hash: str) -> None:
    """Copy the codebook from a local folder into the warehouse, unless it is there and undamaged."""
    stored = read_codebook(root, codebook_hash)
    if stored is not None and _is_undamaged(stored, codebook_hash):
        return
    filesystem, path = _path(root, codebook_hash)
    for name in (TENSORS, MANIFEST):
        write_file(filesystem, f"{path}/{name}", (folder / name).read_bytes())


def read_codebook(root: str, codebook_hash: str) -> Files | None:
    """The two files in the warehouse, unverified; None if one is missing."""
    filesystem, path = _path(root, codebook_hash)
    contents = {name: read_file(filesystem, f"{path}/{name}") for name in (MANIFEST, TENSORS)}
    files = {name: content for name, content in contents.items() if content is not None}
    return files if len(files) == len(contents) else None


def load_files(files: Files, codebook_hash: str) -> Codebook:
    """Load the codebook from the content of its files.

    Raises:
        CodebookError: the files are damaged, or of another codebook.
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
                f"{FOLDER}/{codebook_hash} in the warehouse cannot be used: {error}. Restore that folder from a "
                "backup, or remove it: the next command copies it from the MLflow registry if that still has it"
            ) from error


def store_tags(root: str, codebook: CodebookVersion) -> None:
    """Store the tags of a version with its codebook, so that `sid register` can register it again."""
    filesystem, path = _path(root, codebook.hash)
    known = _read_tags(filesystem, path)
    if str(codebook.number) not in known:
        known[str(codebook.number)] = codebook.tags()
        write_file(filesystem, f"{path}/{VERSIONS}", json.dumps(known, indent=2).encode() + b"\n")


def stored_tags(root: str) -> list[tuple[int, dict[str, str]]]:
    """Number and tags of every version whose tags are stored with its codebook."""
    filesystem, path = _path(root)
    return [
        (int(number), tags)
        for folder in stored_hashes(root)
        for number, tags in _read_tags(filesystem, f"{path}/{folder}").items()
    ]


def stored_hashes(root: str) -> list[str]:
    """The hashes of the codebooks that have a folder in the warehouse."""
    filesystem, path = _path(root)
    entries: list[Any] = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return sorted(entry.base_name for entry in entries if entry.type == fs.FileType.Directory)


def _read_tags(filesystem: fs.FileSystem, path: str) -> dict[str, dict[str, str]]:
    try:
        tags: dict[str, dict[str, str]] = json.loads(read_file(filesystem, f"{path}/{VERSIONS}") or b"{}")
    except ValueError as error:
        raise CodebookError(
            f"{VERSIONS} in {FOLDER}/{path.rsplit('/', 1)[1]} of the warehouse is damaged ({error}); expected JSON. "
            "Restore it from a backup, or remove it: the next command that uses the codebook writes it again"
        ) from error
    return tags


def _is_undamaged(files: Files, codebook_hash: str) -> bool:
    try:
        load_files(files, codebook_hash)
    except CodebookError:
        return False
    return True


def _download(registry: Registry, codebook: CodebookVersion, scratch: Path) -> Path:
    """Download a codebook from the registry's artefacts and verify it; returns its folder.

    Raises:
        RegistryMismatch: the registry does not have it, or it is damaged.
    """
    from mlflow.exceptions import MlflowException

    try:
        folder = registry.download(codebook, scratch) / "artifacts" / "codebook"
        load_codebook(folder, expect_hash=codebook.hash)
    except (OSError, MlflowException, CodebookError) as error:
        raise RegistryMismatch(
            f"codebook version {codebook.number} has its files neither in {FOLDER}/{codebook.hash} of the warehouse "
            f"nor, whole, among the artefacts of the MLflow registry ({type(error).__name__}); expected them in one "
            "of the two. Restore that folder from a backup, or go back to another release with "
            "`sid rollback --to RELEASE`"
        ) from error
    return folder


def _path(root: str, codebook_hash: str = "") -> tuple[fs.FileSystem, str]:
    filesystem, folder = filesystem_of(root)
    return filesystem, f"{folder}/{FOLDER}/{codebook_hash}".rstrip("/")
