"""The champion: the codebook of the newest row of `releases`.

Registry, files of the codebook and rows of `semantic_ids` are checked against that release. The alias `champion`
follows the release and is restored if it differs.
"""

from __future__ import annotations

from collections.abc import Mapping

from jobs.models.codebooks import codebook_files
from jobs.models.registry import CHAMPION, Registry, known_warehouse_id
from jobs.models.versions import WAREHOUSE_TAG, CodebookVersion, RegisteredVersion, RegistryMismatch
from jobs.warehouse.delta_rs import HASH_DIGITS, hashes_by_codebook_version
from jobs.warehouse.releases import Release, current_release, releases

OTHER_REGISTRY = (
    "This registry is not the one that these IDs were made with, or a new one was started. Point mlflow.tracking_uri "
    "at the right one; if that is lost, give this warehouse an empty one (mlflow.catalogue=NAME on a server, mlflow.db "
    "moved away for the default store) and run `sid register`"
)


def current_champion(registry: Registry) -> CodebookVersion | None:
    """The codebook of the current release, checked against registry and rows; None if there is none. Changes nothing.

    Without a release the alias `champion` counts, as a first promotion may have been killed before it wrote its
    release.

    Raises:
        RegistryMismatch: registry, release and rows differ, or the registry has versions of another warehouse.
    """
    versions = own_versions(registry)
    release = current_release(registry.root)
    if release is not None:
        codebook = _released(versions, release)
    else:
        rows = hashes_by_codebook_version(registry.root)
        if rows and not versions:
            raise RegistryMismatch(
                f"semantic_ids has IDs of codebook versions {sorted(rows)}, the MLflow registry has no codebook of "
                "this warehouse; expected those versions. Point mlflow.tracking_uri at the registry that has them, or "
                "run `sid register`, which registers them again"
            )
        alias = registry.codebooks.with_alias(CHAMPION)
        if alias is None:
            return None
        codebook = alias
    check_hashes(registry.root, codebook)
    return codebook


def restore_champion(registry: Registry, *, verify_files: bool = True) -> tuple[CodebookVersion | None, str]:
    """Restore the alias `champion` if it differs from the current release.

    Returns the champion, and a message if its alias was restored (else an empty one). Call at the start of a command
    that writes, with the writer lock held. `verify_files` also checks the files of the codebook.

    Raises:
        RegistryMismatch: see `current_champion`.
        CodebookError: the files are damaged.
    """
    codebook = current_champion(registry)
    if codebook is None:
        return None, ""
    if verify_files:
        codebook_files(registry, codebook)
    alias = registry.codebooks.alias(CHAMPION)
    if alias == codebook.number:
        return codebook, ""
    registry.codebooks.set_alias(CHAMPION, codebook.number)
    was = "was missing" if alias is None else f"named version {alias}"
    return codebook, f"alias {CHAMPION} {was}; put back to version {codebook.number}, which the current release is of"


def own_versions(registry: Registry) -> dict[int, RegisteredVersion]:
    """Every codebook version by number, after a check that all versions in a shared registry are of this warehouse.

    Raises:
        RegistryMismatch: a version of another warehouse has the same registered name.
    """
    versions = registry.codebooks.registered()
    if not registry.shared:
        return versions
    own = known_warehouse_id(registry.root)
    hashes: set[str] | None = None
    for version in (*versions.values(), *registry.ctr_models.registered().values()):
        if version.warehouse is None:  # registered before versions had the tag: compare hashes with the tables
            hashes = _known_hashes(registry.root) if hashes is None else hashes
            if version.codebook_hash[:HASH_DIGITS] in hashes:
                continue
        elif version.warehouse == own:
            continue
        setting = f"mlflow.catalogue is {registry.catalogue!r}" if registry.catalogue else "mlflow.catalogue is not set"
        raise RegistryMismatch(
            f"{version.name} version {version.number} in the MLflow registry belongs to warehouse "
            f"{version.warehouse or 'unknown (it has no tag)'}, this warehouse is {own or 'new'}; expected versions of "
            f"one warehouse under a name ({setting}). Give this catalogue names of its own: --set mlflow.catalogue=NAME"
            + ("" if version.warehouse else f". If the version is of this warehouse, set its tag {WAREHOUSE_TAG}={own}")
        )
    return versions


def check_hashes(root: str, codebook: CodebookVersion) -> None:
    """Check that all IDs of a version have the hash of its codebook.

    Raises:
        RegistryMismatch: some have another.
    """
    others = hashes_by_codebook_version(root).get(codebook.number, set()) - {codebook.hash[:HASH_DIGITS]}
    if others:
        raise RegistryMismatch(
            f"semantic_ids of codebook version {codebook.number} carry hash "
            f"{', '.join(sorted(h[:12] for h in others))}, the registry's version {codebook.number} is "
            f"{codebook.hash[:12]}; expected the same. {OTHER_REGISTRY}. If a release was written over "
            "these rows all the same, `sid rollback --to RELEASE` goes back to one before it"
        )


def _released(versions: Mapping[int, RegisteredVersion], release: Release) -> CodebookVersion:
    """The registered version of a release.

    Raises:
        RegistryMismatch: the registry lacks it, or has another codebook under its number.
    """
    version = versions.get(release.codebook_version)
    number, short_hash = release.codebook_version, release.codebook_hash[:12]
    released = f"release {release.release_id} is of codebook version {number} with hash {short_hash}"
    if version is None:
        raise RegistryMismatch(
            f"{released}, the MLflow registry has "
            f"{f'versions {sorted(versions)}' if versions else 'no codebook of this warehouse'}; expected that "
            "version. Point mlflow.tracking_uri at the registry that has it; if that is lost, `sid register` "
            "registers this warehouse's codebooks again"
        )
    if version.codebook_hash != release.codebook_hash:
        raise RegistryMismatch(
            f"{released}, the registry's version {version.number} has hash {version.codebook_hash[:12] or 'none'}; "
            f"expected the same. {OTHER_REGISTRY}"
        )
    return CodebookVersion.of(version)


def _known_hashes(root: str) -> set[str]:
    """The codebook hashes in releases and rows of a warehouse, cut to HASH_DIGITS digits."""
    released = {release.codebook_hash[:HASH_DIGITS] for release in releases(root)}
    return released.union(*hashes_by_codebook_version(root).values())
