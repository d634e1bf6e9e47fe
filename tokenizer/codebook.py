"""A codebook: a fitted RQ-GMM with its recipe, in memory and as a folder of tensors and a manifest."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenizer.annealing import Method
from tokenizer.data import Data
from tokenizer.errors import CodebookError, DataError
from tokenizer.fitting import fit_rqgmm
from tokenizer.fusion import Fusion
from tokenizer.gmm import DiagonalGMM
from tokenizer.iterations import Iteration
from tokenizer.quality import Quality, measure_quality
from tokenizer.rqgmm import RQGMM, Assignment
from tokenizer.semantic_id import text_of

FORMAT, HARD_FORMAT = 2, 1  # codebooks of format 1 have no temperatures
TENSORS, MANIFEST = "codebook.safetensors", "manifest.json"


@dataclass(frozen=True, eq=False)
class SemanticIds(Assignment):
    """`Assignment` with the codes as text."""

    @property
    def text(self) -> list[str]:
        """`12-87`, one per row; items of equal codes have equal text."""
        return [text_of(codes, 0) for codes in self.codes.tolist()]


@dataclass(frozen=True, eq=False)
class Codebook:
    """A fitted RQ-GMM. `manifest` says how it was made, `hash` is that of all that decides codes and weights."""

    rqgmm: RQGMM
    manifest: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def hash(self) -> str:
        return content_hash(self.rqgmm, self.manifest.get("fusion"))

    @cached_property
    def fusion(self) -> Fusion | None:
        """How the embeddings were made, if the manifest says so.

        Raises:
            CodebookError: its entry is not a valid recipe.
        """
        recipe = self.manifest.get("fusion")
        try:
            return None if recipe is None else Fusion.from_dict(recipe)
        except DataError as error:
            raise CodebookError(f"the codebook's recipe is wrong: {error}") from error

    def encode(self, x: Tensor, alternates: int = 0) -> SemanticIds:
        """Semantic IDs of embeddings (N, D); with `alternates` also the soft ones, of so many codes a level."""
        result = self.rqgmm.assign(x, alternates=alternates)
        return SemanticIds(result.codes, result.confidence, result.log_likelihood, result.alternates)

    def decode(self, codes: Tensor) -> Tensor:
        """(N, D) float32: the embeddings that codes (N, L) stand for."""
        return self.rqgmm.decode(codes)

    def quality(self, x: Tensor) -> Quality:
        """Reconstruction, use of the components, collisions and neighbours kept, for embeddings (N, D)."""
        return measure_quality(x, self.rqgmm.encode(x), self.rqgmm)

    def save(self, folder: str | Path) -> str:
        """Write the folder; returns the hash."""
        return save_codebook(Path(folder), self.rqgmm, self.manifest)


def fit(
    x: Data,
    *,
    levels: int = 2,
    components: int = 128,
    seed: int = 0,
    method: Method = "annealed",
    beam: int = 1,
    fusion: Fusion | None = None,
    progress: Callable[[Iteration], None] | None = None,
) -> Codebook:
    """A codebook of embeddings (N, D), or of a re-iterable of batches of them; see `fit_rqgmm`.

    `progress` is called with each step. By default a line of progress is printed if standard error is a terminal.
    """
    line = progress is None and sys.stderr.isatty()
    fitted = fit_rqgmm(
        x,
        levels=levels,
        components=components,
        seed=seed,
        method=method,
        beam=beam,
        on_iteration=_progress_line if line else progress,
    )
    if line:
        print(file=sys.stderr)
    settings = {"levels": levels, "components": components, "seed": seed, "method": method, "beam": beam}
    manifest = {"fit": settings, **({} if fusion is None else {"fusion": fusion.to_dict()})}
    return Codebook(fitted.rqgmm, manifest)


def _progress_line(step: Iteration) -> None:
    text = f"fit: {step.summary()}"
    print(f"\r{text:<50}", end="", file=sys.stderr, flush=True)


def content_hash(rqgmm: RQGMM, fusion: Any = None) -> str:
    """sha256 over every tensor, the fusion recipe and the beam: all that decides an item's codes and their weights."""
    digest = hashlib.sha256(json.dumps(fusion, sort_keys=True).encode())
    if rqgmm.beam > 1:
        digest.update(f"beam{rqgmm.beam}".encode())
    for name, tensor in sorted(_tensors(rqgmm).items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def _tensors(rqgmm: RQGMM) -> dict[str, Tensor]:
    tensors = {
        f"level{number}.{name}": getattr(gmm, name).contiguous()
        for number, gmm in enumerate(rqgmm.levels, start=1)
        for name in ("weights", "means", "variances")
    }
    return {**tensors, **({"temperatures": torch.tensor(rqgmm.temperatures)} if rqgmm.temperatures else {})}


def save_codebook(folder: Path, rqgmm: RQGMM, manifest: Mapping[str, Any]) -> str:
    """Write the folder and return the content hash."""
    name = content_hash(rqgmm, manifest.get("fusion"))
    shape = {"levels": rqgmm.n_levels, "components": rqgmm.components, "dim": rqgmm.dim, "beam": rqgmm.beam}
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(_tensors(rqgmm), str(Path(folder) / TENSORS))
    full = {**manifest, **shape, "format": FORMAT if rqgmm.temperatures else HARD_FORMAT, "hash": name}
    (Path(folder) / MANIFEST).write_text(json.dumps(full, indent=2, sort_keys=True) + "\n")
    return name


def load_codebook(folder: str | Path, *, expect_hash: str | None = None) -> Codebook:
    """Read a codebook and check it against its manifest and, if given, the caller's hash.

    Raises:
        CodebookError: a file is missing or damaged, or a hash or shape differs.
    """
    folder = Path(folder)
    for file in (TENSORS, MANIFEST):
        if not (folder / file).is_file():
            raise CodebookError(
                f"codebook folder {folder.name} has no file {file}; expected {TENSORS} and {MANIFEST}. Was it copied "
                "whole?"
            )
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        tensors = load_file(str(folder / TENSORS))
        rqgmm = _checked(manifest, tensors)
    except CodebookError:
        raise
    # The files may hold anything: bytes that are no JSON or safetensors, numbers and nesting beyond what Python takes.
    except (OSError, ValueError, RecursionError, OverflowError, MemoryError, SafetensorError) as error:
        raise CodebookError(
            f"codebook folder {folder.name} is damaged ({type(error).__name__}: {error}); expected what save_codebook "
            "wrote. Fetch it again"
        ) from error
    codebook = Codebook(rqgmm, manifest)
    if codebook.hash != manifest["hash"]:
        raise CodebookError(
            f"codebook content hashes to {codebook.hash[:12]}, its manifest says {manifest['hash'][:12]}; expected "
            "the same. Fetch it again"
        )
    if expect_hash is not None and codebook.hash != expect_hash:
        raise CodebookError(
            f"codebook is {codebook.hash[:12]}, the caller expects {expect_hash[:12]}; expected the same content. "
            "Resolve the version again"
        )
    return codebook


def _checked(manifest: Any, tensors: Mapping[str, Tensor]) -> RQGMM:
    """The model that manifest and tensors describe; ValueError says where they disagree."""
    if not isinstance(manifest, dict):
        raise ValueError(f"{MANIFEST} holds a {type(manifest).__name__}; expected an object")
    form = manifest.get("format")
    if form not in (HARD_FORMAT, FORMAT) or isinstance(form, bool):
        raise CodebookError(
            f"codebook format is {form!r}; this version reads {HARD_FORMAT} and {FORMAT}. Install a newer "
            "semantic-id-pipeline"
        )
    manifest.setdefault("beam", 1)  # older codebooks of format 1 do not have it
    for name in ("levels", "components", "dim", "beam"):
        value = manifest.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; expected an integer of at least 1")
    if not isinstance(manifest.get("hash"), str):
        raise ValueError(f"hash is {manifest.get('hash')!r}; expected text")
    levels, k, d = (manifest[name] for name in ("levels", "components", "dim"))
    expected = {
        f"level{number}.{part}": shape
        for number in range(1, levels + 1)
        for part, shape in {"weights": (k,), "means": (k, d), "variances": (k, d)}.items()
    }
    if form == FORMAT:
        expected["temperatures"] = (levels,)
    if len(tensors) != len(expected):
        raise ValueError(f"{TENSORS} holds {len(tensors)} tensors; expected {len(expected)} for {levels} levels")
    for name, shape in expected.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
            what = "missing" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ValueError(f"{name} is {what}; expected float32 of shape {shape}")
    mixtures = tuple(
        DiagonalGMM(*(tensors[f"level{number}.{part}"] for part in ("weights", "means", "variances")))
        for number in range(1, levels + 1)
    )
    temperatures = tuple(tensors["temperatures"].tolist()) if form == FORMAT else ()
    return RQGMM(mixtures, manifest["beam"], temperatures)
