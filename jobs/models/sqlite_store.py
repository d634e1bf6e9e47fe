"""The default MLflow store, a sqlite file: checked, made whole or not at all, and moved with its warehouse."""

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
from jobs.models.store_answers import first_line
from jobs.redaction import redact

ARTEFACTS = "mlflow_artifacts"
LOCK_SECONDS = 5  # how long a sqlite file may be locked by another process
SETTLE_SECONDS = 3  # a schema to which nobody has added for so long is not being made any more
# Columns in which MLflow keeps the absolute location of an artefact, in whatever table.
LOCATIONS = ("artifact_location", "artifact_uri", "source", "storage_location")


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


def check_sqlite(path: Path, uri: str, artefacts: str | None, *, create: bool) -> None:
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
    return revision == [(_get_latest_schema_revision(),)]  # type: ignore[no-untyped-call]


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
        f"the tracking store {path} is damaged ({first_line(why)}); expected a sqlite database. Restore it from a copy, or move "
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
            store = SqlAlchemyStore(uri, artefacts or location(Path.cwd() / "mlruns"))  # type: ignore[no-untyped-call]
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


def relocate(database: Path, artefacts: str) -> None:
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
