"""Paths and URIs: their file system, and small files on it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from urllib.parse import quote, unquote

import pyarrow as pa
from pyarrow import fs

from jobs.config import ConfigError
from jobs.errors import first_line


def filesystem_of(location: str) -> tuple[fs.FileSystem, str]:
    """The file system of a path or URI, and the path on it. What exists under exactly this name is a path."""
    if os.path.exists(location) or not re.match(r"[a-z][a-z0-9+.-]+:/", location):
        expanded = location if os.path.exists(location) else os.path.expanduser(location)
        return fs.LocalFileSystem(), os.path.abspath(expanded)  # tasks may run in another folder
    if location.startswith("file:"):
        path = re.sub(r"^file:(//(localhost)?(?=/))?", "", location)
        decoded = unquote(path)
        # A URI is encoded; Spark users write file:/ before a path that is not
        return fs.LocalFileSystem(), path if os.path.exists(path) and not os.path.exists(decoded) else decoded
    try:
        # Spark says s3a where pyarrow says s3
        resolved: tuple[fs.FileSystem, str] = fs.FileSystem.from_uri(location.replace("s3a://", "s3://", 1))
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(
            f"{location} is neither a path that exists nor a URI that can be opened ({first_line(error)}); "
            "expected a local path, or a URI such as s3://bucket/folder with special characters encoded (%20)"
        ) from error
    return resolved


def relative(path: str, root: str) -> str:
    """`path` below `root`; empty for the root itself."""
    return path[len(root.rstrip("/")) :].strip("/")


def uri_below(location: str, path: str) -> str:
    """What `filesystem_of` resolves to `path`, a path on the file system of `location`, at or below it."""
    filesystem, root = filesystem_of(location)
    below = relative(path, root)
    if isinstance(filesystem, fs.LocalFileSystem) or not below:
        return path if isinstance(filesystem, fs.LocalFileSystem) else location
    address, mark, options = location.partition("?")  # such as s3://bucket/folder?region=eu-north-1
    return f"{address.rstrip('/')}/{quote(below)}{mark}{options}"


def missing(uris: Sequence[str]) -> list[str]:
    """Those at which there is no file."""
    resolved = [filesystem_of(uri) for uri in uris]
    infos = resolved[0][0].get_file_info([path for _, path in resolved]) if resolved else []
    return [uri for uri, info in zip(uris, infos, strict=True) if not info.is_file]


def read_file(filesystem: fs.FileSystem, path: str) -> bytes | None:
    """The content of a small file; None where there is none."""
    try:
        with filesystem.open_input_stream(path) as stream:
            content: bytes = stream.read()
    except FileNotFoundError:
        return None
    return content


def write_file(filesystem: fs.FileSystem, path: str, content: bytes) -> None:
    """Write a small file whole or not at all, whenever a reader or a kill comes. Its folder is made where absent."""
    filesystem.create_dir(path.rsplit("/", 1)[0], recursive=True)
    with filesystem.open_output_stream(f"{path}.part") as stream:
        stream.write(content)
    filesystem.move(f"{path}.part", path)
