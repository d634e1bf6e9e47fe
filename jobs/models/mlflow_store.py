"""The MLflow store that runs and models are tracked in: which one, whether it can be used, and the default one's upkeep.

The store is `mlflow.tracking_uri`, else MLFLOW_TRACKING_URI, else `mlflow.db` (sqlite) in a local warehouse with its artefacts
beside it in `mlflow_artifacts`. What can be wrong with a store is found here, before any work, and is said in a sentence.
"""

from __future__ import annotations

import fcntl
import glob
import logging
import os
import re
import shutil
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

from jobs.config import Config, ConfigError
from jobs.errors import WarehouseError
from jobs.redaction import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient

DATABASE, ARTEFACTS = "mlflow.db", "mlflow_artifacts"
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
EXPECTED = "expected http(s)://server, sqlite:///file or the URL of a database that MLflow supports (see mlflow.tracking_uri and MLFLOW_TRACKING_URI)"
LOCK_SECONDS = 5  # how long a sqlite file may be locked by another process
SETTLE_SECONDS = 3  # a schema that nobody has added to for so long is not being made any more
# Columns in which MLflow keeps the absolute location of an artefact, in whatever table.
LOCATIONS = ("artifact_location", "artifact_uri", "source", "storage_location")


@dataclass(frozen=True)
class Store:
    """An open store. `shared` unless it is the default one of this warehouse."""

    client: MlflowClient
    experiment_id: str  # empty where there is none and none was to be made
    uri: str
    shared: bool


def open_store(config: Config, root: str, *, create: bool) -> Store:
    """The store of the warehouse at `root`. `create` makes what is absent, and needs the writer lock; without it nothing
    is written, and a store that is absent holds nothing.

    Raises:
        ConfigError: no store can be meant by the tracking URI.
        WarehouseError: the store cannot be used: it does not answer, is locked, damaged or of another version.
    """
    # Three tries within 15 seconds: by MLflow's own defaults every call to a server that is down takes four minutes.
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
        os.environ.pop("MLFLOW_REGISTRY_URI", None)  # the models are in the default store too
    artefacts = location(Path(root) / ARTEFACTS) if own else None
    if database is None:
        _check_answers(uri)
    elif not create and not database.exists():
        return Store(_Nothing(), "", uri, shared=not own)  # type: ignore[arg-type]
    logging.getLogger("alembic").setLevel(logging.WARNING)
    import mlflow
    from mlflow.exceptions import MlflowException

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # what it logs it raises too
    if database is not None:
        _check_sqlite(database, uri, artefacts, create=create)
        if artefacts and create:
            _relocate(database, artefacts)
    mlflow.set_tracking_uri(uri)
    if given is None:  # MLflow has put it there, and the next warehouse of this process would take it for the user's
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    try:
        client = mlflow.MlflowClient(tracking_uri=uri)
        return Store(client, _experiment(client, config.mlflow.experiment, artefacts, create), uri, shared=not own)
    except MlflowException as error:
        known = urlsplit(uri).scheme.partition("+")[0] in ("http", "https", "sqlite", "databricks", *DATABASE_PORTS)
        kind = WarehouseError if known else ConfigError
        raise kind(f"MLflow cannot use the tracking store {redact(uri)}: {_first_line(error)}; {EXPECTED}") from error


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


def sqlite_uri(path: Path) -> str:
    plain = f"sqlite:///{path}"
    # Given a URL with escapes MLflow would make a folder of that very name beside the right one, unless the driver is named.
    return plain if sqlite_file(plain) == path else f"sqlite+pysqlite:///{quote(str(path))}"


def sqlite_file(uri: str) -> Path | None:
    """The file of a sqlite URI; None for other stores.

    Raises:
        ConfigError: a sqlite URI without a file.
    """
    if not uri.lower().startswith("sqlite"):
        return None
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(uri)
    except ArgumentError:
        url = None
    if url is None or url.host or not url.database or url.database == ":memory:":
        raise ConfigError(
            f"tracking URI {redact(uri)} names no file; expected sqlite:///relative or sqlite:////absolute/path.db"
        )
    return Path(url.database)


def location(folder: Path) -> str:
    """A local folder as MLflow takes it: in a path it decodes %, cuts at # and ?, and puts : into SQL; in a URI it does not."""
    return str(folder) if re.fullmatch(r"[\w/. @+,=~-]+", str(folder)) else folder.as_uri()


def _experiment(client: MlflowClient, name: str, artefacts: str | None, create: bool) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None and create:
        try:
            return str(client.create_experiment(name, artifact_location=artefacts))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another first command was faster
    if found is None:
        return ""
    if create and found.lifecycle_stage != "active":
        raise WarehouseError(
            f"the MLflow experiment {name!r} was deleted; expected an active one. Restore it (mlflow experiments restore "
            f"--experiment-id {found.experiment_id}), or choose another with mlflow.experiment"
        )
    return str(found.experiment_id)


