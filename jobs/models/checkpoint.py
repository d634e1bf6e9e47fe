"""The checkpoint of a fit: a folder in the warehouse with finished levels.

A killed fit goes on from it. Driver and workers of a distributed fit exchange levels through it: it is beside the
tables, so every worker on a cluster can read and write it.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pyarrow import fs

from jobs.files.filesystem import filesystem_of, write_file
from tokenizer import RQGMM, Iteration, RQGMMFit, load_codebook, save_codebook
from tokenizer.codebook import MANIFEST, TENSORS

FOLDER = "_fits"
LOCAL = fs.LocalFileSystem()


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoint of the fit with this key in the warehouse at `root` (absolute folder or URI)."""

    root: str
    key: str

    @cached_property
    def _location(self) -> tuple[fs.FileSystem, str]:
        """The file system, and the folder of all fits in it."""
        filesystem, root = filesystem_of(self.root)
        return filesystem, f"{root}/{FOLDER}"

    @property
    def folder(self) -> str:
        return f"{self.root}/{FOLDER}/{self.key}"

    def open(self) -> None:
        """Create the folder.

        Checkpoints of other fits are removed: there is one writer at a time, so those fits were abandoned.
        """
        filesystem, folder = self._location
        filesystem.create_dir(f"{folder}/{self.key}", recursive=True)
        for other in filesystem.get_file_info(fs.FileSelector(folder)):
            if other.base_name != self.key:
                filesystem.delete_dir(other.path)

    def close(self) -> None:
        """Remove the folder."""
        filesystem, folder = self._location
        filesystem.delete_dir(folder)

    def save(self, fit: RQGMMFit) -> None:
        """Store the levels that are finished."""
        self._save_fit(f"level-{fit.rqgmm.n_levels}", fit)

    def latest(self) -> RQGMMFit | None:
        """The finished levels, verified by their hash; None if there are none."""
        levels = [int(name[6:-5]) for name in self._names() if name.startswith("level-") and name.endswith(".json")]
        return self._load_fit(f"level-{max(levels)}") if levels else None

    def save_result(self, fit: RQGMMFit) -> None:
        """Store what the workers fitted, for the driver."""
        self._save_fit("result", fit)

    def result(self) -> RQGMMFit:
        return self._load_fit("result")

    def save_start(self, champion: RQGMM) -> None:
        self._save_codebook("start", champion)

    def start(self) -> RQGMM | None:
        """The codebook that the fit starts from, if any."""
        return self._load_codebook("start") if "start" in self._names() else None

    def _names(self) -> list[str]:
        filesystem, folder = self._location
        entries: list[Any] = filesystem.get_file_info(fs.FileSelector(f"{folder}/{self.key}", allow_not_found=True))
        return [entry.base_name for entry in entries]

    def _write(self, name: str, text: str) -> None:
        filesystem, folder = self._location
        write_file(filesystem, f"{folder}/{self.key}/{name}", text.encode())

    def _read(self, name: str) -> str:
        filesystem, folder = self._location
        with filesystem.open_input_stream(f"{folder}/{self.key}/{name}") as stream:
            return str(stream.read().decode())

    def _save_fit(self, name: str, fit: RQGMMFit) -> None:
        """The trace is written last; a codebook without one is incomplete and is not read."""
        self._save_codebook(name, fit.rqgmm)
        self._write(f"{name}.json", json.dumps([asdict(step) for step in fit.trace]))

    def _load_fit(self, name: str) -> RQGMMFit:
        trace = tuple(Iteration(**step) for step in json.loads(self._read(f"{name}.json")))
        return RQGMMFit(self._load_codebook(name), trace)

    def _save_codebook(self, name: str, rqgmm: RQGMM) -> None:
        filesystem, folder = self._location
        filesystem.create_dir(f"{folder}/{self.key}/{name}")
        with tempfile.TemporaryDirectory() as scratch:
            save_codebook(Path(scratch), rqgmm, {})
            for file in (TENSORS, MANIFEST):
                source, target = f"{scratch}/{file}", f"{folder}/{self.key}/{name}/{file}"
                fs.copy_files(source, target, source_filesystem=LOCAL, destination_filesystem=filesystem)

    def _load_codebook(self, name: str) -> RQGMM:
        filesystem, folder = self._location
        with tempfile.TemporaryDirectory() as scratch:
            for file in (TENSORS, MANIFEST):
                source, target = f"{folder}/{self.key}/{name}/{file}", f"{scratch}/{file}"
                fs.copy_files(source, target, source_filesystem=filesystem, destination_filesystem=LOCAL)
            return load_codebook(Path(scratch)).rqgmm
