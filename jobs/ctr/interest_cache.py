"""Entries of the cache: the interests of a user under one model, with what tells whether they may be used.

An entry names the model that computed it (SHA-256 of its tensors) and the codebook of its codes, with a checksum over
all of it. A look-up gives the entries that are whole and of the model in hand, and a reason for each other one.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from jobs.ctr.artefact import CtrModel
from jobs.ctr.batch import Items, UserBatch
from jobs.ctr.dmqn import Interests
from jobs.ctr.user_table import IMPRESSION, UserTable

USERS_AT_ONCE = 256  # whose clusters are in memory
FOREIGN, DAMAGED, STALE = "of another model", "cut or damaged", "older than the user's newest behaviour"


@dataclass(frozen=True)
class Entry:
    """The interests of a user.

    Attributes:
        model_digest, codebook_hash: What they were computed with.
        history_hash: Of the behaviours that they were computed from.
        interests: Tensors of `Interests` of one history as little-endian float32, one after the other.
        checksum: CRC-32 of all the above.
    """

    user_id: str
    model_digest: str
    codebook_hash: str
    history_hash: int
    interests: bytes
    checksum: int

    @staticmethod
    def of(ctr: CtrModel, user_id: str, history_hash: int, interests: bytes) -> Entry:
        checksum = _checksum(user_id, ctr.digest, ctr.codebook_hash, history_hash, interests)
        return Entry(user_id, ctr.digest, ctr.codebook_hash, history_hash, interests, checksum)

    def problem(self, ctr: CtrModel, history_hash: int | None) -> str | None:
        """Why this model must not use the entry, given the history of the user where it is known; None if it may."""
        if (self.model_digest, self.codebook_hash) != (ctr.digest, ctr.codebook_hash):
            return FOREIGN
        content = (self.user_id, self.model_digest, self.codebook_hash, self.history_hash, self.interests)
        if len(self.interests) != entry_bytes(ctr) or _checksum(*content) != self.checksum:
            return DAMAGED
        return STALE if history_hash not in (None, self.history_hash) else None


def _checksum(user_id: str, model_digest: str, codebook_hash: str, history_hash: int, interests: bytes) -> int:
    header = f"{user_id}\0{model_digest}\0{codebook_hash}\0{history_hash}\0"
    return zlib.crc32(interests, zlib.crc32(header.encode()))


@dataclass(frozen=True, eq=False)
class Lookup:
    """What a look-up gives.

    Attributes:
        interests: Of the users whose entries may be used.
        row: Of each of these users, the index among the histories of `interests`.
        refused: Of each other user that has an entry, the reason; users without one are in neither.
    """

    interests: Interests
    row: Mapping[str, int]
    refused: Mapping[str, str]


def usable(ctr: CtrModel, entries: Iterable[Entry], history_hashes: Mapping[str, int] | None = None) -> Lookup:
    """The interests in `entries` that this model may use; with `history_hashes` by user, stale ones are refused too."""
    good: list[Entry] = []
    refused: dict[str, str] = {}
    for entry in entries:
        problem = entry.problem(ctr, None if history_hashes is None else history_hashes.get(entry.user_id))
        if problem is None:
            good.append(entry)
        else:
            refused[entry.user_id] = problem
    content = b"".join(entry.interests for entry in good)
    flat = torch.from_numpy(np.frombuffer(content, "<f4").reshape(len(good), entry_bytes(ctr) // 4).copy())
    return Lookup(_unpacked(ctr, flat), {entry.user_id: number for number, entry in enumerate(good)}, refused)


def score(ctr: CtrModel, lookup: Lookup, users: Sequence[str], candidates: Items, features: Tensor) -> Tensor:
    """Probability of a click of candidates (n,) of these users (n,), each of which is in `lookup.row`."""
    history = torch.tensor([lookup.row[user] for user in users])
    with torch.inference_mode():
        logits = ctr.model.score(lookup.interests, history, candidates, features)
    return logits.sigmoid()


def compute(ctr: CtrModel, users: pa.Table) -> list[Entry]:
    """Entries of users: a table of user_id, behaviours as in `ctr_examples`, and history_hash."""
    entries = []
    for start in range(0, len(users), USERS_AT_ONCE):
        part = users.slice(start, USERS_AT_ONCE)
        batch = newest_batch(ctr, part)
        with torch.no_grad():
            interests, history = ctr.model.interests(batch)
        flat = _packed(interests)[history].numpy().astype("<f4")
        ids, hashes = part["user_id"].to_pylist(), part["history_hash"].to_pylist()
        entries += [Entry.of(ctr, *each) for each in zip(ids, hashes, map(np.ndarray.tobytes, flat), strict=True)]
    return entries


def newest_batch(ctr: CtrModel, users: pa.Table) -> UserBatch:
    """A batch with one impression per user, in order, which happens after all behaviours; its candidate is padding."""
    known = pc.list_value_length(users["behaviours"]).to_pylist()
    features = [0.0] * ctr.model.shape.features
    padding = {"item_id": "", "codes": [], "weights": [], "features": features}
    one = {**padding, "label": 0, "ts": 0, "split": "cache", "shown": 0}
    impressions = pa.array([[{**one, "known": length}] for length in known], pa.list_(IMPRESSION))
    table = pa.table({"user_id": users["user_id"], "behaviours": users["behaviours"], "impressions": impressions})
    return UserTable.of(table, "cache", ctr.inputs).batch(np.arange(len(users)))


def entry_bytes(ctr: CtrModel) -> int:
    """The size of an entry's `interests`."""
    return 4 * sum(shape.numel() for shape in ctr.interest_shapes)


def _tensors(interests: Interests) -> list[Tensor]:
    """Each of shape (N, Q, ...)"""
    return [getattr(interests, field.name) for field in fields(interests)]


def _packed(interests: Interests) -> Tensor:
    """(Q, values)"""
    return torch.cat([one.transpose(0, 1).flatten(1) for one in _tensors(interests)], dim=1)


def _unpacked(ctr: CtrModel, flat: Tensor) -> Interests:
    """(Q, values) -> the interests of Q histories"""
    parts = flat.split([shape.numel() for shape in ctr.interest_shapes], dim=1)
    shaped = (part.reshape(-1, *shape) for part, shape in zip(parts, ctr.interest_shapes, strict=True))
    return Interests(*(part.transpose(0, 1) for part in shaped))