def _check_answers(uri: str) -> None:
    """That a server or database answers, in seconds."""
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"tracking URI {redact(uri)} is not a URI ({error}); {EXPECTED}") from None
    scheme = parts.scheme.partition("+")[0].lower()
    if scheme in ("http", "https"):
        if not host:
            raise ConfigError(f"tracking URI {redact(uri)} names no server; {EXPECTED}")
        _check_server(uri)
    elif scheme in DATABASE_PORTS:
        _check_database(uri, host, port or DATABASE_PORTS[scheme])


def _check_server(uri: str) -> None:
    import requests

    try:
        status = requests.get(f"{uri.rstrip('/')}/health", timeout=(5, 10)).status_code
    except requests.exceptions.SSLError:
        return  # it answers; MLflow has settings for certificates
    except requests.RequestException as error:
        why = "timed out" if isinstance(error, requests.Timeout) else type(error).__name__
        raise WarehouseError(_does_not_answer(uri, why)) from error
    if status >= 500:
        raise WarehouseError(_does_not_answer(uri, f"HTTP status {status}"))


def _check_database(uri: str, host: str | None, port: int) -> None:
    import sqlalchemy

    try:
        if host:
            socket.create_connection((host, port), timeout=5).close()
        engine = sqlalchemy.create_engine(uri)
        with closing(engine.connect()):
            pass
        engine.dispose()
    except ImportError as error:
        raise ConfigError(
            f"the tracking store {redact(uri)} needs the Python module {error.name}; expected it to be installed (pip install it)"
        ) from error
    except sqlalchemy.exc.ArgumentError as error:
        raise ConfigError(
            f"tracking URI {redact(uri)} is not a URL of a database ({_first_line(error)}); {EXPECTED}"
        ) from error
    except (OSError, sqlalchemy.exc.SQLAlchemyError) as error:
        raise WarehouseError(_does_not_answer(uri, _first_line(error))) from error


def _does_not_answer(uri: str, why: str) -> str:
    return (
        f"the MLflow tracking store {redact(uri)} does not answer ({why}); expected it to be up before anything is changed. "
        "Start it, or correct mlflow.tracking_uri or MLFLOW_TRACKING_URI; then run the command again"
    )


def _check_sqlite(path: Path, uri: str, artefacts: str | None, *, create: bool) -> None:
    """That a sqlite store is whole and can be used; it is made where it is absent."""
    if not path.parent.is_dir():
        raise ConfigError(
            f"folder {path.parent} of the tracking store {redact(uri)} does not exist; expected one. Make it, or correct "
            "mlflow.tracking_uri or MLFLOW_TRACKING_URI"
        )
    if create:
        _sweep(path)
        if not path.exists():
            _make(path, artefacts)
        if not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)):
            raise WarehouseError(
                f"the tracking store {path} cannot be written by this user; expected a file, and a folder for its journal, that can"
            )
    while not _complete(path, write=create):
        age = time.time() - path.stat().st_mtime
        if 0 <= age < SETTLE_SECONDS:  # another program may be making it
            time.sleep(0.2)
        elif _has_data(path):
            raise WarehouseError(
                f"the tracking store {path} has the tables of another MLflow version, or not all; expected those of the installed "
                f"one. Keep a copy of the file and run: mlflow db upgrade '{uri}'"
            )
        elif create:
            _make(path, artefacts)
        else:
            raise WarehouseError(
                f"the tracking store {path} is half made and holds nothing; expected a whole one. The next command that "
                "writes (sid nightly, sid load, ...) makes it anew"
            )


def _complete(path: Path, *, write: bool) -> bool:
    """Whether the file has the tables of this MLflow version, at its revision.

    Raises:
        WarehouseError: it cannot be read, or with `write` not be written.
    """
    from mlflow.store.db.base_sql_model import Base
    from mlflow.store.db.utils import _get_latest_schema_revision  # that module registers every table with Base

    with _sqlite(path, write=write) as database:
        if write:
            database.execute("BEGIN IMMEDIATE")
            database.execute("ROLLBACK")
        damage = str(database.execute("PRAGMA quick_check(1)").fetchone()[0])
        if damage != "ok":
            raise WarehouseError(_damaged(path, damage))
        tables = _tables(database)
        if not set(Base.metadata.tables) | {"alembic_version"} <= tables:
            return False
        revision = database.execute("SELECT version_num FROM alembic_version").fetchall()
    return revision == [(_get_latest_schema_revision(),)]


def _has_data(path: Path) -> bool:
    with _sqlite(path, write=False) as database:
        kept = _tables(database) & {"runs", "registered_models", "model_versions", "logged_models"}
        return any(database.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone() for table in kept)


