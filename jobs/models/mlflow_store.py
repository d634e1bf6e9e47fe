"""The MLflow store of a warehouse: which one it is, a check that it can be used, and care of the default one.

The store is `mlflow.tracking_uri`, else MLFLOW_TRACKING_URI, else `mlflow.db` (sqlite) in a local warehouse with its
artefacts beside it in `mlflow_artifacts`. An unusable store is an error of one sentence, before any work.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from jobs.config import Config, ConfigError
from jobs.errors import WarehouseError
from jobs.models.sqlite_store import ARTEFACTS, artefact_location, check_sqlite, relocate, sqlite_file, sqlite_uri
from jobs.models.store_answers import DATABASE_PORTS, EXPECTED, check_answers, masked_first_line
from jobs.redaction import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient

DATABASE = "mlflow.db"


@dataclass(frozen=True)
class Store:
    """An open store."""

    client: MlflowClient
    experiment_id: str  # empty if it does not exist and was not to be created
    uri: str
    shared: bool  # not the default store of this warehouse, so others may use it too


def open_store(config: Config, root: str, *, create: bool) -> Store:
    """Open the store of the warehouse at `root`.

    With `create`, which needs the writer lock, the store and the experiment are created if they do not exist. Without
    it nothing is written, and a store that does not exist is an empty one.

    Raises:
        ConfigError: the tracking URI is not that of a store.
        WarehouseError: the store does not answer, or is locked, damaged or of another version.
    """
    # Three attempts within 15 seconds: with MLflow's defaults a call to a server that is down takes four minutes.
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    }.items():
        os.environ.setdefault(name, value)
    given = os.environ.get("MLFLOW_TRACKING_URI")
    uri = config.mlflow.tracking_uri or given or default_uri(root)
    database = sqlite_file(uri)
    own = database is not None and database == Path(root) / DATABASE
    if own:
        os.environ.pop("MLFLOW_REGISTRY_URI", None)  # the default store has the models as well
    artefacts = artefact_location(Path(root) / ARTEFACTS) if own else None
    if database is None:
        check_answers(uri)
    elif not create and not database.exists():
        return Store(_AbsentStore(), "", uri, shared=not own)  # type: ignore[arg-type]
    logging.getLogger("alembic").setLevel(logging.WARNING)
    import mlflow
    from mlflow.exceptions import MlflowException

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it also raises what it logs
    if database is not None:
        check_sqlite(database, uri, artefacts, create=create)
        if artefacts and create:
            relocate(database, artefacts)
    mlflow.set_tracking_uri(uri)
    if given is None:  # MLflow has set it; for the next warehouse of this process it would look like the user's
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    try:
        client = mlflow.MlflowClient(tracking_uri=uri)
        return Store(client, _experiment(client, config.mlflow.experiment, artefacts, create), uri, shared=not own)
    except MlflowException as error:
        known = urlsplit(uri).scheme.partition("+")[0] in ("http", "https", "sqlite", "databricks", *DATABASE_PORTS)
        kind = WarehouseError if known else ConfigError
        raise kind(
            f"MLflow cannot use the tracking store {redact(uri)}: {masked_first_line(error)}; {EXPECTED}"
        ) from error


def default_uri(root: str) -> str:
    """The URI of the store in the warehouse at `root`.

    Raises:
        ConfigError: the warehouse is on an object store.
    """
    if "://" in root:
        raise ConfigError(
            f"warehouse {root} is not a local folder, so there is no place for the default tracking store; "
            "set mlflow.tracking_uri (or MLFLOW_TRACKING_URI) to your MLflow server"
        )
    return sqlite_uri(Path(root) / DATABASE)


def _experiment(client: MlflowClient, name: str, artefacts: str | None, create: bool) -> str:
    """The id of an experiment; with `create` it is created if it does not exist, else empty."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None and create:
        try:
            return str(client.create_experiment(name, artifact_location=artefacts))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)  # another process created it in between
    if experiment is None:
        return ""
    if create and experiment.lifecycle_stage != "active":
        raise WarehouseError(
            f"the MLflow experiment {name!r} was deleted; expected an active one. Restore it (mlflow experiments "
            f"restore --experiment-id {experiment.experiment_id}), or choose another with mlflow.experiment"
        )
    return str(experiment.experiment_id)


class _AbsentStore:
    """The client of a store that does not exist: every search is empty, everything else is not found."""

    def search_model_versions(self, *_: Any, **__: Any) -> list[Any]:
        return []

    search_registered_models = search_runs = search_experiments = search_model_versions

    def __getattr__(self, name: str) -> Any:
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

        def absent(*_: Any, **__: Any) -> Any:
            raise MlflowException(f"{name}: there is no tracking store yet", RESOURCE_DOES_NOT_EXIST)

        return absent
