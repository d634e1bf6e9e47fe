"""The MLflow registry of a warehouse: two registered models with versions and aliases, and the runs of the stages."""

from __future__ import annotations

import json
import subprocess
import uuid
from collections.abc import Callable, Iterator, Mapping
from configparser import ConfigParser
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from jobs.config import Config
from jobs.errors import WarehouseError
from jobs.files.filesystem import filesystem_of, read_file, write_file
from jobs.identity import DISTRIBUTION
from jobs.models.mlflow_store import open_store
from jobs.models.versions import LOST_TAG, WAREHOUSE_TAG, CodebookVersion, CtrVersion, RegisteredVersion
from jobs.redaction import redact_config

if TYPE_CHECKING:
    from mlflow import ActiveRun, MlflowClient

CODEBOOK_MODEL = "semantic-id-codebook"
CTR_MODEL = "dmqn-ctr"
CODE_ROOT = Path(__file__).parents[2]
CARRIED = {CODEBOOK_MODEL: ("tokenizer",), CTR_MODEL: ("jobs", "tokenizer")}  # our code that is logged with a model
CANDIDATE, CHAMPION = "candidate", "champion"
IDENTITY = "warehouse.json"

Version = TypeVar("Version")


@dataclass(frozen=True)
class RegisteredModel(Generic[Version]):
    """A registered model and its versions. Commands resolve an alias once and then use the version."""

    client: MlflowClient
    name: str
    of: Callable[[RegisteredVersion], Version]  # makes the typed version

    def registered(self) -> dict[int, RegisteredVersion]:
        """Every version by number, including those that only reserve their number."""
        versions = map(_registered, self.client.search_model_versions(f"name = '{self.name}'"))
        return {version.number: version for version in sorted(versions, key=lambda version: version.number)}

    def versions(self) -> dict[int, Version]:
        """Every version by number, except those whose files are gone."""
        return {number: self.of(version) for number, version in self.registered().items() if not version.lost}

    def version(self, number: int) -> Version | None:
        """The version with this number, or None."""
        from mlflow.exceptions import MlflowException

        try:
            return self.of(_registered(self.client.get_model_version(self.name, str(number))))
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def newest(self, where: Callable[[Version], bool]) -> Version | None:
        """The newest version that satisfies `where`, or None."""
        return next((version for version in reversed(list(self.versions().values())) if where(version)), None)

    def set_tags(self, number: int, tags: Mapping[str, str]) -> None:
        """Set tags of a version one after the other, in this order."""
        for name, value in tags.items():
            self.client.set_model_version_tag(self.name, str(number), name, value)

    def alias(self, alias: str) -> int | None:
        """Number of the version that `alias` names, or None."""
        from mlflow.exceptions import MlflowException

        try:
            return int(self.client.get_model_version_by_alias(self.name, alias).version)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def with_alias(self, alias: str) -> Version | None:
        """The version that `alias` names, or None."""
        number = self.alias(alias)
        return None if number is None else self.version(number)

    def set_alias(self, alias: str, number: int) -> None:
        self.client.set_registered_model_alias(self.name, alias, str(number))

    def delete_alias(self, alias: str) -> None:
        self.client.delete_registered_model_alias(self.name, alias)


@dataclass(frozen=True)
class Registry:
    """MLflow at one tracking URI, as the warehouse at `root` uses it."""

    client: MlflowClient
    experiment_id: str
    tracking_uri: str
    root: str
    shared: bool  # other warehouses may use the store too; false for the default store beside the tables
    catalogue: str = ""  # suffix of the registered names on a shared store

    @property
    def codebooks(self) -> RegisteredModel[CodebookVersion]:
        return RegisteredModel(self.client, self.name(CODEBOOK_MODEL), CodebookVersion.of)

    @property
    def ctr_models(self) -> RegisteredModel[CtrVersion]:
        return RegisteredModel(self.client, self.name(CTR_MODEL), CtrVersion.of)

    def name(self, model: str) -> str:
        """The registered name of CODEBOOK_MODEL or CTR_MODEL."""
        return f"{model}-{self.catalogue}" if self.shared and self.catalogue else model

    def download(self, model: CodebookVersion | CtrVersion, folder: Path) -> Path:
        """Download the artefacts of a version; returns their folder."""
        import mlflow

        return Path(
            mlflow.artifacts.download_artifacts(
                artifact_uri=f"models:/{model.name}/{model.number}",
                dst_path=str(folder),
                tracking_uri=self.tracking_uri,
            )
        )

    @contextmanager
    def run(self, stage: str, config: Config, tags: Mapping[str, str]) -> Iterator[ActiveRun]:
        """Open an MLflow run with the stage, the resolved configuration and the git commit."""
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


