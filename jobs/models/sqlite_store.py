"""The default MLflow store, a sqlite file: creation, checks, and adaptation after its warehouse was moved."""

from __future__ import annotations

import fcntl
import glob
import os
import re
import shutil
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from jobs.config import ConfigError
from jobs.errors import WarehouseError
from jobs.models.store_answers import masked_first_line
from jobs.redaction import redact

ARTEFACTS = "mlflow_artifacts"
LOCK_SECONDS = 5  # to wait for a lock of another process
SETTLE_SECONDS = 3  # an incomplete file that did not change for so long is not being created by another process
# Columns, in any table, in which MLflow stores the absolute location of an artefact
LOCATIONS = ("artifact_location", "artifact_uri", "source", "storage_location")


def sqlite_uri(path: Path) -> str:
    """The tracking URI of a sqlite file."""
    plain = f"sqlite:///{path}"
    # MLflow would create a folder named by the escaped URL, unless the URL names the driver.
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


def artefact_location(folder: Path) -> str:
    """A local folder as a path, or as a URI if the path has characters that MLflow would misread.

    In a path MLflow decodes %, cuts at # and ?, and passes : on to SQL; in a URI it does not.
    """
    return str(folder) if re.fullmatch(r"[\w/. @+,=~-]+", str(folder)) else folder.as_uri()


def check_sqlite(path: Path, uri: str, artefacts: str | None, *, create: bool) -> None:
    """Check that a sqlite store is complete and usable. With `create` it is created if it does not exist or is empty.

    Raises:
        ConfigError: its folder does not exist.
        WarehouseError: it cannot be read or written, or is damaged, incomplete or of another MLflow version.
    """
    if not path.parent.is_dir():
        raise ConfigError(
            f"folder {path.parent} of the tracking store {redact(uri)} does not exist; expected one. Make it, or "
            "correct mlflow.tracking_uri or MLFLOW_TRACKING_URI"
        )
    if create:
        _remove_scratch_of_killed(path)
        if not path.exists():
            _create(path, artefacts)
        if not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)):
            raise WarehouseError(
                f"the tracking store {path} cannot be written by this user; expected a file, and a folder for its "
                "journal, that can"
            )
    while not _complete(path, write=create):
        age = time.time() - path.stat().st_mtime
        if 0 <= age < SETTLE_SECONDS:  # another process may be creating it
            time.sleep(0.2)
        elif _has_data(path):
            raise WarehouseError(
                f"the tracking store {path} has the tables of another MLflow version, or not all; expected those of "
                f"the installed one. Keep a copy of the file and run: mlflow db upgrade '{uri}'"
            )
        elif create:
            _create(path, artefacts)
        else:
            raise WarehouseError(
                f"the tracking store {path} is incomplete and has no data; expected a complete one. The next command "
                "that writes (sid nightly, sid load, ...) creates it again"
            )


def _complete(path: Path, *, write: bool) -> bool:
    """Whether the file has all tables of the installed MLflow version, at its revision.

    Raises:
        WarehouseError: it is damaged, cannot be read, or with `write` cannot be written.
    """
    from mlflow.store.db.base_sql_model import Base
    from mlflow.store.db.utils import _get_latest_schema_revision  # importing it declares every table

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
    return revision == [(_get_latest_schema_revision(),)]  # type: ignore[no-untyped-call]


def _has_data(path: Path) -> bool:
    """Whether the file has runs or models."""
    with _sqlite(path, write=False) as database:
        tables = _tables(database) & {"runs", "registered_models", "model_versions", "logged_models"}
        return any(database.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone() for table in tables)


