"""The MLflow side of a run: where it is tracked, which model versions exist, which one an alias names.

An alias is resolved once per command, to a version; everything after that names the version.
"""

from __future__ import annotations

import json
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from configparser import ConfigParser
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.config import Config
from jobs.errors import WarehouseError
from jobs.files.sources import filesystem_of, read_file, write_file
from jobs.identity import OURS
from jobs.models.mlflow_store import open_store
from jobs.redaction import redact_config

if TYPE_CHECKING:
    from mlflow import MlflowClient

CODEBOOK_MODEL = "semantic-id-codebook"
CTR_MODEL = "dmqn-ctr"
PACKAGES = Path(__file__).parents[2]
CARRIED = {CODEBOOK_MODEL: "tokenizer", CTR_MODEL: "jobs/ctr/padded_dmqn.py"}  # our code that a model travels with
CANDIDATE, CHAMPION = "candidate", "champion"
ROLLED_BACK_TAG = "rolled_back"  # on a codebook version that a rollback left: from which release
WAREHOUSE_TAG = "warehouse_id"  # on every version: the warehouse that registered it
LOST_TAG = "lost"  # on a version that only keeps its number: what it was made of is gone
IDENTITY = "warehouse.json"


class RegistryMismatch(RuntimeError):
    """The registry, the releases, the codebooks and the rows of a warehouse do not speak of the same codebook."""


@dataclass(frozen=True)
class ModelVersion:
    """One registered version and the facts it was registered with."""

    name: str
    version: int
    run_id: str
    tags: Mapping[str, str]


@dataclass(frozen=True)
class Registry:
    """MLflow at one tracking URI, as the warehouse at `root` uses it."""

    client: MlflowClient
    experiment_id: str
    tracking_uri: str
    root: str
    shared: bool  # a store that other warehouses may use too, unlike the default one beside the tables
    catalogue: str = ""  # what sets the registered names of this warehouse apart on a shared store

    def name(self, model: str) -> str:
        """The registered name of CODEBOOK_MODEL or CTR_MODEL."""
        return f"{model}-{self.catalogue}" if self.shared and self.catalogue else model

    def resolve(self, name: str, alias: str) -> ModelVersion | None:
        """The version that `alias` names now, or None."""
        from mlflow.exceptions import MlflowException

        try:
            found = self.client.get_model_version_by_alias(self.name(name), alias)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise
        return _model_version(found)

    def version(self, name: str, number: int) -> ModelVersion | None:
        from mlflow.exceptions import MlflowException

        try:
            return _model_version(self.client.get_model_version(self.name(name), str(number)))
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def find(self, name: str, tag: str, value: str) -> ModelVersion | None:
        """The newest version registered with this tag: 'has this work been done already?'"""
        found = [model for model in self.versions(name).values() if model.tags.get(tag) == value]
        return max(found, key=lambda model: model.version, default=None)

    def versions(self, name: str) -> dict[int, ModelVersion]:
        """Every version by its number."""
        found = self.client.search_model_versions(f"name = '{self.name(name)}'")
        return {model.version: model for model in sorted(map(_model_version, found), key=lambda model: model.version)}

    def set_alias(self, name: str, alias: str, version: int) -> None:
        self.client.set_registered_model_alias(self.name(name), alias, str(version))

    def set_tag(self, model: ModelVersion, tag: str, value: str | None) -> None:
        """On a registered version; None removes it."""
        if value is not None:
            self.client.set_model_version_tag(model.name, str(model.version), tag, value)
        elif tag in model.tags:
            self.client.delete_model_version_tag(model.name, str(model.version), tag)

    def download(self, model: ModelVersion, folder: Path) -> Path:
        """The artefacts of a version as a local folder."""
        import mlflow

        return Path(
            mlflow.artifacts.download_artifacts(
                artifact_uri=f"models:/{model.name}/{model.version}",
                dst_path=str(folder),
                tracking_uri=self.tracking_uri,
            )
        )

    @contextmanager
    def run(self, stage: str, config: Config, tags: Mapping[str, str]) -> Iterator[Any]:
        """An MLflow run that carries the stage, the resolved configuration and the git commit."""
        import mlflow

        commit = _git_commit()
        with mlflow.start_run(experiment_id=self.experiment_id, run_name=stage) as run:
            mlflow.set_tags({"stage": stage, **({"git_commit": commit} if commit else {}), **tags})
            mlflow.log_dict(redact_config(config.model_dump(mode="json")), "config.json")
            yield run


