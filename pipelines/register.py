"""register: the codebooks of a warehouse registered anew, under the numbers they had, in a registry that lost them.

Codebooks, releases and IDs stand in the warehouse, so nothing is fitted or encoded. MLflow's runs and the CTR models do not come back.
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
class Registration:
    registered: tuple[int, ...]  # codebook versions, from their files in the warehouse
    lost: tuple[int, ...]  # whose files are gone: the number is taken, so that later ones keep theirs
    champion_version: int | None
    candidate_version: int | None
    nothing_to_do: bool = False


def register(config: Config, registry: Registry, tell: Callable[[str], None]) -> Registration:
    """Register every version that the warehouse knows and the registry lacks, in order, and set the aliases.

    Call with the writer lock held. Again, or after a kill, it does what is left.

    Raises:
        RegistryMismatch: a number is taken by another codebook, or the codebook of the current release is gone.
        CodebookError: the files of a codebook are damaged; nothing was registered.
    """
    root, present = registry.root, own_versions(registry)
    hashes, noted = _known_versions(root)
    for number, codebook_hash in hashes.items():
        if number in present and present[number].codebook_hash[:HASH_DIGITS] != codebook_hash[:HASH_DIGITS]:
            raise RegistryMismatch(
                f"version {number} in the registry has hash {present[number].codebook_hash[:12] or 'none'}, the warehouse's "
                f"codebook version {number} has {codebook_hash[:12]}; expected the same. {OTHER_REGISTRY}"
            )
    # MLflow gives the next number, and never one again.
    numbers = range(max(present, default=0) + 1, max(hashes, default=0) + 1)
    release = current_release(root)
    files = {number: _usable(root, hashes.get(number, "")) for number in numbers}
    _check_release(release, {*present, *(number for number in numbers if files[number] is not None)})
    for number in sorted(set(hashes) - set(present) - set(numbers)):
        tell(f"version {number} was deleted in the registry, which never gives a number twice; it stays so")
    for number in numbers:
        codebook_hash = hashes.get(number, "")
        tags = _tags(codebook_hash, files[number], noted.get((number, codebook_hash)), hashes)
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
                f"the registry gave number {registered} to codebook version {number}; expected {number}. Versions that were deleted keep "
                "their numbers: give this warehouse an empty registry (mlflow.catalogue=NAME on a server) and run `sid register` again"
            )
        tell(
            f"version {number}: registered from {FOLDER}/{codebook_hash}"
            if content is not None
            else f"version {number}: its codebook is gone from the warehouse; its number is taken by an empty version tagged {LOST_TAG}"
        )
    champion, candidate, moved = _aliases(registry, release, tell)
    return Registration(
        registered=tuple(number for number in numbers if files[number] is not None),
        lost=tuple(number for number in numbers if files[number] is None),
        champion_version=champion,
        candidate_version=candidate,
        nothing_to_do=not numbers and not moved,
    )


def _known_versions(root: str) -> tuple[dict[int, str], dict[tuple[int, str], Mapping[str, str]]]:
    """The hash of every codebook version that the warehouse knows, and the tags it was registered with.

    What rows carry counts before what a release says, and that before what is written beside a codebook.
    """
    stored, noted = stored_hashes(root), stored_tags(root)
    known = {
        **{number: tags["codebook_hash"] for number, tags in noted},
        **{release.codebook_version: release.codebook_hash for release in reversed(releases(root))},
        **{number: min(found) for number, found in hashes_by_codebook_version(root).items()},
    }
    # Those of rows are cut short.
    full = {number: next((h for h in stored if h.startswith(found)), found) for number, found in known.items()}
    return full, {(number, tags["codebook_hash"]): tags for number, tags in noted}


def _usable(root: str, codebook_hash: str) -> Files | None:
    files = read_codebook(root, codebook_hash) if codebook_hash else None
    if files is not None:
        load_files(files, codebook_hash)
    return files


def _check_release(release: Release | None, usable: set[int]) -> None:
    if release is not None and release.codebook_version not in usable:
        raise RegistryMismatch(
            f"release {release.release_id} is of codebook version {release.codebook_version}, and {FOLDER}/{release.codebook_hash} is not in "
            "the warehouse, or the registry deleted that version; expected the folder, and an empty registry. Restore the folder from a "
            "backup, or set mlflow.catalogue=NAME on a server; nothing was registered"
        )


def _tags(
    codebook_hash: str, files: Files | None, noted: Mapping[str, str] | None, hashes: Mapping[int, str]
) -> dict[str, str]:
    """As it was registered; from its manifest where that was not written down."""
    if files is None:
        return {"codebook_hash": codebook_hash}
    if noted is not None:
        return dict(noted)
    return tags_of_manifest(files[MANIFEST], codebook_hash, hashes)


def _aliases(
    registry: Registry, release: Release | None, tell: Callable[[str], None]
) -> tuple[int | None, int | None, bool]:
    """Champion as the release says; candidate the newest version, where there is none."""
    now = {alias: registry.codebooks.alias(alias) for alias in (CHAMPION, CANDIDATE)}
    wanted = {
        CHAMPION: release.codebook_version if release else now[CHAMPION],
        CANDIDATE: now[CANDIDATE] or max(registry.codebooks.versions(), default=None),
    }
    for alias, number in wanted.items():
        if number is not None and number != now[alias]:
            registry.codebooks.set_alias(alias, number)
            tell(f"alias {alias} set to version {number}")
    return wanted[CHAMPION], wanted[CANDIDATE], wanted != now
