"""What this node knows of objects beside their bytes: the verified size of each, and how its bytes came to the site.

An object's *origin* is the repository through which a registry gave it to a client with a grant, or to this node with
its own credentials: the first 16 bytes of the SHA-256 of `upstream/repository`. It is passed on with blocks and shards,
so that each node that holds a part of a private object knows that it is private (node/mirror/object_access.py). An
object that a registry gave without credentials is open. An object without a fact is of unknown origin.

A digest's size, once all of its bytes were verified, never changes. Every other size is a claim.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from cachetools import LRUCache

from node.oci.references import Locator, canonical
from node.runtime.sqlite import Database
from protocol.ids import Digest, ObjectRef

OPEN = b""
"""As a member sends it, or as the operator's archive implies: a mark by another member counts more."""
SEEN_OPEN = b"\x01"
"""A registry gave the object to this node without credentials: no member's mark counts more. Never sent."""
UNKNOWN = bytes(16)
"""As a member sends it that does not know the origin. The SHA-256 of no text begins with it."""
MAX_FACTS = 1 << 18
"""Objects, as many as the disk holds pieces. Objects that no tier holds are forgotten first."""
MAX_RECENT = 4096
"""Facts that are answered without SQLite, about 0.4 KiB each."""
MAX_LINKS = 1 << 16
"""Confirmed pairs of a repository and an object. A link costs 150 bytes of disk; a lost one costs a question."""
FORGOTTEN_AT_ONCE = 256
"""Objects that are looked at for one that can be forgotten: 2 ms in one turn of the loop."""
NOTED_S = 60.0
"""A link that is younger is not written again."""
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS object (number INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, origin BLOB,"
    " size INTEGER);"
    "CREATE TABLE IF NOT EXISTS link (number INTEGER PRIMARY KEY, origin BLOB NOT NULL, digest TEXT NOT NULL,"
    " seen REAL NOT NULL, UNIQUE (origin, digest));"
)


@dataclass(frozen=True, slots=True)
class _Fact:
    origin: bytes | None = None
    size: int | None = None


def origin_of(locator: Locator) -> bytes:
    return sha256(f"{canonical(locator.upstream)}/{locator.repository}".encode()).digest()[:16]


class ObjectFacts:
    """`path` None: kept until the node stops. `holds`: whether a tier of this node holds a part of an object."""

    def __init__(self, path: Path | None = None, holds: Callable[[Digest], bool] = lambda digest: False) -> None:
        self._holds = holds
        self._recent: LRUCache[Digest, _Fact] = LRUCache(MAX_RECENT)
        self._database = Database(path or Path(":memory:"), _SCHEMA)
        self._count = sum(count for (count,) in self._database.run("SELECT count(*) FROM object", ()))
        self._looked_at = 0

    def close(self) -> None:
        self._database.close()

    # How an object came

    def origin(self, digest: Digest) -> bytes:
        """16 bytes, OPEN or UNKNOWN, as it is sent to members."""
        origin = self._get(digest).origin
        return UNKNOWN if origin is None else OPEN if origin == SEEN_OPEN else origin

    def arrived(self, digest: Digest, origin: bytes) -> None:
        """A part of the object came from a member with this origin. A mark is never lost by it."""
        before = self._get(digest).origin
        is_news = before is None or (before == OPEN and origin != OPEN)
        if is_news and origin != UNKNOWN:
            self._put(digest, origin=origin)

    def granted(self, digest: Digest, locator: Locator) -> None:
        """A registry gives the object to a client with a grant, or to this node with its own credentials."""
        self.arrived(digest, origin_of(locator))

    def given_to_all(self, digest: Digest) -> None:
        """A registry gave a part of the object to this node without credentials."""
        if self._get(digest).origin in (None, OPEN):
            self._put(digest, origin=SEEN_OPEN)

    # Which repositories have it

    def confirmed(self, digest: Digest, locator: Locator) -> None:
        """The registry gives the object to a client through the locator's repository."""
        origin, now = origin_of(locator), time.time()
        if self._get(digest).origin is None:
            self._put(digest, origin=origin)
        age_s = self.confirmed_age_s(digest, locator)
        if age_s is None or age_s > NOTED_S:
            row = origin, str(digest), now
            self._database.run("INSERT OR REPLACE INTO link (origin, digest, seen) VALUES (?, ?, ?)", row)
            self._database.run("DELETE FROM link WHERE number <= (SELECT max(number) FROM link) - ?", (MAX_LINKS,))

    def confirmed_age_s(self, digest: Digest, locator: Locator) -> float | None:
        """Seconds since the registry confirmed it; None if it did not, also after the clock was set back."""
        key = origin_of(locator), str(digest)
        rows = self._database.run("SELECT seen FROM link WHERE origin = ? AND digest = ?", key)
        age_s = time.time() - rows[0][0] if rows else -1.0
        return age_s if age_s >= 0 else None

    # How large it is

    def size(self, digest: Digest) -> int | None:
        """The verified size; None if this node never verified the object."""
        return self._get(digest).size

    def true(self, ref: ObjectRef) -> ObjectRef:
        """With the verified size, if there is one."""
        size = self.size(ref.digest)
        return ref if size is None else ObjectRef(ref.digest, size)

    def contradicts(self, ref: ObjectRef) -> bool:
        """Whether the object is known to have another size."""
        return self.true(ref) != ref

    def verified(self, ref: ObjectRef) -> None:
        """All bytes of the object were just compared with its digest."""
        if self.size(ref.digest) != ref.size:
            self._put(ref.digest, size=ref.size)

    def _get(self, digest: Digest) -> _Fact:
        fact = self._recent.get(digest)
        if fact is None:
            rows = self._database.run("SELECT origin, size FROM object WHERE digest = ?", (str(digest),))
            fact = self._recent[digest] = _Fact(*rows[0]) if rows else _Fact()
        return fact

    def _put(self, digest: Digest, *, origin: bytes | None = None, size: int | None = None) -> None:
        before = self._get(digest)
        fact = _Fact(before.origin if origin is None else origin, before.size if size is None else size)
        if before == _Fact():
            self._make_room()
            self._count += 1
        self._recent[digest] = fact
        statement = (
            "INSERT INTO object (digest, origin, size) VALUES (?, ?, ?)"
            " ON CONFLICT (digest) DO UPDATE SET origin = excluded.origin, size = excluded.size"
        )
        self._database.run(statement, (str(digest), fact.origin, fact.size))

    def _make_room(self) -> None:
        """Forget the oldest objects that no tier holds. Of objects that are held, no fact is lost: the table is as
        large as the disk's, and while it is full of them, others stay of unknown origin after a restart."""
        if self._count < MAX_FACTS:
            return
        rows = self._database.run(
            "SELECT number, digest FROM object WHERE number > ? ORDER BY number LIMIT ?",
            (self._looked_at, FORGOTTEN_AT_ONCE),
        )
        self._looked_at = rows[-1][0] if len(rows) == FORGOTTEN_AT_ONCE else 0
        for number, text in rows:
            digest = Digest.parse(text)
            if not self._holds(digest):
                self._database.run("DELETE FROM object WHERE number = ?", (number,))
                self._recent.pop(digest, None)
                self._count -= 1
