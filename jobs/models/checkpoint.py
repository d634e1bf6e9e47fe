"""The folder under the warehouse where driver and workers of a fit meet: levels done so far, where it is, last words.

It lies beside the tables, so on a cluster every worker reaches it; a fit that was killed goes on from it.
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


@dataclass(frozen=True)
class Checkpoint:
    """Of the fit named `key` in the warehouse at `root` (absolute folder or URI)."""

    root: str
    key: str

    @cached_property
    def _place(self) -> tuple[fs.FileSystem, str]:
        filesystem, root = filesystem_of(self.root)
        return filesystem, f"{root}/{FOLDER}"

    def open(self) -> None:
        """Make the folder, without last words of an earlier try and without other fits: there is one writer, so those
        were given up."""
        filesystem, place = self._place
        filesystem.create_dir(f"{place}/{self.key}", recursive=True)
        for other in filesystem.get_file_info(fs.FileSelector(place)):
            if other.base_name != self.key:
                filesystem.delete_dir(other.path)
        for name in self._names():
            if name.startswith("error-"):
                filesystem.delete_file(f"{place}/{self.key}/{name}")

    def close(self) -> None:
        filesystem, place = self._place
        filesystem.delete_dir(place)

    def save(self, fit: RQGMMFit) -> None:
        """Keep the levels done so far."""
        self._save_fit(f"level-{fit.rqgmm.n_levels}", fit)

    def latest(self) -> RQGMMFit | None:
        """The levels done so far, checked against their hash."""
        levels = [int(name[6:-5]) for name in self._names() if name.startswith("level-") and name.endswith(".json")]
        return self._load_fit(f"level-{max(levels)}") if levels else None

    def save_result(self, fit: RQGMMFit) -> None:
        """Keep what workers fitted for the driver."""
        self._save_fit("result", fit)

    def result(self) -> RQGMMFit:
        return self._load_fit("result")

    def save_start(self, champion: RQGMM) -> None:
        self._save_codebook("start", champion)

    def start(self) -> RQGMM | None:
        """The codebook that the fit starts from, if any."""
        return self._load_codebook("start") if "start" in self._names() else None

    def save_progress(self, step: Iteration) -> None:
        self._write("progress.json", json.dumps(asdict(step)))

    def progress(self) -> Iteration | None:
        return Iteration(**json.loads(self._read("progress.json"))) if "progress.json" in self._names() else None

    def save_error(self, rank: int, text: str) -> None:
        self._write(f"error-{rank}.txt", text)

    def error(self) -> tuple[int, str] | None:
        """Rank and last words of a worker that failed by itself, not for want of another."""
        told = sorted(name for name in self._names() if name.startswith("error-"))
        return (int(told[0][6:-4]), self._read(told[0])) if told else None

    def _names(self) -> list[str]:
        filesystem, place = self._place
        found: list[Any] = filesystem.get_file_info(fs.FileSelector(f"{place}/{self.key}", allow_not_found=True))
        return [entry.base_name for entry in found]

    def _write(self, name: str, text: str) -> None:
        filesystem, place = self._place
        write_file(filesystem, f"{place}/{self.key}/{name}", text.encode())

    def _read(self, name: str) -> str:
        filesystem, place = self._place
        with filesystem.open_input_stream(f"{place}/{self.key}/{name}") as stream:
            return str(stream.read().decode())

    def _save_fit(self, name: str, fit: RQGMMFit) -> None:
        """The trace is written last: without it the codebook does not count."""
        self._save_codebook(name, fit.rqgmm)
        self._write(f"{name}.json", json.dumps([asdict(step) for step in fit.trace]))

    def _load_fit(self, name: str) -> RQGMMFit:
        trace = tuple(Iteration(**step) for step in json.loads(self._read(f"{name}.json")))
        return RQGMMFit(self._load_codebook(name), trace)

    def _save_codebook(self, name: str, rqgmm: RQGMM) -> None:
        filesystem, place = self._place
        target = f"{place}/{self.key}/{name}"
        filesystem.create_dir(target)
        with tempfile.TemporaryDirectory() as scratch:
            save_codebook(Path(scratch), rqgmm, {})
            for file in (TENSORS, MANIFEST):
                fs.copy_files(
                    f"{scratch}/{file}", f"{target}/{file}", source_filesystem=fs.LocalFileSystem(), destination_filesystem=filesystem
                )  # fmt: skip

    def _load_codebook(self, name: str) -> RQGMM:
        filesystem, place = self._place
        with tempfile.TemporaryDirectory() as scratch:
            for file in (TENSORS, MANIFEST):
                fs.copy_files(
                    f"{place}/{self.key}/{name}/{file}", f"{scratch}/{file}", source_filesystem=filesystem, destination_filesystem=fs.LocalFileSystem()
                )  # fmt: skip
            return load_codebook(Path(scratch)).rqgmm
