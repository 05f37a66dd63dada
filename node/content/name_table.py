"""The names that this node learned, in SQLite, for use after a restart and while the registry is out of reach.

A row is the last answer for a tag or digest: a descriptor, and when the registry confirmed it. The rows used last are
also in memory, with the source of the answer, which is not stored.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from cachetools import LRUCache

from node.oci.manifests import Resolved
from node.oci.references import Locator
from node.runtime.sqlite import Database
from protocol.errors import BadInputError
from protocol.ids import Digest, ObjectRef

log = logging.getLogger(__name__)

REGISTRY = "registry"
MAX_RECENT = 4096
"""Names that are answered without SQLite."""
_MAX_ROWS = 100_000
_TRIMMED = 4096
"""Rows that one `trim` deletes, 50 ms. It is called every 30 s."""
_COLUMNS = "digest, size, media_type, confirmed"
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS name (source TEXT, reference TEXT, digest TEXT NOT NULL, size INTEGER NOT NULL,"
    " media_type TEXT NOT NULL, confirmed REAL NOT NULL, PRIMARY KEY (source, reference)) WITHOUT ROWID;"
)

Key = tuple[str, str]
"""A locator as text, and a reference."""


@dataclass(frozen=True, slots=True)
class KnownTag:
    """`told_by` is REGISTRY, a member's peer id, or "" for an answer that was read from disk."""

    locator: Locator
    tag: str
    resolved: Resolved
    told_by: str


class NameTable:
    def __init__(
        self,
        path: Path,
        clock: Callable[[], float] = time.time,
        *,
        pinned: Callable[[Digest], bool] = lambda digest: False,
    ) -> None:
        """`clock` returns Unix time, because rows outlive the process."""
        self._clock, self._pinned = clock, pinned
        self._recent: LRUCache[Key, tuple[Resolved, float, str]] = LRUCache(MAX_RECENT)
        """With the time of the registry's confirmation, and `told_by`."""
        self._database = Database(path, _SCHEMA)

    def close(self) -> None:
        self._database.close()

    def get(self, source: str, reference: str) -> Resolved | None:
        recent = self._recent.get((source, reference))
        if recent is None:
            rows = self._database.run(
                f"SELECT {_COLUMNS} FROM name WHERE source = ? AND reference = ?", (source, reference)
            )
            if not rows or (resolved := self._resolved(*rows[0])) is None:
                return None
            recent = self._recent[source, reference] = resolved, rows[0][3], ""
        return replace(recent[0], age_s=self._age(recent[1]))

    def put(self, source: str, reference: str, resolved: Resolved, told_by: str = "") -> None:
        self._recent[source, reference] = resolved, self._clock() - resolved.age_s, told_by
        row = self._row(source, reference, resolved)
        self._database.run("INSERT OR REPLACE INTO name VALUES (?, ?, ?, ?, ?, ?)", row)

    def drop(self, source: str, reference: str) -> None:
        self._recent.pop((source, reference), None)
        self._database.run("DELETE FROM name WHERE source = ? AND reference = ?", (source, reference))

    def put_many(self, source: str, objects: list[Resolved]) -> None:
        """Objects by their digests; existing rows are not changed."""
        rows = [self._row(source, str(resolved.ref.digest), resolved) for resolved in objects]
        self._database.run("INSERT OR IGNORE INTO name VALUES (?, ?, ?, ?, ?, ?)", *rows)

    def images(self) -> list[tuple[str, str, Resolved]]:
        """(source, reference, descriptor) of manifests, the newest first."""
        return self._listed("", ())

    def tags(self, pattern: str) -> list[KnownTag]:
        """The tags whose `upstream/repository:tag` fits an SQLite GLOB, the latest confirmed first."""
        of_tags = " AND instr(reference, ':') = 0 AND replace(source, '#manifests', ':') || reference GLOB ?"
        rows = self._listed(of_tags, (pattern,))
        return [KnownTag(Locator.parse(source), tag, ref, self.told_by(source, tag)) for source, tag, ref in rows]

    def _listed(self, condition: str, values: tuple[str, ...]) -> list[tuple[str, str, Resolved]]:
        rows = self._database.run(
            f"SELECT source, reference, {_COLUMNS} FROM name WHERE source LIKE '%#manifests'{condition}"
            " ORDER BY confirmed DESC LIMIT 1000",
            values,
        )
        listed = ((source, reference, self._resolved(*columns)) for source, reference, *columns in rows)
        return [(source, reference, resolved) for source, reference, resolved in listed if resolved is not None]

    def told_by(self, source: str, reference: str) -> str:
        recent = self._recent.get((source, reference))
        return recent[2] if recent else ""

    def trim(self) -> None:
        """Delete rows beyond _MAX_ROWS: first the digests and then the tags that were confirmed longest ago, but none
        of a pinned object. The digests that manifests name are many, and must not push out tags."""
        rows = self._database.run(
            "SELECT source, reference, digest FROM name ORDER BY instr(reference, ':') = 0, confirmed"
            " LIMIT min(?, max(0, (SELECT count(*) FROM name) - ?))",
            (_TRIMMED, _MAX_ROWS),
        )
        kept = [(source, reference) for source, reference, digest in rows if self._is_pinned(digest)]
        deleted = [(source, reference) for source, reference, digest in rows if not self._is_pinned(digest)]
        self._database.run("DELETE FROM name WHERE source = ? AND reference = ?", *deleted)
        # They would be the oldest at the next call again. Digests do not age; a pinned tag is served at any age.
        now = self._clock()
        self._database.run(
            "UPDATE name SET confirmed = ? WHERE source = ? AND reference = ? AND instr(reference, ':') > 0",
            *((now, *key) for key in kept),
        )
        for key in deleted:
            self._recent.pop(key, None)

    def _is_pinned(self, digest: str) -> bool:
        try:
            return self._pinned(Digest.parse(digest))
        except BadInputError:
            return False

    def _row(self, source: str, reference: str, resolved: Resolved) -> tuple[object, ...]:
        ref, confirmed = resolved.ref, self._clock() - resolved.age_s
        return source, reference, str(ref.digest), ref.size, resolved.media_type, confirmed

    def _resolved(self, digest: str, size: int, media_type: str, confirmed: float) -> Resolved | None:
        """None for a row that the disk altered: the name then counts as unknown."""
        try:
            return Resolved(ObjectRef(Digest.parse(digest), size), media_type, self._age(confirmed))
        except BadInputError as error:
            log.warning("a remembered name is damaged: %s", error)
            return None

    def _age(self, confirmed: float) -> float:
        # A clock that was set back makes the age unknown: the name is asked for again as soon as possible.
        age = self._clock() - confirmed
        return age if age >= 0 else 1e9
