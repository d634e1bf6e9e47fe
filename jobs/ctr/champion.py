"""The CTR model that serves beside the current codebook: of those trained on it the last one that passed the gate.

It follows from the releases and the verdicts, so a rollback of the codebook moves it too. The alias `champion` of the
registered CTR model shows it, and is absent where the current codebook has no model yet.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

from jobs.ctr.artefact import CtrModel, model_of, read_files
from jobs.models.registry import CHAMPION, Registry
from jobs.models.versions import CtrVersion

ARTEFACT = "artifacts/dmqn"  # where MLflow keeps the folder that `register` logged


def ctr_champion(registry: Registry, codebook_hash: str) -> CtrVersion | None:
    """The CTR model to use with the IDs of this codebook; None where none has passed the gate."""
    return _last_to_pass(version for version in _versions(registry) if version.codebook_hash == codebook_hash)


def last_champion(registry: Registry, codebook_hash: str) -> CtrVersion | None:
    """What a candidate is compared with: the champion of its codebook, else the last one of another codebook."""
    return ctr_champion(registry, codebook_hash) or _last_to_pass(_versions(registry))


def _versions(registry: Registry) -> Iterable[CtrVersion]:
    return registry.ctr_models.versions().values()


def _last_to_pass(versions: Iterable[CtrVersion]) -> CtrVersion | None:
    passed = [version for version in versions if version.passed]
    return max(passed, key=lambda version: (version.judged_at, version.number), default=None)


def restore_ctr_champion(registry: Registry, codebook_hash: str) -> CtrVersion | None:
    """Set the alias to `ctr_champion`, or remove it where there is none. Call with the writer lock held."""
    champion, alias = ctr_champion(registry, codebook_hash), registry.ctr_models.alias(CHAMPION)
    if champion is None and alias is not None:
        registry.ctr_models.delete_alias(CHAMPION)
    elif champion is not None and alias != champion.number:
        registry.ctr_models.set_alias(CHAMPION, champion.number)
    return champion


def load_ctr(registry: Registry, version: CtrVersion) -> CtrModel:
    """The model of a version, checked against its hash and the codebook that the registry says.

    Raises:
        ArtefactError: it is damaged, of another format, or of another codebook.
    """
    return model_of(*ctr_files(registry, version), version.codebook_hash)


def ctr_files(registry: Registry, version: CtrVersion) -> tuple[bytes, bytes]:
    """Manifest and tensors of a version.

    Raises:
        ArtefactError: one is missing.
    """
    with tempfile.TemporaryDirectory() as scratch:
        return read_files(registry.download(version, Path(scratch)) / ARTEFACT)
