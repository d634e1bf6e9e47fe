"""Which codebook is current: the one of the newest row of `releases`, after a look whether the registry, the warehouse's own
copy of the codebook and the rows of `semantic_ids` agree with it.

The alias `champion` and the mark of a codebook that was rolled back follow from the releases; where they differ they are
put back, and said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jobs.models.registry import (
    CHAMPION,
    CODEBOOK_MODEL,
    CTR_MODEL,
    ROLLED_BACK_TAG,
    WAREHOUSE_TAG,
    ModelVersion,
    Registry,
    RegistryMismatch,
    known_warehouse_id,
    warehouse_id,
)
from jobs.warehouse.delta_rs import HASH_DIGITS, hashes_by_codebook_version
from jobs.warehouse.releases import Release, current_release, releases, rolled_back

Tell = Callable[[str], None]
OTHER_REGISTRY = (
    "This is another registry than the one these IDs were made with, or one that was begun anew. Point mlflow.tracking_uri at the right "
    "one; if that is lost, give this warehouse an empty one (mlflow.catalogue=NAME on a server, mlflow.db moved away for the default "
    "store) and run `sid register`"
)


def current_champion(registry: Registry, tell: Tell, *, whole: bool = True) -> ModelVersion | None:
    """The codebook of the current release; None before the first. Call at the start of a command, with the writer lock held.

    `whole` also verifies the codebook's files. Where a first promotion was killed before its release was written, the alias counts.

    Raises:
        RegistryMismatch: registry, release and rows differ, or the registry has versions of another warehouse.
        CodebookError: the files are damaged.
    """
    warehouse_id(registry.root)
    model = agreed_champion(registry)
    if model is None:
        return None
    if whole:
        from jobs.models.codebooks import codebook_files

        codebook_files(registry, model)
    alias = registry.resolve(CODEBOOK_MODEL, CHAMPION)
    if alias is None or alias.version != model.version:
        registry.set_alias(CODEBOOK_MODEL, CHAMPION, model.version)
        was = f"named version {alias.version}" if alias else "was missing"
        tell(f"alias {CHAMPION} {was}; put back to version {model.version}, which the current release is of")
    restore_marks(registry, tell)
    return model


def agreed_champion(registry: Registry) -> ModelVersion | None:
    """The codebook of the current release, if registry and rows agree with it. Changes nothing.

    Raises:
        RegistryMismatch: they do not, or the registry has versions of another warehouse.
    """
    versions = own_versions(registry)
    release = current_release(registry.root)
    if release is None:
        rows = hashes_by_codebook_version(registry.root)
        if rows and not versions:
            raise RegistryMismatch(
                f"semantic_ids has IDs of codebook versions {sorted(rows)}, the MLflow registry has no codebook of this warehouse; expected "
                "those versions. Point mlflow.tracking_uri at the registry that has them, or run `sid register`, which registers them anew"
            )
        model = registry.resolve(CODEBOOK_MODEL, CHAMPION)
    else:
        model = _registered(versions, release)
    if model is not None:
        check_rows(registry.root, model)
    return model


def own_versions(registry: Registry) -> dict[int, ModelVersion]:
    """Every version of the codebook by its number, after a look that the registered names are this warehouse's alone.

    Raises:
        RegistryMismatch: a shared registry has a version of another warehouse under one of them.
    """
    versions = registry.versions(CODEBOOK_MODEL)
    if not registry.shared:
        return versions
    own = known_warehouse_id(registry.root)
    known: set[str] | None = None
    for model in (*versions.values(), *registry.versions(CTR_MODEL).values()):
        owner = model.tags.get(WAREHOUSE_TAG)
        if owner is None:  # registered before versions had the tag
            known = _known_hashes(registry.root) if known is None else known
            if model.tags.get("codebook_hash", "")[:HASH_DIGITS] in known:
                continue
        elif owner == own:
            continue
        setting = f"mlflow.catalogue is {registry.catalogue!r}" if registry.catalogue else "mlflow.catalogue is not set"
        raise RegistryMismatch(
            f"{model.name} version {model.version} in the MLflow registry belongs to warehouse {owner or 'unknown (it has no tag)'}, this "
            f"warehouse is {own or 'new'}; expected versions of one warehouse under a name ({setting}). Give this catalogue names of its own: "
            f"--set mlflow.catalogue=NAME"
            + ("" if owner else f". If the version is this warehouse's own, set its tag {WAREHOUSE_TAG}={own}")
        )
    return versions


def check_rows(root: str, model: ModelVersion) -> None:
    """The IDs of a version carry the hash of its codebook.

    Raises:
        RegistryMismatch: some carry another.
    """
    codebook_hash = model.tags["codebook_hash"]
    others = hashes_by_codebook_version(root).get(model.version, set()) - {codebook_hash[:HASH_DIGITS]}
    if others:
        raise RegistryMismatch(
            f"semantic_ids of codebook version {model.version} carry hash {', '.join(sorted(h[:12] for h in others))}, the registry's "
            f"version {model.version} is {codebook_hash[:12]}; expected the same. {OTHER_REGISTRY}. If a release was written over these "
            "rows all the same, `sid rollback --to RELEASE` goes back to one before it"
        )


def restore_marks(registry: Registry, tell: Tell) -> None:
    """The tag of codebooks that were rolled back, from the releases: a command killed between the two may leave one too many or few."""
    left = rolled_back(releases(registry.root))
    for model in registry.versions(CODEBOOK_MODEL).values():
        wanted = left.get(model.version)
        if (wanted is None) != (ROLLED_BACK_TAG not in model.tags):
            registry.set_tag(model, ROLLED_BACK_TAG, wanted)
            tell(
                f"codebook version {model.version} {'is not' if wanted is None else 'is'} rolled back by the releases; its tag says so again"
            )


def _registered(versions: Mapping[int, ModelVersion], release: Release) -> ModelVersion:
    model = versions.get(release.codebook_version)
    named = f"release {release.release_id} is of codebook version {release.codebook_version} with hash {release.codebook_hash[:12]}"
    if model is None:
        raise RegistryMismatch(
            f"{named}, the MLflow registry has {f'versions {sorted(versions)}' if versions else 'no codebook of this warehouse'}; expected "
            "that version. Point mlflow.tracking_uri at the registry that has it; if that is lost, `sid register` registers this "
            "warehouse's codebooks anew"
        )
    if model.tags.get("codebook_hash") != release.codebook_hash:
        raise RegistryMismatch(
            f"{named}, the registry's version {model.version} has hash {model.tags.get('codebook_hash', '')[:12] or 'none'}; expected the same. "
            f"{OTHER_REGISTRY}"
        )
    return model


def _known_hashes(root: str) -> set[str]:
    released = {release.codebook_hash[:HASH_DIGITS] for release in releases(root)}
    return released.union(*hashes_by_codebook_version(root).values())
