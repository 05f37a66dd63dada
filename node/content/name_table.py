"""Tags and digests that are remembered across restarts, in SQLite."""

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


_MAX_ROWS = 100_000


_MAX_RECENT = 4096
"""Names that are answered without SQLite."""


_COLUMNS = "digest, size, media_type, confirmed"


_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS name (source TEXT, reference TEXT, digest TEXT NOT NULL, size INTEGER NOT NULL,"
    " media_type TEXT NOT NULL, confirmed REAL NOT NULL, PRIMARY KEY (source, reference)) WITHOUT ROWID;"
)


_Key = tuple[str, str]
"""A locator as text, and a reference."""


@dataclass(frozen=True, slots=True)
class KnownTag:
    """`told_by` is REGISTRY, a member's peer id, or "" for what was only remembered on disk."""

    locator: Locator
    tag: str
    resolved: Resolved
    told_by: str


class NameTable:
    """Names that this node learnt, in SQLite: they outlive a restart, and a registry that is gone."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """`clock` gives Unix time: what is remembered is older than this process."""
        self._clock = clock
        self._recent: LRUCache[_Key, tuple[Resolved, float, str]] = LRUCache(_MAX_RECENT)
        """With the time at which the registry confirmed it, and who told."""
        self._database = Database(path, _SCHEMA)

    def close(self) -> None:
        self._database.close()

    def get(self, source: str, reference: str) -> Resolved | None:
        known = self._recent.get((source, reference))
        if known is None:
            rows = self._database.run(
                f"SELECT {_COLUMNS} FROM name WHERE source = ? AND reference = ?", (source, reference)
            )
            found = self._resolved(*rows[0]) if rows else None
            if found is None:
                return None
            known = self._recent[source, reference] = found, rows[0][3], ""
        return replace(known[0], age_s=self._age(known[1]))

    def put(self, source: str, reference: str, resolved: Resolved, told_by: str = "") -> None:
        self._recent[source, reference] = resolved, self._clock() - resolved.age_s, told_by
        row = self._row(source, reference, resolved)
        self._database.run("INSERT OR REPLACE INTO name VALUES (?, ?, ?, ?, ?, ?)", row)

    def drop(self, source: str, reference: str) -> None:
        self._recent.pop((source, reference), None)
        self._database.run("DELETE FROM name WHERE source = ? AND reference = ?", (source, reference))

    def put_many(self, source: str, found: list[Resolved]) -> None:
        """Digests stand for themselves; known ones are kept as they are."""
        rows = [self._row(source, str(one.ref.digest), one) for one in found]
        self._database.run("INSERT OR IGNORE INTO name VALUES (?, ?, ?, ?, ?, ?)", *rows)

    def images(self) -> list[tuple[str, str, Resolved]]:
        """(source, reference, what it stands for) of manifests, the newest first."""
        rows = self._database.run(
            f"SELECT source, reference, {_COLUMNS} FROM name"
            " WHERE source LIKE '%#manifests' ORDER BY confirmed DESC LIMIT 1000",
            (),
        )
        found = ((row[0], row[1], self._resolved(*row[2:])) for row in rows)
        return [(source, reference, one) for source, reference, one in found if one is not None]

    def tags(self, pattern: str) -> list[KnownTag]:
        """Those that an SQLite GLOB over `upstream/repository:tag` fits, the latest confirmed first."""
        rows = self._database.run(
            f"SELECT source, reference, {_COLUMNS} FROM name"
            " WHERE source LIKE '%#manifests' AND instr(reference, ':') = 0"
            " AND replace(source, '#manifests', ':') || reference GLOB ? ORDER BY confirmed DESC LIMIT 1000",
            (pattern,),
        )
        found = ((source, tag, self._resolved(*columns)) for source, tag, *columns in rows)
        return [
            KnownTag(Locator.parse(source), tag, one, self.told_by(source, tag))
            for source, tag, one in found
            if one is not None
        ]

    def told_by(self, source: str, reference: str) -> str:
        """As in KnownTag."""
        known = self._recent.get((source, reference))
        return known[2] if known else ""

    def trim(self) -> None:
        """Forget the names that were confirmed longest ago."""
        self._database.run(
            "DELETE FROM name WHERE confirmed < (SELECT confirmed FROM name ORDER BY confirmed DESC LIMIT 1 OFFSET ?)",
            (_MAX_ROWS,),
        )

    def _row(self, source: str, reference: str, one: Resolved) -> tuple[object, ...]:
        return source, reference, str(one.ref.digest), one.ref.size, one.media_type, self._clock() - one.age_s

    def _resolved(self, digest: str, size: int, media_type: str, confirmed: float) -> Resolved | None:
        """None where the disk altered it: what is unknown is asked for."""
        try:
            return Resolved(ObjectRef(Digest.parse(digest), size), media_type, self._age(confirmed))
        except BadInputError as error:
            log.warning("a remembered name is damaged: %s", error)
            return None

    def _age(self, confirmed: float) -> float:
        # A clock that was set back makes the age unknown: the name is asked for again as soon as can be.
        age = self._clock() - confirmed
        return age if age >= 0 else 1e9
