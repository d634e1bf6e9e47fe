"""Codebooks in the warehouse, by content: `codebooks/<hash>/` holds a codebook's two files and the tags of its versions.

The files are written before any row or registered version names them, so that tasks, rollback, a moved or copied warehouse and a
new registry need nothing else. The manifest is written last: a folder without it does not count.
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
VERSIONS = "versions.json"  # number -> tags of each version registered with this content

Files = Mapping[str, bytes]

_loaded: dict[str, RQGMM] = {}  # one codebook per worker process, by content hash


# ---- use a registered codebook ----


def codebook_files(registry: Registry, model: CodebookVersion) -> Files:
    """The verified files of a registered codebook, from the warehouse.

    Files that only the registry has are copied into the warehouse first: versions of earlier releases of this software.

    Raises:
        CodebookError: they are damaged.
        RegistryMismatch: neither the warehouse nor the registry has them.
    """
    files = read_codebook(registry.root, model.hash)
    if files is None:
        with tempfile.TemporaryDirectory() as scratch:
            store_codebook(registry.root, _download(registry, model, Path(scratch)), model.hash)
        files = read_codebook(registry.root, model.hash)
        assert files is not None
    load_files(files, model.hash)
    store_tags(registry.root, model)
    return files


def usable_files(warehouse: Warehouse, registry: Registry, model: CodebookVersion) -> Files:
    """The verified files of a codebook that was fitted on vectors like those of this warehouse.

    Raises:
        CodebookError, RegistryMismatch: see `codebook_files`.
        SchemaError: it was fitted on vectors of another recipe.
    """
    files = codebook_files(registry, model)
    check_recipe(json.loads(files[MANIFEST]), model, warehouse.property(ITEM_EMBEDDINGS, FUSION))
    return files


def worker_codebook(files: Files, codebook_hash: str) -> RQGMM:
    """The codebook in these files, loaded once per process."""
    if codebook_hash not in _loaded:
        gc.freeze()  # Spark runs the garbage collector after every task: 0.1 s over all objects that torch's import made
        _loaded[codebook_hash] = load_files(files, codebook_hash).rqgmm
    return _loaded[codebook_hash]


def check_recipe(manifest: Mapping[str, Any], model: CodebookVersion, table_recipe: str | None) -> None:
    """The table has vectors of the recipe that the codebook was fitted on: modalities, dimensions, weights, scaling, order.

    Raises:
        SchemaError: `item_embeddings` has another recipe.
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
            f"codebook version {model.number} (hash {model.hash[:12]}) was fitted on vectors of the recipe {of[0]}, "
            f"item_embeddings holds {of[1]}; expected the same. Fit a codebook on these vectors: `sid fit`"
        )


# ---- register ----


def register_codebook(registry: Registry, folder: Path, tags: Mapping[str, str]) -> CodebookVersion:
    """Store the codebook in the local `folder` in the warehouse and register it. Call inside `Registry.run`."""
    store_codebook(registry.root, folder, tags["codebook_hash"])
    code = Path(__file__).with_name("codebook_model.py")
    model = CodebookVersion.of(register(registry, CODEBOOK_MODEL, code, folder, tags))
    store_tags(registry.root, model)
    return model


def tags_of_manifest(content: bytes, codebook_hash: str, versions: Mapping[int, str]) -> dict[str, str]:
    """The tags to register a codebook with that has only its files; `versions` are the hashes of known versions.

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
            f"{MANIFEST} in {FOLDER}/{codebook_hash} has no {error}; expected the manifest of a codebook that `sid fit` wrote. Restore "
            "that folder from a backup, or remove it"
        ) from error


# ---- the folder of a codebook ----


def store_codebook(root: str, folder: Path, codebook_hash: str) -> None:
    """Copy the codebook in the local `folder` into the warehouse, unless it is there and whole."""
    stored = read_codebook(root, codebook_hash)
    if stored is not None and _is_whole(stored, codebook_hash):
        return
    filesystem, path = _path(root, codebook_hash)
    for name in (TENSORS, MANIFEST):
        write_file(filesystem, f"{path}/{name}", (folder / name).read_bytes())


def read_codebook(root: str, codebook_hash: str) -> Files | None:
    """The two files in the warehouse, not verified; None if one is missing."""
    filesystem, path = _path(root, codebook_hash)
    contents = {name: read_file(filesystem, f"{path}/{name}") for name in (MANIFEST, TENSORS)}
    files = {name: content for name, content in contents.items() if content is not None}
    return files if len(files) == len(contents) else None


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


def store_tags(root: str, model: CodebookVersion) -> None:
    """Write the tags of a version beside its codebook, so that `sid register` can register it again."""
    filesystem, path = _path(root, model.hash)
    known = _read_tags(filesystem, path)
    if str(model.number) not in known:
        known[str(model.number)] = model.tags()
        write_file(filesystem, f"{path}/{VERSIONS}", json.dumps(known, indent=2).encode() + b"\n")


def stored_tags(root: str) -> list[tuple[int, dict[str, str]]]:
    """Number and tags of every version whose tags were written beside its codebook."""
    filesystem, path = _path(root)
    return [
        (int(number), tags)
        for folder in stored_hashes(root)
        for number, tags in _read_tags(filesystem, f"{path}/{folder}").items()
    ]


def stored_hashes(root: str) -> list[str]:
    """The codebooks that the warehouse has a folder of."""
    filesystem, path = _path(root)
    entries: list[Any] = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return sorted(entry.base_name for entry in entries if entry.type == fs.FileType.Directory)


def _read_tags(filesystem: fs.FileSystem, path: str) -> dict[str, dict[str, str]]:
    try:
        tags: dict[str, dict[str, str]] = json.loads(read_file(filesystem, f"{path}/{VERSIONS}") or b"{}")
    except ValueError as error:
        raise CodebookError(
            f"{VERSIONS} in {FOLDER}/{path.rsplit('/', 1)[1]} of the warehouse is damaged ({error}); expected JSON. Restore it from a "
            "backup, or remove it: the next command that uses the codebook writes it again"
        ) from error
    return tags


def _is_whole(files: Files, codebook_hash: str) -> bool:
    try:
        load_files(files, codebook_hash)
    except CodebookError:
        return False
    return True


def _download(registry: Registry, model: CodebookVersion, scratch: Path) -> Path:
    """A folder with the codebook out of the registry's artefacts, verified."""
    from mlflow.exceptions import MlflowException

    try:
        folder = registry.download(model, scratch) / "artifacts" / "codebook"
        load_codebook(folder, expect_hash=model.hash)
    except (OSError, MlflowException, CodebookError) as error:
        raise RegistryMismatch(
            f"codebook version {model.number} has its files neither in {FOLDER}/{model.hash} of the warehouse nor, whole, among the "
            f"artefacts of the MLflow registry ({type(error).__name__}); expected them in one of the two. Restore that folder from a backup, or "
            "go back to another release with `sid rollback --to RELEASE`"
        ) from error
    return folder


def _path(root: str, codebook_hash: str = "") -> tuple[fs.FileSystem, str]:
    filesystem, folder = filesystem_of(root)
    return filesystem, f"{folder}/{FOLDER}/{codebook_hash}".rstrip("/")
