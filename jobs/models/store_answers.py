"""A check that the server or database of an MLflow tracking URI answers, in seconds and before any work."""

from __future__ import annotations

import socket
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

from jobs.config import ConfigError
from jobs.errors import WarehouseError
from jobs.redaction import redact

DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
EXPECTED = (
    "expected http(s)://server, sqlite:///file or the URL of a database that MLflow supports (see mlflow.tracking_uri "
    "and MLFLOW_TRACKING_URI)"
)


def check_answers(uri: str) -> None:
    """Check that the server or database of a tracking URI answers; other schemes are not checked.

    Raises:
        ConfigError: the URI is no URI of a server or database.
        WarehouseError: nothing answers, or with an error.
    """
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
        return  # the server answers; certificates are a setting of MLflow
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
            f"the tracking store {redact(uri)} needs the Python module {error.name}; expected it to be installed (pip "
            "install it)"
        ) from error
    except sqlalchemy.exc.ArgumentError as error:
        raise ConfigError(
            f"tracking URI {redact(uri)} is not a URL of a database ({masked_first_line(error)}); {EXPECTED}"
        ) from error
    except (OSError, sqlalchemy.exc.SQLAlchemyError) as error:
        raise WarehouseError(_does_not_answer(uri, masked_first_line(error))) from error


def _does_not_answer(uri: str, why: str) -> str:
    return (
        f"the MLflow tracking store {redact(uri)} does not answer ({why}); expected it to be up before anything is "
        "changed. Start it, or correct mlflow.tracking_uri or MLFLOW_TRACKING_URI; then run the command again"
    )


def masked_first_line(error: Any) -> str:
    """The first line of an exception's message, or the name of its class; credentials are masked."""
    return redact((str(error).strip() or type(error).__name__).splitlines()[0])
