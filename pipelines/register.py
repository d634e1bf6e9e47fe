"""register: register the codebooks of a warehouse again, under their numbers, in a registry that lost them.

Codebooks, releases and IDs are in the warehouse, so nothing is fitted or encoded. MLflow's runs and the CTR models do
not come back.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from jobs.config import Config
from jobs.models.champion import OTHER_REGISTRY, own_versions
from jobs.models.codebooks import (
    FOLDER,
    Files,
    load_files,
    read_codebook,
    register_codebook,
    stored_hashes,
    stored_tags,
    tags_of_manifest,
)
from jobs.models.registry import CANDIDATE, CHAMPION, CODEBOOK_MODEL, Registry, register_lost
from jobs.models.versions import LOST_TAG, RegistryMismatch
from jobs.warehouse.delta_rs import HASH_DIGITS, hashes_by_codebook_version
from jobs.warehouse.releases import Release, current_release, releases
from tokenizer.codebook import MANIFEST


@dataclass(frozen=True)
class RegisterResult:
    registered: tuple[int, ...]  # codebook versions, from their files in the warehouse
    lost: tuple[int, ...]  # their files are gone; an empty version reserves each number
    champion_version: int | None
    candidate_version: int | None
    nothing_to_do: bool = False


def register(config: Config, registry: Registry, report: Callable[[str], None]) -> RegisterResult:
    """Register every version that the warehouse knows and the registry lacks, in order, and set the aliases.

    `report` takes a line per version. Call with the writer lock held. A second call, also after a kill, does the rest.

    Raises:
        RegistryMismatch: a number is taken by another codebook, or the codebook of the current release is gone.
        CodebookError: the files of a codebook are damaged; nothing was registered.
    """
    root, present = registry.root, own_versions(registry)
    hashes, known_tags = _known_versions(root)
    for number, codebook_hash in hashes.items():
        if number in present and present[number].codebook_hash[:HASH_DIGITS] != codebook_hash[:HASH_DIGITS]:
            raise RegistryMismatch(
                f"version {number} in the registry has hash {present[number].codebook_hash[:12] or 'none'}, the "
                f"warehouse's codebook version {number} has {codebook_hash[:12]}; expected the same. {OTHER_REGISTRY}"
            )
    # MLflow gives the next number and never reuses one.
    numbers = range(max(present, default=0) + 1, max(hashes, default=0) + 1)
    release = current_release(root)
    files = {number: _verified_files(root, hashes.get(number, "")) for number in numbers}
    _check_release(release, {*present, *(number for number in numbers if files[number] is not None)})
    for number in sorted(set(hashes) - set(present) - set(numbers)):
        report(f"version {number} was deleted in the registry, which never gives a number twice; it stays so")
    for number in numbers:
        codebook_hash = hashes.get(number, "")
        tags = _tags(codebook_hash, files[number], known_tags.get((number, codebook_hash)), hashes)
        with registry.run("register", config, tags), tempfile.TemporaryDirectory() as scratch:
            content = files[number]
            if content is None:
                registered = register_lost(registry, CODEBOOK_MODEL, tags).number
            else:
                folder = Path(scratch) / "codebook"
                folder.mkdir()
                for name, data in content.items():
                    (folder / name).write_bytes(data)
                registered = register_codebook(registry, folder, tags).number
        if registered != number:
            registry.client.delete_model_version(registry.codebooks.name, str(registered))
            raise RegistryMismatch(
                f"the registry gave number {registered} to codebook version {number}; expected {number}. Versions that "
                "were deleted keep their numbers: give this warehouse an empty registry (mlflow.catalogue=NAME on a "
                "server) and run `sid register` again"
            )
        report(
            f"version {number}: registered from {FOLDER}/{codebook_hash}"
            if content is not None
            else f"version {number}: its codebook is gone from the warehouse; an empty version tagged {LOST_TAG} takes "
            "its number"
        )
    champion, candidate, changed = _set_aliases(registry, release, report)
    return RegisterResult(
        registered=tuple(number for number in numbers if files[number] is not None),
        lost=tuple(number for number in numbers if files[number] is None),
        champion_version=champion,
        candidate_version=candidate,
        nothing_to_do=not numbers and not changed,
    )


def _known_versions(root: str) -> tuple[dict[int, str], dict[tuple[int, str], Mapping[str, str]]]:
    """The hash of every codebook version that the warehouse knows, and the tags it was registered with.

    Where they differ, the hash in rows counts before that of a release, and that before the one stored with a codebook.
    """
    folders, tags_of_versions = stored_hashes(root), stored_tags(root)
    known = {
        **{number: tags["codebook_hash"] for number, tags in tags_of_versions},
        **{release.codebook_version: release.codebook_hash for release in reversed(releases(root))},
        **{number: min(hashes) for number, hashes in hashes_by_codebook_version(root).items()},
    }
    # The hashes of rows are truncated.
    full = {number: next((h for h in folders if h.startswith(prefix)), prefix) for number, prefix in known.items()}
    return full, {(number, tags["codebook_hash"]): tags for number, tags in tags_of_versions}


def _verified_files(root: str, codebook_hash: str) -> Files | None:
    """The verified files of a codebook; None if the warehouse does not have them."""
    files = read_codebook(root, codebook_hash) if codebook_hash else None
    if files is not None:
        load_files(files, codebook_hash)
    return files


def _check_release(release: Release | None, usable: set[int]) -> None:
    if release is not None and release.codebook_version not in usable:
        raise RegistryMismatch(
            f"release {release.release_id} is of codebook version {release.codebook_version}, and "
            f"{FOLDER}/{release.codebook_hash} is not in the warehouse, or the registry deleted that version; expected "
            "the folder, and an empty registry. Restore the folder from a backup, or set mlflow.catalogue=NAME on a "
            "server; nothing was registered"
        )


def _tags(
    codebook_hash: str, files: Files | None, known: Mapping[str, str] | None, hashes: Mapping[int, str]
) -> dict[str, str]:
    """The tags that the version was registered with; those of its manifest if they were not stored."""
    if files is None:
        return {"codebook_hash": codebook_hash}
    if known is not None:
        return dict(known)
    return tags_of_manifest(files[MANIFEST], codebook_hash, hashes)


def _set_aliases(
    registry: Registry, release: Release | None, report: Callable[[str], None]
) -> tuple[int | None, int | None, bool]:
    """Set the champion to the release's codebook, and a missing candidate to the newest version.

    Returns champion, candidate, and whether an alias changed.
    """
    present = {alias: registry.codebooks.alias(alias) for alias in (CHAMPION, CANDIDATE)}
    wanted = {
        CHAMPION: release.codebook_version if release else present[CHAMPION],
        CANDIDATE: present[CANDIDATE] or max(registry.codebooks.versions(), default=None),
    }
    for alias, number in wanted.items():
        if number is not None and number != present[alias]:
            registry.codebooks.set_alias(alias, number)
            report(f"alias {alias} set to version {number}")
    return wanted[CHAMPION], wanted[CANDIDATE], wanted != present
