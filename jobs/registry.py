"""The MLflow side of a run: where it is tracked, which model versions exist, which one an alias names.

An alias is resolved once per command, to a version; everything after that names the version.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from configparser import ConfigParser
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.config import Config
from jobs.identity import OURS
from jobs.mlflow_store import open_store
from jobs.redaction import redact_config

if TYPE_CHECKING:
    from mlflow import MlflowClient

CODEBOOK_MODEL = "semantic-id-codebook"
CTR_MODEL = "dmqn-ctr"
PACKAGES = Path(__file__).parent.parent
CARRIED = {CODEBOOK_MODEL: "tokenizer", CTR_MODEL: "jobs/ctr/dmqn.py"}  # our code that a model travels with
CANDIDATE, CHAMPION = "candidate", "champion"
ROLLED_BACK_TAG = "rolled_back"  # on a codebook version that a rollback left: from which release


@dataclass(frozen=True)
class ModelVersion:
    """One registered version and the facts it was registered with."""

    name: str
    version: int
    run_id: str
    tags: Mapping[str, str]


@dataclass(frozen=True)
class Registry:
    """MLflow at one tracking URI."""

    client: MlflowClient
    experiment_id: str
    tracking_uri: str

    def resolve(self, name: str, alias: str) -> ModelVersion | None:
        """The version that `alias` names now, or None."""
        from mlflow.exceptions import MlflowException

        try:
            found = self.client.get_model_version_by_alias(name, alias)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise
        return _model_version(found)

    def version(self, name: str, number: int) -> ModelVersion | None:
        from mlflow.exceptions import MlflowException

        try:
            return _model_version(self.client.get_model_version(name, str(number)))
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def find(self, name: str, tag: str, value: str) -> ModelVersion | None:
        """The newest version registered with this tag: 'has this work been done already?'"""
        found = [_model_version(v) for v in self.client.search_model_versions(f"name = '{name}'")]
        return max((v for v in found if v.tags.get(tag) == value), key=lambda v: v.version, default=None)

    def set_alias(self, name: str, alias: str, version: int) -> None:
        self.client.set_registered_model_alias(name, alias, str(version))

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
    return Registry(store.client, store.experiment_id, store.uri)


def register(registry: Registry, name: str, code: Path, artefacts: Path, tags: Mapping[str, str]) -> ModelVersion:
    """Log `artefacts` with the pyfunc in the file `code` (models from code, no pickle) and register a version with `tags`.

    Call inside `Registry.run`. The tags go in with the version, so that a version is never seen without them.
    """
    import mlflow

    info = mlflow.pyfunc.log_model(
        name=name,
        python_model=str(code),
        artifacts={"artefact": str(artefacts)},
        code_paths=[str(PACKAGES / CARRIED[name])],
        pip_requirements=requirements(),
    )
    client = registry.client
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    created = client.create_model_version(
        name, info.model_uri, run_id=info.run_id, model_id=info.model_id, tags=dict(tags)
    )
    return _model_version(created)


def requirements() -> list[str]:
    """What loading a model needs beside the code that it carries, at the installed versions. Our own distribution is not
    on the package index, where anybody could register its name."""
    return [
        f"{name}=={version(name).partition('+')[0]}" for name in ("mlflow", "numpy", "pandas", "safetensors", "torch")
    ]


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
    about.read(here.parent.parent / "setup.cfg")
    return git("rev-parse", "HEAD") if about.get("metadata", "name", fallback="") == OURS else ""