def _tables(database: sqlite3.Connection) -> set[str]:
    return {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


@contextmanager
def _sqlite(path: Path, *, write: bool) -> Iterator[sqlite3.Connection]:
    """A connection to the file. Errors of sqlite become WarehouseErrors that say what to do."""
    try:
        uri = f"{path.absolute().as_uri()}?mode={'rw' if write else 'ro'}"
        with closing(sqlite3.connect(uri, uri=True, timeout=LOCK_SECONDS, isolation_level=None)) as database:
            yield database
    except sqlite3.OperationalError as error:
        if "locked" in str(error) or "busy" in str(error):
            raise WarehouseError(
                f"the tracking store {path} is locked by another process (waited {LOCK_SECONDS} seconds); expected it "
                f"to be free. End or wait for what uses it (`fuser {path}` names the process), then run the command "
                "again"
            ) from error
        raise WarehouseError(
            f"the tracking store {path} cannot be {'written' if write else 'read'} ({error}); expected a sqlite file "
            "and a folder that this user may use"
        ) from error
    except sqlite3.DatabaseError as error:
        raise WarehouseError(_damaged(path, str(error))) from error


def _damaged(path: Path, why: str) -> str:
    return (
        f"the tracking store {path} is damaged ({masked_first_line(why)}); expected a sqlite database. Restore it "
        "from a copy, or move it away: tables and codebooks of the warehouse are intact without it"
    )


def _create(path: Path, artefacts: str | None) -> None:
    """Create the store in a scratch folder and move it to `path`, so that a kill leaves no incomplete file.

    A file without data at `path` is replaced. If another process creates the store at the same time, its file stays.
    """
    from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as RegistryStore
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    stale = None
    if path.exists():
        stale = open(path, "rb")  # noqa: SIM115 - open for its lock
        fcntl.flock(stale, fcntl.LOCK_EX)
    try:
        if stale is not None and (not path.exists() or not os.path.samestat(os.fstat(stale.fileno()), path.stat())):
            return  # replaced by another process while this one waited
        with _scratch(path) as folder:
            new = folder / path.name
            uri = sqlite_uri(new)
            store = SqlAlchemyStore(uri, artefacts or artefact_location(Path.cwd() / "mlruns"))  # type: ignore[no-untyped-call]
            store.engine.dispose()  # writes everything and closes the file
            SqlAlchemyStore._engine_map.pop(uri, None)
            if stale is not None:
                os.replace(new, path)
            else:
                _rename_unless_exists(new, path)
        for kind in (SqlAlchemyStore, RegistryStore):  # close connections of this process to the replaced file
            for uri, engine in kind._engine_map.items():
                if sqlite_file(uri) == path:
                    engine.dispose()
    except OSError as error:
        raise WarehouseError(
            f"the tracking store {path} cannot be created ({error.strerror}); expected a folder this user may create "
            "files in"
        ) from error
    finally:
        if stale is not None:
            stale.close()


def _rename_unless_exists(new: Path, path: Path) -> None:
    """Give the file `new` the name `path`, unless a file of that name exists."""
    try:
        os.link(new, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not path.exists():
            os.rename(new, path)


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A folder beside `path` that is removed at the end of the block."""
    folder = path.parent / f"{_scratch_prefix(path)}{os.getpid()}"
    folder.mkdir(exist_ok=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_scratch_of_killed(path: Path) -> None:
    """Remove the scratch folders of killed processes of this machine."""
    prefix = _scratch_prefix(path)
    for folder in path.parent.glob(f"{glob.escape(prefix)}*"):
        if not _is_running(folder.name.removeprefix(prefix)):
            shutil.rmtree(folder, ignore_errors=True)


def _scratch_prefix(path: Path) -> str:
    return f".{path.name}-{socket.gethostname()}-"


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError):
        pass
    return True


def relocate(database: Path, artefacts: str) -> None:
    """Replace the artefact locations in the default store by those of this warehouse, after it was moved or copied.

    MLflow stores absolute paths: a moved warehouse would not find its models, and a copy would write into the original.
    """
    with _sqlite(database, write=True) as connection:
        connection.execute("BEGIN IMMEDIATE")
        locations = connection.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
        for old in [location for (location,) in locations if location]:
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


def _folder_name(location: str) -> str:
    path = unquote(urlsplit(location).path) if location.startswith("file:") else location
    return Path(path).name