def _tables(database: sqlite3.Connection) -> set[str]:
    return {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


@contextmanager
def _sqlite(path: Path, *, write: bool) -> Iterator[sqlite3.Connection]:
    """The file, opened; sqlite's errors as sentences."""
    try:
        uri = f"{path.absolute().as_uri()}?mode={'rw' if write else 'ro'}"
        with closing(sqlite3.connect(uri, uri=True, timeout=LOCK_SECONDS, isolation_level=None)) as database:
            yield database
    except sqlite3.OperationalError as error:
        if "locked" in str(error) or "busy" in str(error):
            raise WarehouseError(
                f"the tracking store {path} is locked by another process (waited {LOCK_SECONDS} seconds); expected it to be free. "
                f"End or wait for what uses it (`fuser {path}` names the process), then run the command again"
            ) from error
        raise WarehouseError(
            f"the tracking store {path} cannot be {'written' if write else 'read'} ({error}); expected a sqlite file and a folder "
            "that this user may use"
        ) from error
    except sqlite3.DatabaseError as error:
        raise WarehouseError(_damaged(path, str(error))) from error


def _damaged(path: Path, why: str) -> str:
    return (
        f"the tracking store {path} is damaged ({_first_line(why)}); expected a sqlite database. Restore it from a copy, or move "
        "it away: tables and codebooks of the warehouse are intact without it"
    )


def _make(path: Path, artefacts: str | None) -> None:
    """Make the store beside and move it in whole, so that no kill leaves half of it; where another process was faster, its
    store stays. What `path` holds already holds no data."""
    from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as RegistryStore
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    stale = None
    if path.exists():
        stale = open(path, "rb")  # noqa: SIM115 - kept open for its lock
        fcntl.flock(stale, fcntl.LOCK_EX)
    try:
        if stale is not None and (not path.exists() or not os.path.samestat(os.fstat(stale.fileno()), path.stat())):
            return  # replaced by another process while this one waited
        with _scratch(path) as folder:
            made = folder / path.name
            uri = sqlite_uri(made)
            store = SqlAlchemyStore(uri, artefacts or location(Path.cwd() / "mlruns"))
            store.engine.dispose()  # writes everything and closes the file
            SqlAlchemyStore._engine_map.pop(uri, None)
            if stale is not None:
                os.replace(made, path)
            else:
                _move_in(made, path)
        for kind in (SqlAlchemyStore, RegistryStore):  # connections of this process to a file that stood there before
            for known, engine in kind._engine_map.items():
                if sqlite_file(known) == path:
                    engine.dispose()
    except OSError as error:
        raise WarehouseError(
            f"the tracking store {path} cannot be made ({error.strerror}); expected a folder this user may create files in"
        ) from error
    finally:
        if stale is not None:
            stale.close()


def _move_in(made: Path, path: Path) -> None:
    """Give `made` its name unless that is taken."""
    try:
        os.link(made, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not path.exists():
            os.rename(made, path)


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A folder beside `path` for the duration."""
    folder = path.parent / f"{_scratch_prefix(path)}{os.getpid()}"
    folder.mkdir(exist_ok=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(path: Path) -> None:
    """Remove the folders that killed processes of this machine left beside `path`."""
    prefix = _scratch_prefix(path)
    for left in path.parent.glob(f"{glob.escape(prefix)}*"):
        if not _runs(left.name.removeprefix(prefix)):
            shutil.rmtree(left, ignore_errors=True)


def _scratch_prefix(path: Path) -> str:
    return f".{path.name}-{socket.gethostname()}-"


def _runs(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError):
        pass
    return True


def _relocate(database: Path, artefacts: str) -> None:
    """Let every artefact location of the default store name this warehouse's folder, if the warehouse was moved or copied:
    MLflow keeps absolute paths, so a moved warehouse would not find its models, and a copy would write into the original."""
    with _sqlite(database, write=True) as connection:
        connection.execute("BEGIN IMMEDIATE")
        known = [
            place for (place,) in connection.execute("SELECT DISTINCT artifact_location FROM experiments") if place
        ]
        for old in known:
            if old == artefacts or _folder_name(old) != ARTEFACTS:
                continue
            for table in _tables(connection):
                columns = {row[1] for row in connection.execute(f'PRAGMA table_info("{table}")')}
                for column in columns.intersection(LOCATIONS):
                    connection.execute(
                        f'UPDATE "{table}" SET "{column}" = ? || substr("{column}", ?) '
                        f'WHERE "{column}" = ? OR substr("{column}", 1, ?) = ?',
                        (artefacts, len(old) + 1, old, len(old) + 1, f"{old}/"),
                    )
        connection.execute("COMMIT")


def _folder_name(place: str) -> str:
    path = unquote(urlsplit(place).path) if place.startswith("file:") else place
    return Path(path).name


def _first_line(error: Any) -> str:
    return redact((str(error).strip() or type(error).__name__).splitlines()[0])


class _Nothing:
    """The client of a store that is not there: nothing is registered in it."""

    def search_model_versions(self, *_: Any, **__: Any) -> list[Any]:
        return []

    search_registered_models = search_runs = search_experiments = search_model_versions

    def __getattr__(self, name: str) -> Any:
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

        def absent(*_: Any, **__: Any) -> Any:
            raise MlflowException(f"{name}: there is no tracking store yet", RESOURCE_DOES_NOT_EXIST)

        return absent
