"""A trained CTR model as a folder: `model.safetensors`, and `manifest.json` with its shape, inputs and codebook.

Learned pieces of tokens are tensors beside those of the model, so its hash, which is its identity, covers them too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch import Tensor

from jobs.ctr.batch import Items
from jobs.ctr.dmqn import DMQN, DMQNShape
from jobs.ctr.embedding import ItemEmbedding
from jobs.ctr.pieces import Pieces
from jobs.ctr.tokens import TokenScheme
from jobs.ctr.user_table import ModelInputs
from jobs.errors import WarehouseError

FORMAT = 3  # 1 had a token table by item, and histories as lists of item ids; 2 an MLP that read all interests
TENSORS, MANIFEST = "model.safetensors", "manifest.json"
PIECES = ("pieces.several", "pieces.log_prob")  # tensors of a model whose tokens are learned pieces


class ArtefactError(WarehouseError):
    """A folder that holds no CTR model, a damaged one, or one of another codebook."""


class OtherFormatError(ArtefactError):
    """A CTR model that another version of this software wrote."""


@dataclass(frozen=True, eq=False)
class CtrModel:
    """A trained model.

    Attributes:
        model: In eval mode.
        inputs: How items and histories become what it reads.
        codebook_hash: Of the codebook whose codes it was trained on; "" for a model without tokens.
        digest: SHA-256 of its tensors.
    """

    model: DMQN
    inputs: ModelInputs
    codebook_hash: str
    digest: str

    @cached_property
    def interest_shapes(self) -> tuple[torch.Size, ...]:
        """Shape (N, ...) of one history in each tensor of `Interests`."""
        tokens = torch.zeros(0, 0)
        nothing = Items(torch.zeros(0, dtype=torch.int64), tokens.long(), tokens)
        zero = torch.zeros(1, dtype=torch.int64)
        with torch.no_grad():
            interests = self.model.user_interests(nothing, zero, zero)
        return tuple(getattr(interests, field.name)[:, 0].shape for field in fields(interests))


def new_model(inputs: ModelInputs, shape: DMQNShape) -> DMQN:
    """An untrained model, whose items start as what their coarsest codes say (`ItemEmbedding.spread`)."""
    token_rows = inputs.scheme.table_rows if inputs.scheme else 1
    embed = ItemEmbedding(inputs.item_rows, token_rows, shape.width)
    if inputs.scheme:
        embed.spread(inputs.scheme.level_rows, inputs.scheme.sums)
    return DMQN(embed, shape)


def save_model(folder: Path, model: DMQN, inputs: ModelInputs, codebook_hash: str, facts: Mapping[str, Any]) -> str:
    """Write the folder, with further `facts` in its manifest.

    Returns:
        The SHA-256 of the tensors, which is the model's identity.
    """
    folder.mkdir(parents=True)
    tensors = dict(model.state_dict())
    if inputs.scheme and inputs.scheme.pieces:
        tensors |= zip(PIECES, (inputs.scheme.pieces.several, inputs.scheme.pieces.log_prob), strict=True)
    content = bytes_of({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    digest = hashlib.sha256(content).hexdigest()
    manifest = {
        "format": FORMAT,
        "sha256": digest,
        "codebook_hash": codebook_hash,
        "inputs": inputs.settings,
        "shape": asdict(model.shape),
        **facts,
    }
    (folder / TENSORS).write_bytes(content)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return digest


def load_model(folder: Path, codebook_hash: str | None = None) -> CtrModel:
    """The model in `folder`, with its hash checked.

    Args:
        codebook_hash: The codebook that the codes to score with come from; None does not check it.

    Raises:
        ArtefactError: the folder is no model of this format, is damaged, or belongs to another codebook.
    """
    return model_of(*read_files(folder), codebook_hash)


def read_files(folder: Path) -> tuple[bytes, bytes]:
    """Manifest and tensors.

    Raises:
        ArtefactError: one is missing.
    """
    try:
        return (folder / MANIFEST).read_bytes(), (folder / TENSORS).read_bytes()
    except FileNotFoundError as error:
        raise ArtefactError(
            f"{Path(str(error.filename)).name} is missing; expected a CTR model of format {FORMAT}. Train it again"
        ) from error


def model_of(manifest_json: bytes, content: bytes, codebook_hash: str | None = None) -> CtrModel:
    """The model of what `read_files` gives; see `load_model`."""
    try:
        manifest = json.loads(manifest_json)
    except ValueError as error:
        raise ArtefactError(
            f"{MANIFEST} of the CTR model is damaged ({error}); expected JSON. Train it again"
        ) from error
    if manifest.get("format") != FORMAT:
        raise OtherFormatError(f"the CTR model has format {manifest.get('format')}; expected {FORMAT}. Train it again")
    digest = hashlib.sha256(content).hexdigest()
    if digest != manifest["sha256"]:
        raise ArtefactError(
            f"{TENSORS} of the CTR model has SHA-256 {digest[:12]}; expected {manifest['sha256'][:12]}: the file was "
            "changed or cut. Train it again"
        )
    if codebook_hash not in (None, manifest["codebook_hash"]):
        raise ArtefactError(
            f"the CTR model was trained on codebook {manifest['codebook_hash'][:12]}, the codes are of codebook "
            f"{str(codebook_hash)[:12]}; expected one codebook. Use the model of that codebook, or train one on it"
        )
    tensors = tensors_of(content)
    inputs = _inputs_of(manifest["inputs"], [tensors.pop(name) for name in PIECES if name in tensors])
    model = new_model(inputs, DMQNShape(**manifest["shape"]))
    model.load_state_dict(tensors)
    return CtrModel(model.eval(), inputs, manifest["codebook_hash"], digest)


def _inputs_of(settings: Mapping[str, Any], pieces: Sequence[Tensor]) -> ModelInputs:
    """Of `ModelInputs.settings` and the tensors of PIECES, where there are any."""
    scheme = settings["scheme"]
    if scheme is None:
        return ModelInputs(**settings)
    try:
        own = Pieces(scheme["components"], *pieces) if pieces else None
        return ModelInputs(**{**settings, "scheme": TokenScheme(**scheme, pieces=own)})
    except ValueError as error:
        raise ArtefactError(
            f"{MANIFEST} and {TENSORS} of the CTR model do not belong together: {error}. Train it again"
        ) from error