def open_registry(config: Config, root: str, *, create: bool = True) -> Registry:
    """The models in the MLflow store of the warehouse at `root` (see `open_store`)."""
    store = open_store(config, root, create=create)
    return Registry(store.client, store.experiment_id, store.uri, root, store.shared, config.mlflow.catalogue)


def register(registry: Registry, name: str, code: Path, artefacts: Path, tags: Mapping[str, str]) -> ModelVersion:
    """Log `artefacts` with the pyfunc in the file `code` (models from code, no pickle) and register a version with `tags`.

    Call inside `Registry.run`. The tags, and that of the warehouse, go in with the version: it is never seen without them.
    """
    import mlflow

    carried, name = str(PACKAGES / CARRIED[name]), registry.name(name)
    info = mlflow.pyfunc.log_model(
        name=name,
        python_model=str(code),
        artifacts={"artefact": str(artefacts)},
        code_paths=[carried],
        pip_requirements=requirements(),
    )
    return _create(registry, name, info.model_uri, info.run_id, info.model_id, tags)


def register_lost(registry: Registry, name: str, tags: Mapping[str, str]) -> ModelVersion:
    """A version that has nothing but its number and `tags`. Call inside `Registry.run`."""
    import mlflow

    run = mlflow.active_run()
    source, lost = f"{run.info.artifact_uri}/lost", {LOST_TAG: "its files are gone"}
    return _create(registry, registry.name(name), source, run.info.run_id, None, {**tags, **lost})


def _create(
    registry: Registry, name: str, source: str, run_id: str, model_id: str | None, tags: Mapping[str, str]
) -> ModelVersion:
    client, own = registry.client, {WAREHOUSE_TAG: warehouse_id(registry.root)}
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    created = client.create_model_version(name, source, run_id=run_id, model_id=model_id, tags={**tags, **own})
    return _model_version(created)


def requirements() -> list[str]:
    """What loading a model needs beside the code that it carries, at the installed versions. Our own distribution is not
    on the package index, where anybody could register its name."""
    return [
        f"{name}=={version(name).partition('+')[0]}" for name in ("mlflow", "numpy", "pandas", "safetensors", "torch")
    ]


def warehouse_id(root: str) -> str:
    """The id of the warehouse at `root`, which is made where there is none. Call with the writer lock held."""
    known = known_warehouse_id(root)
    if known is None:
        known = uuid.uuid4().hex
        filesystem, folder = filesystem_of(root)
        write_file(filesystem, f"{folder}/{IDENTITY}", json.dumps({"id": known, "format": 1}).encode() + b"\n")
    return known


def known_warehouse_id(root: str) -> str | None:
    """The id of the warehouse at `root`; None before the first writing command.

    Raises:
        WarehouseError: warehouse.json is damaged.
    """
    filesystem, folder = filesystem_of(root)
    content = read_file(filesystem, f"{folder}/{IDENTITY}")
    if content is None:
        return None
    try:
        return str(json.loads(content)["id"])
    except (ValueError, KeyError, TypeError) as error:
        raise WarehouseError(
            f"{IDENTITY} of the warehouse is damaged ({type(error).__name__}: {error}); expected its id. Restore it: the id is the "
            f"tag {WAREHOUSE_TAG} of the models that this warehouse registered"
        ) from error


def pinned(versions: Mapping[str, int]) -> str:
    """Table versions as a tag."""
    return json.dumps(dict(versions), sort_keys=True)


def _model_version(found: Any) -> ModelVersion:
    return ModelVersion(found.name, int(found.version), found.run_id or "", dict(found.tags))


def _git_commit() -> str:
    """The commit that the code runs from; empty where it runs from no checkout of this project."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(
                ["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, check=False
            )
        except OSError:  # no git on this machine
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    # An installed package may lie inside someone else's repository, as an environment in a project folder does.
    if not git("ls-files", "--error-unmatch", here.name):
        return ""
    about = ConfigParser()
    about.read(here.parents[2] / "setup.cfg")
    return git("rev-parse", "HEAD") if about.get("metadata", "name", fallback="") == OURS else ""
