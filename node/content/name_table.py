"""The names that this node learned, in SQLite, for use after a restart and while the registry is out of reach.

A row is the last answer for a tag or digest: a descriptor, when it was confirmed, and by whom. Only this node's own
answers are stored: those of the registry, of an import, and what a manifest says of the objects that it names. Answers
of other members are never stored, so that a node can tell others only what it did not hear from others. The rows used
last are also in memory.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cachetools import LRUCache

from node.oci.manifests import Resolved
from node.oci.references import Locator
from node.runtime.sqlite import Database
from protocol.errors import BadInputError
from protocol.ids import Digest, ObjectRef, PeerId

log = logging.getLogger(__name__)

Origin = Literal["registry", "import", "manifest"]
"""Who gave a stored answer: the registry to this node, this node's operator, or a manifest that names the object."""
MAX_RECENT = 2048
"""Names that are answered without SQLite."""
_MAX_ROWS = 100_000
_TRIMMED = 4096
"""Rows that one `trim` deletes, 50 ms. It is called every 30 s."""
_COLUMNS = "digest, size, media_type, confirmed"
_FORMER = (
    "(source TEXT, reference TEXT, digest TEXT NOT NULL, size INTEGER NOT NULL, media_type TEXT NOT NULL,"
    " confirmed REAL NOT NULL, PRIMARY KEY (source, reference)) WITHOUT ROWID;"
)
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS answer (source TEXT, reference TEXT, digest TEXT NOT NULL, size INTEGER NOT NULL,"
    " media_type TEXT NOT NULL, confirmed REAL NOT NULL, origin TEXT NOT NULL, PRIMARY KEY (source, reference))"
    " WITHOUT ROWID;"
    # The former table does not say who gave an answer. Its tags may be another member's, so only its digests are kept.
    f"CREATE TABLE IF NOT EXISTS name {_FORMER}"
    f"INSERT OR IGNORE INTO answer SELECT source, reference, {_COLUMNS}, 'manifest' FROM name"
    " WHERE instr(reference, ':') > 0;"
    "DROP TABLE name;"
)

Key = tuple[str, str]
"""A locator as text, and a reference."""


@dataclass(frozen=True, slots=True)
class KnownTag:
    """`origin` is "members" for an answer on which the members in `told_by` agree."""

    locator: Locator
    tag: str
    resolved: Resolved
    origin: Origin | Literal["members"]
    told_by: tuple[PeerId, ...] = ()


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
        self._recent: LRUCache[Key, tuple[Resolved, float, Origin]] = LRUCache(MAX_RECENT)
        """With the time of the confirmation, and who gave it."""
        self._database = Database(path, _SCHEMA)

    def close(self) -> None:
        self._database.close()

    def get(self, source: str, reference: str) -> Resolved | None:
        row = self._row(source, reference)
        return None if row is None else replace(row[0], age_s=self._age(row[1]))

    def origin(self, source: str, reference: str) -> Origin | None:
        row = self._row(source, reference)
        return None if row is None else row[2]

    def _row(self, source: str, reference: str) -> tuple[Resolved, float, Origin] | None:
        recent = self._recent.get((source, reference))
        if recent is None:
            rows = self._database.run(
                f"SELECT {_COLUMNS}, origin FROM answer WHERE source = ? AND reference = ?", (source, reference)
            )
            if not rows or (resolved := self._resolved(*rows[0][:4])) is None:
                return None
            recent = self._recent[source, reference] = resolved, rows[0][3], rows[0][4]
        return recent

    def put(self, source: str, reference: str, resolved: Resolved, origin: Origin = "registry") -> None:
        self._recent[source, reference] = resolved, self._clock() - resolved.age_s, origin
        row = self._columns(source, reference, resolved, origin)
        self._database.run("INSERT OR REPLACE INTO answer VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def drop(self, source: str, reference: str) -> None:
        self._recent.pop((source, reference), None)
        self._database.run("DELETE FROM answer WHERE source = ? AND reference = ?", (source, reference))

    def put_many(self, source: str, objects: list[Resolved]) -> None:
        """Objects that a manifest names by their digests; existing rows are not changed."""
        rows = [self._columns(source, str(resolved.ref.digest), resolved, "manifest") for resolved in objects]
        self._database.run("INSERT OR IGNORE INTO answer VALUES (?, ?, ?, ?, ?, ?, ?)", *rows)

    def images(self) -> list[tuple[str, str, Resolved]]:
        """(source, reference, descriptor) of manifests, the newest first."""
        return [row[:3] for row in self._listed("", ())]

    def tags(self, pattern: str) -> list[KnownTag]:
        """The tags whose `upstream/repository:tag` fits an SQLite GLOB, the latest confirmed first."""
        of_tags = " AND instr(reference, ':') = 0 AND replace(source, '#manifests', ':') || reference GLOB ?"
        rows = self._listed(of_tags, (pattern,))
        return [KnownTag(Locator.parse(source), tag, resolved, origin) for source, tag, resolved, origin in rows]

    def _listed(self, condition: str, values: tuple[str, ...]) -> list[tuple[str, str, Resolved, Origin]]:
        rows = self._database.run(
            f"SELECT source, reference, origin, {_COLUMNS} FROM answer WHERE source LIKE '%#manifests'{condition}"
            " ORDER BY confirmed DESC LIMIT 1000",
            values,
        )
        listed = ((source, tag, self._resolved(*columns), origin) for source, tag, origin, *columns in rows)
        return [(source, tag, resolved, origin) for source, tag, resolved, origin in listed if resolved is not None]

    def trim(self) -> None:
        """Delete rows beyond _MAX_ROWS: first the digests and then the tags that were confirmed longest ago, but none
        of a pinned object. The digests that manifests name are many, and must not push out tags."""
        rows = self._database.run(
            "SELECT source, reference, digest FROM answer ORDER BY instr(reference, ':') = 0, confirmed"
            " LIMIT min(?, max(0, (SELECT count(*) FROM answer) - ?))",
            (_TRIMMED, _MAX_ROWS),
        )
        kept = [(source, reference) for source, reference, digest in rows if self._is_pinned(digest)]
        deleted = [(source, reference) for source, reference, digest in rows if not self._is_pinned(digest)]
        self._database.run("DELETE FROM answer WHERE source = ? AND reference = ?", *deleted)
        # They would be the oldest at the next call again. Digests do not age; a pinned tag is served at any age.
        now = self._clock()
        self._database.run(
            "UPDATE answer SET confirmed = ? WHERE source = ? AND reference = ? AND instr(reference, ':') > 0",
            *((now, *key) for key in kept),
        )
        for key in deleted:
            self._recent.pop(key, None)

    def _is_pinned(self, digest: str) -> bool:
        try:
            return self._pinned(Digest.parse(digest))
        except BadInputError:
            return False

    def _columns(self, source: str, reference: str, resolved: Resolved, origin: Origin) -> tuple[object, ...]:
        ref, confirmed = resolved.ref, self._clock() - resolved.age_s
        return source, reference, str(ref.digest), ref.size, resolved.media_type, confirmed, origin

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
