"""The cache of interests in a server that speaks the Redis protocol, for look-ups in a fraction of a millisecond.

Entries of a model stand under its digest, and a pointer names the model whose entries are complete. Those of a new
model are written beside the old ones, then the pointer moves in one command, then the old ones are deleted: a reader
sees one model or the other, and each entry says itself which one it is of. With the pointer stands the content of the
table that the entries are a copy of, so that the next writer knows whether to write all of them or what has changed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from jobs.ctr.interest_cache import Entry

if TYPE_CHECKING:
    from redis import Redis

T = TypeVar("T")
PREFIX = "sid:interests"
POINTER, CONTENT = f"{PREFIX}:current", f"{PREFIX}:content"
AT_ONCE = 1000  # entries of a pipeline
HEADER = struct.Struct("<qIHH")  # history_hash, checksum, lengths of model digest and codebook hash


def write(server: Redis, model_digest: str, entries: Iterable[Entry]) -> int:
    """Write entries of a model; the number of them. Readers of another model do not see them before `switch`."""
    count = 0
    for part in _parts(entries):
        pipeline = server.pipeline(transaction=False)
        for entry in part:
            pipeline.set(_key(model_digest, entry.user_id), _encode(entry))
        pipeline.execute()
        count += len(part)
    return count


def forget_content(server: Redis) -> None:
    """From the first entry written until `switch` the entries are a copy of nothing."""
    server.delete(CONTENT)


def switch(server: Redis, model_digest: str, content: str) -> int:
    """Make the entries of this model, now a copy of `content`, the current ones and delete those of all others; the
    number of deleted ones.
    """
    server.mset({POINTER: model_digest, CONTENT: content})
    own = _key(model_digest, "")
    old = (key for key in server.scan_iter(f"{PREFIX}:*", count=AT_ONCE) if _is_old(key.decode(), own))
    return sum(int(server.unlink(*keys)) for keys in _parts(old))


def current(server: Redis) -> str | None:
    """Digest of the model whose entries readers use; None before the first `switch`."""
    digest = server.get(POINTER)
    return digest.decode() if isinstance(digest, bytes) else None


def holds(server: Redis, model_digest: str, content: str, entries: int) -> bool:
    """Whether the current entries are all `entries` of this model, a copy of `content`; counts them by their keys."""
    if server.mget([POINTER, CONTENT]) != [model_digest.encode(), content.encode()]:
        return False
    return sum(1 for _ in server.scan_iter(_key(model_digest, "*"), count=AT_ONCE)) == entries


def read(server: Redis, model_digest: str, users: Sequence[str]) -> Iterator[Entry]:
    """The entries of these users under a model, as they are: `interest_cache.usable` checks them."""
    values: Any = server.mget([_key(model_digest, user) for user in users]) if users else []
    for user, value in zip(users, values, strict=True):
        if value is not None:
            yield _decode(user, value)


def _parts(values: Iterable[T]) -> Iterator[list[T]]:
    """AT_ONCE of them at a time."""
    remaining = iter(values)
    while part := list(islice(remaining, AT_ONCE)):
        yield part


def _key(model_digest: str, user: str) -> str:
    return f"{PREFIX}:{model_digest}:{user}"


def _is_old(key: str, own: str) -> bool:
    return key not in (POINTER, CONTENT) and not key.startswith(own)


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
