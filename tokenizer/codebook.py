"""A codebook on disk: a folder of `codebook.safetensors` and `manifest.json`, known by the hash of its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tokenizer.errors import CodebookError, TokenizerError
from tokenizer.gmm import DiagonalGMM
from tokenizer.rqgmm import RQGMM

FORMAT = 1
TENSORS, MANIFEST = "codebook.safetensors", "manifest.json"


@dataclass(frozen=True, eq=False)
class Codebook:
    """A fitted RQ-GMM with what is known of its making; `hash` is the name of its content."""

    rqgmm: RQGMM
    manifest: Mapping[str, Any]
    hash: str


def content_hash(rqgmm: RQGMM, fusion: Any = None) -> str:
    """sha256 over every tensor, the fusion recipe and the beam: what decides which code an item gets."""
    digest = hashlib.sha256(json.dumps(fusion, sort_keys=True).encode())
    if rqgmm.beam > 1:
        digest.update(f"beam{rqgmm.beam}".encode())
    for name, tensor in sorted(_tensors(rqgmm).items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def save_codebook(folder: Path, rqgmm: RQGMM, manifest: Mapping[str, Any]) -> str:
    """Write the folder and return the content hash."""
    name = content_hash(rqgmm, manifest.get("fusion"))
    shape = {"levels": rqgmm.n_levels, "components": rqgmm.components, "dim": rqgmm.dim, "beam": rqgmm.beam}
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(_tensors(rqgmm), str(Path(folder) / TENSORS))
    full = {**manifest, **shape, "format": FORMAT, "hash": name}
    (Path(folder) / MANIFEST).write_text(json.dumps(full, indent=2, sort_keys=True) + "\n")
    return name


def load_codebook(folder: Path, *, expect_hash: str | None = None) -> Codebook:
    """Read a codebook and check it against its manifest and, if given, the caller's hash.

    Raises:
        CodebookError: a file is missing or damaged, or a hash or shape differs.
    """
    folder = Path(folder)
    for file in (TENSORS, MANIFEST):
        if not (folder / file).exists():
            raise CodebookError(
                f"codebook folder {folder.name} has no {file}; expected {TENSORS} and {MANIFEST}. Was it copied whole?"
            )
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        tensors = load_file(str(folder / TENSORS))
        if manifest["format"] != FORMAT:
            raise CodebookError(
                f"codebook format is {manifest['format']}; this version reads {FORMAT}. Install a newer semantic-id-pipeline"
            )
        levels = tuple(
            DiagonalGMM(tensors[f"level{n}.weights"], tensors[f"level{n}.means"], tensors[f"level{n}.variances"])
            for n in range(1, manifest["levels"] + 1)
        )
        rqgmm = RQGMM(levels, beam=manifest.get("beam", 1))
    except CodebookError:
        raise
    except (SafetensorError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TokenizerError) as error:
        raise CodebookError(
            f"codebook folder {folder.name} is damaged ({type(error).__name__}: {error}); expected what save_codebook wrote. Fetch it again"
        ) from error
    name = content_hash(rqgmm, manifest.get("fusion"))
    if name != manifest["hash"]:
        raise CodebookError(
            f"codebook content hashes to {name[:12]}, its manifest says {str(manifest['hash'])[:12]}; expected the same. Fetch it again"
        )
    if expect_hash is not None and name != expect_hash:
        raise CodebookError(
            f"codebook is {name[:12]}, the caller expects {expect_hash[:12]}; expected the same content. Resolve the version again"
        )
    return Codebook(rqgmm, manifest, name)


def _tensors(rqgmm: RQGMM) -> dict[str, torch.Tensor]:
    return {
        f"level{number}.{name}": getattr(gmm, name).contiguous()
        for number, gmm in enumerate(rqgmm.levels, start=1)
        for name in ("weights", "means", "variances")
    }