def register(registry: Registry, model: str, code: Path, artefacts: Path, tags: Mapping[str, str]) -> RegisteredVersion:
    """Log `artefacts` with the pyfunc in the file `code` (models from code, no pickle) and register a version.

    Call inside `Registry.run`. One request creates the version with its tags and that of the warehouse.
    """
    import mlflow

    name = registry.name(model)
    info = mlflow.pyfunc.log_model(
        name=name,
        python_model=str(code),
        artifacts={"artefact": str(artefacts)},
        code_paths=[str(CODE_ROOT / package) for package in CARRIED[model]],
        pip_requirements=requirements(),
    )
    return _create(registry, name, info.model_uri, info.run_id, info.model_id, tags)


def register_lost(registry: Registry, model: str, tags: Mapping[str, str]) -> RegisteredVersion:
    """Register a version that only reserves its number. Call inside `Registry.run`."""
    import mlflow

    run = mlflow.active_run()
    assert run is not None
    source, lost = f"{run.info.artifact_uri}/lost", {LOST_TAG: "its files are gone"}
    return _create(registry, registry.name(model), source, run.info.run_id, None, {**tags, **lost})


def _create(
    registry: Registry, name: str, source: str, run_id: str, model_id: str | None, tags: Mapping[str, str]
) -> RegisteredVersion:
    client, own = registry.client, {WAREHOUSE_TAG: warehouse_id(registry.root)}
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    created = client.create_model_version(name, source, run_id=run_id, model_id=model_id, tags={**tags, **own})
    return _registered(created)


def requirements() -> list[str]:
    """The packages that loading a model needs besides the code logged with it, at the installed versions.

    Our own distribution is not among them: it is not on the package index, where anybody could register its name.
    """
    return [
        f"{name}=={installed_version(name).partition('+')[0]}"
        for name in ("mlflow", "numpy", "pandas", "safetensors", "torch")
    ]


def warehouse_id(root: str) -> str:
    """The id of the warehouse at `root`; a new one is written if it has none. Call with the writer lock held."""
    known = known_warehouse_id(root)
    if known is None:
        known = uuid.uuid4().hex
        filesystem, folder = filesystem_of(root)
        write_file(filesystem, f"{folder}/{IDENTITY}", json.dumps({"id": known, "format": 1}).encode() + b"\n")
    return known


def known_warehouse_id(root: str) -> str | None:
    """The id of the warehouse at `root`; None before the first command that writes.

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
            f"{IDENTITY} of the warehouse is damaged ({type(error).__name__}: {error}); expected its id. Restore it: "
            f"the id is the tag {WAREHOUSE_TAG} of the models that this warehouse registered"
        ) from error


def _registered(version: Any) -> RegisteredVersion:
    return RegisteredVersion(version.name, int(version.version), version.run_id or "", dict(version.tags))


def _git_commit() -> str:
    """The commit of the running code; empty if it does not run from a checkout of this project."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(
                ["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, check=False
            )
        except OSError:  # no git on this machine
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    # An installed package may be inside another repository, for example in the environment of a project folder.
    if not git("ls-files", "--error-unmatch", here.name):
        return ""
    about = ConfigParser()
    about.read(here.parents[2] / "setup.cfg")
    return git("rev-parse", "HEAD") if about.get("metadata", "name", fallback="") == DISTRIBUTION else ""
