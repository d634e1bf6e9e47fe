"""The files of a folder that hold its rows, as Spark, pandas and pyarrow users expect.

* Names that begin with `_` or `.` are not data (`_temporary`, `_SUCCESS`, `.ipynb_checkpoints`, `._part-0.parquet`),
  except folders such as `_day=1`. Nor are files without Parquet inside, unless their name says so.
* Iceberg and Hudi tables, and files that belong to a Delta table, are refused: read one by one they would bring deleted
  rows back.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pyarrow as pa
from pyarrow import fs

from jobs.config import ConfigError
from jobs.errors import SchemaError, first_line
from jobs.files.filesystem import filesystem_of, relative
from jobs.files.parquet import begins_as_parquet

PARQUET_SUFFIXES = (".parquet", ".parq", ".pq")


@dataclass(frozen=True)
class Listing:
    """What is at `location`: a file, or a folder with all that is inside, at any depth, in order of the paths.

    `path` is the path of `location` on `filesystem`.
    """

    location: str
    filesystem: fs.FileSystem
    path: str
    info: fs.FileInfo
    inside: tuple[fs.FileInfo, ...]

    @property
    def is_delta(self) -> bool:
        return any(relative(info.path, self.path) == "_delta_log" for info in self.inside)

    def parquet_files(self) -> tuple[list[fs.FileInfo], list[str]]:
        """The Parquet files, in order of their paths, and the names of other files.

        Raises:
            ConfigError: there is none, or they are of an Iceberg, Hudi or Delta table.
        """
        self._refuse_other_tables()
        if self.info.type == fs.FileType.File:
            return [self.info], []
        data, others = [], []
        for info in self.inside:
            name = relative(info.path, self.path)
            if info.type != fs.FileType.File or _is_hidden(name):
                continue
            # Hive and old Hadoop jobs write Parquet under names such as 000000_0
            if info.base_name.lower().endswith(PARQUET_SUFFIXES) or begins_as_parquet(self.filesystem, info.path):
                data.append(info)
            else:
                others.append(name)
        if not data:
            raise ConfigError(
                f"{self.location} holds no Parquet file; expected at least one "
                "(names that begin with _ or . do not count)"
            )
        return data, others

    def _refuse_other_tables(self) -> None:
        for info in self.inside:
            folder, _, name = relative(info.path, self.path).rpartition("/")
            if name == "_delta_log":
                raise ConfigError(
                    f"{self.location} is no table itself but holds the Delta table {folder}; expected one table. "
                    f"Give {self.location.rstrip('/')}/{folder}"
                )
            if name == ".hoodie" or (name.endswith(".metadata.json") and folder.rpartition("/")[2] == "metadata"):
                kind = "a Hudi" if name == ".hoodie" else "an Iceberg"
                raise ConfigError(
                    f"{self.location} holds {kind} table; its files read one by one would bring deleted rows back. "
                    "Expected Parquet or Delta: export it first"
                )
        folder = self.path
        while (above := folder.rpartition("/")[0]) and above != folder:
            folder = above
            if self.filesystem.get_file_info(f"{folder}/_delta_log").type == fs.FileType.Directory:
                raise ConfigError(
                    f"{self.location} is a part of the Delta table {folder}; read by itself it would bring deleted "
                    "rows back. Expected the whole table"
                )


def list_files(location: str) -> Listing:
    """What is at `location`.

    Raises:
        ConfigError: nothing is there, it cannot be read, or a name is not UTF-8.
        SchemaError: a link leads nowhere or upwards.
    """
    filesystem, path = filesystem_of(location)
    try:
        info = filesystem.get_file_info(path)
        if info.type == fs.FileType.NotFound:
            raise ConfigError(f"{location} does not exist; expected a Parquet file, a folder of them or a Delta table")
        if info.type == fs.FileType.Unknown:
            raise ConfigError(f"{location} is neither a file nor a folder; expected Parquet or a Delta table")
        inside: list[fs.FileInfo] = []
        if info.type == fs.FileType.Directory:
            if isinstance(filesystem, fs.LocalFileSystem):
                _check_links(path)
            inside = sorted(filesystem.get_file_info(fs.FileSelector(path, recursive=True)), key=lambda info: info.path)
    except (OSError, pa.ArrowInvalid) as error:
        raise ConfigError(
            f"{location} cannot be read ({first_line(error)}); expected a path or URI of Parquet"
        ) from error
    except UnicodeError as error:
        raise ConfigError(
            f"{location!a} is, or holds, a name that is not UTF-8 ({first_line(error)}); expected UTF-8. Rename it"
        ) from error
    return Listing(location, filesystem, path, info, tuple(inside))


def _check_links(root: str) -> None:
    """A listing skips broken links silently, and follows a link to a folder above itself without end.

    Raises:
        SchemaError: there is one.
    """
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = f"{folder}/{name}"
            if not os.path.islink(path) or _is_hidden(relative(path, root)):
                continue
            if not os.path.exists(path):
                raise SchemaError(f"{path} is a link to {os.readlink(path)}, which does not exist; expected a file")
            if os.path.realpath(folder).startswith(os.path.join(os.path.realpath(path), "")) or os.path.samefile(
                folder, path
            ):
                raise SchemaError(f"{path} is a link to a folder that it lies in; expected none. Remove it")


def _is_hidden(relative_path: str) -> bool:
    """Does Spark pass over it: a name on the way begins with . or with _ (but not _key=value)."""
    return any(
        part.startswith(".") or (part.startswith("_") and "=" not in part) or part.endswith("._COPYING_")
        for part in relative_path.split("/")
    )
