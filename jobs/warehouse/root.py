"""The folder or URI under which every table of a warehouse lives."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from jobs.config import ConfigError
from jobs.errors import WarehouseError


def warehouse_root(location: str, *, write: bool = True) -> str:
    """Absolute folder or URI of the warehouse. With `write` a local folder is created if it does not exist.

    Raises:
        ConfigError: the location is on another host or no path, or without `write` it does not exist.
        WarehouseError: with `write`, the folder cannot be written.
    """
    if re.match(r"file:/", location, re.IGNORECASE):
        parts = urlsplit(location, allow_fragments=False)
        if parts.netloc not in ("", "localhost"):
            raise ConfigError(
                f"warehouse {location} names the host {parts.netloc}; expected a folder of this machine: file:///path, "
                "or the path alone"
            )
        location = unquote(location.split(":", 1)[1].removeprefix(f"//{parts.netloc}"))
    elif "://" in location:
        return location.rstrip("/")
    try:
        folder = Path(location).expanduser().resolve()
    except (RuntimeError, OSError) as error:  # an unknown user after ~, or a loop of links
        raise ConfigError(f"warehouse {location} is no folder ({error}); expected the path of one") from error
    if not write:
        if not folder.is_dir():
            problem = "is a file" if folder.exists() else "does not exist"
            raise ConfigError(
                f"warehouse {location} {problem}; expected the folder that `sid nightly` or `sid load` wrote. Check "
                "--warehouse"
            )
        return str(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise WarehouseError(
            f"warehouse {location} cannot be written ({error.strerror}); expected a folder this user may create files "
            "in. Choose another with --warehouse DIR"
        ) from error
    return str(folder)
