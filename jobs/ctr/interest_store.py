"""The cache of interests in a server that speaks the Redis protocol, for look-ups in a fraction of a millisecond.

Entries stand under the warehouse and the model's digest, and a pointer names the model whose entries are complete.
Those of a new model are written beside the old ones, then the pointer moves in one command, then the old ones are
deleted: a reader sees one model or the other, and each entry says itself which one it is of. With the pointer stands
the content of the table that the entries are a copy of, so that the next writer knows whether to write all of them or
what has changed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from jobs.ctr.interest_cache import Entry

if TYPE_CHECKING:
    from redis import Redis

T = TypeVar("T")
AT_ONCE = 1000  # entries of a pipeline
HEADER = struct.Struct("<qIHH")  # history_hash, checksum, lengths of model digest and codebook hash


@dataclass(frozen=True)
class InterestStore:
    """The entries of a warehouse in a server. Other warehouses may use the same server.

    Attributes:
        warehouse_id: As in `warehouse.json` of the warehouse.
    """

    server: Redis
    warehouse_id: str

    @property
    def prefix(self) -> str:
        return f"sid:interests:{self.warehouse_id}"

    @property
    def pointer(self) -> str:
        return f"{self.prefix}:current"

    @property
    def content(self) -> str:
        return f"{self.prefix}:content"

    def key(self, model_digest: str, user: str) -> str:
        return f"{self.prefix}:{model_digest}:{user}"

    def write(self, model_digest: str, entries: Iterable[Entry]) -> int:
        """Write entries of a model; the number of them. Readers of another model do not see them before `switch`."""
        count = 0
        for part in _parts(entries):
            pipeline = self.server.pipeline(transaction=False)
            for entry in part:
                pipeline.set(self.key(model_digest, entry.user_id), _encode(entry))
            pipeline.execute()
            count += len(part)
        return count

    def delete(self, model_digest: str, users: Iterable[str]) -> None:
        """Delete the entries of these users under a model."""
        for part in _parts(users):
            self.server.unlink(*(self.key(model_digest, user) for user in part))

    def forget_content(self) -> None:
        """From the first entry written until `switch` the entries are a copy of nothing."""
        self.server.delete(self.content)

    def switch(self, model_digest: str, content: str) -> int:
        """Make the entries of this model, now a copy of `content`, the current ones and delete those of all others; the
        number of deleted ones.
        """
        self.server.mset({self.pointer: model_digest, self.content: content})
        kept = (self.pointer, self.content)
        keys = (key.decode() for key in self.server.scan_iter(f"{self.prefix}:*", count=AT_ONCE))
        old = (key for key in keys if key not in kept and not key.startswith(self.key(model_digest, "")))
        return sum(int(self.server.unlink(*part)) for part in _parts(old))

    def current(self) -> str | None:
        """Digest of the model whose entries readers use; None before the first `switch`."""
        digest = self.server.get(self.pointer)
        return digest.decode() if isinstance(digest, bytes) else None

    def holds(self, model_digest: str, content: str, entries: int) -> bool:
        """Whether the current entries are all `entries` of this model, a copy of `content`; their keys are counted."""
        if self.server.mget([self.pointer, self.content]) != [model_digest.encode(), content.encode()]:
            return False
        return sum(1 for _ in self.server.scan_iter(self.key(model_digest, "*"), count=AT_ONCE)) == entries

    def read(self, model_digest: str, users: Sequence[str]) -> Iterator[Entry]:
        """The entries of these users under a model, as they are: `interest_cache.usable` checks them."""
        values: Any = self.server.mget([self.key(model_digest, user) for user in users]) if users else []
        for user, value in zip(users, values, strict=True):
            if value is not None:
                yield _decode(user, value)


def _parts(values: Iterable[T]) -> Iterator[list[T]]:
    """AT_ONCE of them at a time."""
    remaining = iter(values)
    while part := list(islice(remaining, AT_ONCE)):
        yield part


def _encode(entry: Entry) -> bytes:
    digest, codebook = entry.model_digest.encode(), entry.codebook_hash.encode()
    header = HEADER.pack(entry.history_hash, entry.checksum, len(digest), len(codebook))
    return header + digest + codebook + entry.interests


def _decode(user: str, value: bytes) -> Entry:
    """A value that is cut gives an entry with a wrong checksum, not an exception."""
    header = value[: HEADER.size].ljust(HEADER.size, b"\0")
    history_hash, checksum, digest, codebook = HEADER.unpack(header)
    rest = value[HEADER.size :]
    texts = (rest[:digest], rest[digest : digest + codebook])
    names = [text.decode("ascii", errors="replace") for text in texts]
    return Entry(user, names[0], names[1], history_hash, rest[digest + codebook :], checksum)
