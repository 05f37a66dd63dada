"""Lists of the registry: the tags of a repository, and the manifests that refer to an object.

Specification: OCI distribution 1.1, "Listing Tags", "Listing Referrers" and "Unavailable Referrers API". Registries
implement different parts of it, and the mirror adds the rest: pages and filters if the registry returns everything, the
referrers tag if there is no referrers API. Answers are kept on disk, for when the registry is out of reach.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlencode

import msgspec

from node.content.contract import Library
from node.content.image_walk import read_manifest
from node.oci.manifests import MAX_MANIFEST
from node.oci.references import Locator
from node.oci.strict_json import check_members, decode_strictly
from node.registry.calls import Passed
from node.runtime.sqlite import Database
from protocol.errors import UNDECODABLE, BadInputError, NotFoundError, UnavailableError
from protocol.ids import Digest

log = logging.getLogger(__name__)

FRESH_S = 10.0
"""A list is requested again after this time. It is short, because a tool that signs an image looks for the signature at
once."""
KEPT_BYTES = 32 << 20
"""Lists on disk, keys included; those that were confirmed longest ago are deleted first."""
INDEX = "application/vnd.oci.image.index.v1+json"
NO_REFERRERS = b'{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}'
_TAG_PART = 64
"""Characters of the digest's hex in a referrers tag."""
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS listing (key TEXT PRIMARY KEY, body BLOB NOT NULL, media_type TEXT NOT NULL,"
    " link TEXT NOT NULL, confirmed REAL NOT NULL, size INTEGER NOT NULL);"
)

_REPOSITORY = "substr(key, 1, max(instr(key, '/tags/list?'), instr(key, '/referrers/')))"
"""Of a row's key (`_key`)."""
_DELETE_BEYOND = (
    "DELETE FROM listing WHERE key IN (SELECT key FROM"
    " (SELECT key, SUM(size) OVER (ORDER BY depth, confirmed DESC, key) AS total FROM"
    f" (SELECT *, SUM(size) OVER (PARTITION BY {_REPOSITORY} ORDER BY confirmed DESC, key) AS depth FROM listing))"
    " WHERE total > ?)"
)
"""A client may list much of one repository: the rows with the most later bytes of their own repository go first."""

_T = TypeVar("_T", bound=msgspec.Struct)
Passthrough = Callable[[Locator, str, Mapping[str, str]], Awaitable[Passed]]
"""`Upstreams.passthrough`."""


class _Tags(msgspec.Struct):
    name: str
    tags: list[str] | None = None


class _Index(msgspec.Struct, rename="camel", omit_defaults=True):
    """An index whose descriptors are kept unparsed, byte for byte."""

    schema_version: int
    media_type: str
    manifests: list[msgspec.Raw]
    annotations: dict[str, str] = {}


class _Typed(msgspec.Struct, rename="camel"):
    artifact_type: str = ""


class Listings:
    """Lists of all upstreams, for clients that may read the repository. `tags` and `referrers` raise as
    `Upstreams.resolve`."""

    def __init__(self, passthrough: Passthrough, library: Library, path: Path, max_age_s: float) -> None:
        self._passthrough, self._library, self.max_age_s = passthrough, library, max_age_s
        self._database = Database(path, _SCHEMA)

    def close(self) -> None:
        self._database.close()

    async def tags(self, locator: Locator, query: Mapping[str, str]) -> Passed:
        """A page of the repository's tags; `n` and `last` are honoured even if the registry ignores them."""
        key = _key(locator, "tags/list", query)
        try:
            passed = await self._listed(key, lambda: self._passthrough(locator, "tags/list", query))
        except UnavailableError:
            whole = self._remembered(_key(locator, "tags/list", {}), self.max_age_s)
            if whole is None or whole.link:
                raise
            return page_of_tags(whole, query, whole=True)
        return page_of_tags(passed, query, whole=False)

    async def referrers(self, locator: Locator, digest: Digest, query: Mapping[str, str]) -> Passed:
        """An index of the manifests that refer to `digest`, empty if there are none. The registry is asked for all of
        them: one stored list then serves every `artifactType`."""
        rest = {name: value for name, value in query.items() if name != "artifactType"}
        key = _key(locator, f"referrers/{digest}", rest)
        passed = await self._listed(key, lambda: self._ask_referrers(locator, digest, rest))
        return referrers_of_type(passed, query["artifactType"]) if query.get("artifactType") else passed

    async def _ask_referrers(self, locator: Locator, digest: Digest, query: Mapping[str, str]) -> Passed:
        try:
            passed = await self._passthrough(locator, f"referrers/{digest}", query)
            if passed.media_type == INDEX:  # else it may be the page of a web interface
                return passed
        except NotFoundError:
            log.debug("%s has no referrers API", locator.upstream)
        return Passed(await self._tagged(locator, digest), INDEX)

    async def _tagged(self, locator: Locator, digest: Digest) -> bytes:
        try:
            index = await self._library.resolve(locator, f"{digest.algorithm}-{digest.hex[:_TAG_PART]}")
        except NotFoundError:
            return NO_REFERRERS
        if index.media_type != INDEX or index.ref.size > MAX_MANIFEST:
            return NO_REFERRERS
        return await read_manifest(self._library, locator, index)

    async def _listed(self, key: str, ask: Callable[[], Awaitable[Passed]]) -> Passed:
        fresh = self._remembered(key, FRESH_S)
        if fresh is not None:
            return fresh
        try:
            passed = await ask()
        except UnavailableError as error:
            stale = self._remembered(key, self.max_age_s)
            if stale is None:
                raise
            log.warning("%s is served from an earlier answer: %s", key[:300], error)
            return stale
        self._remember(key, passed)
        return passed

    def _remembered(self, key: str, age_s: float) -> Passed | None:
        now = time.time()
        rows = self._database.run(
            "SELECT body, media_type, link FROM listing WHERE key = ? AND confirmed BETWEEN ? AND ?",
            (key, now - age_s, now),
        )
        return Passed(*rows[0]) if rows else None

    def _remember(self, key: str, passed: Passed) -> None:
        size = len(key) + len(passed.body) + len(passed.link)
        row = (key, passed.body, passed.media_type, passed.link, time.time(), size)
        self._database.run("INSERT OR REPLACE INTO listing VALUES (?, ?, ?, ?, ?, ?)", row)
        self._database.run(_DELETE_BEYOND, (KEPT_BYTES,))


def _key(locator: Locator, tail: str, query: Mapping[str, str]) -> str:
    return f"{locator.upstream}/{locator.repository}/{tail}?{urlencode(sorted(query.items()))}"


def page_of_tags(passed: Passed, query: Mapping[str, str], *, whole: bool) -> Passed:
    """The requested page, sorted, if the answer holds all tags; else the unchanged answer. It holds all if `whole`, if
    it is a first page without a next one, or if its content shows that the query was ignored."""
    limit = int(query["n"]) if _is_count(query.get("n", "")) else None
    last = query.get("last", "")
    listed = _decoded(passed.body, _Tags)
    if listed is None or passed.link:
        return passed
    tags = listed.tags or []
    if not (whole or not query.keys() - {"n"} or last in tags or (limit is not None and len(tags) > limit)):
        return passed
    rest = sorted(tag for tag in tags if tag > last)
    page = rest if limit is None else rest[:limit]
    more = f'<?{urlencode({"n": limit, "last": page[-1]})}>; rel="next"' if page and len(page) < len(rest) else ""
    return Passed(msgspec.json.encode(_Tags(listed.name, page)), passed.media_type, more)


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def referrers_of_type(passed: Passed, artifact_type: str) -> Passed:
    index = _decoded(passed.body, _Index)
    if index is None:
        return passed
    index.manifests = [entry for entry in index.manifests if _decoded(entry, _Typed) == _Typed(artifact_type)]
    return replace(passed, body=msgspec.json.encode(index), filters="artifactType")


def _decoded(data: bytes | msgspec.Raw, kind: type[_T]) -> _T | None:
    """None for any other document, and for one that clients may read in another way (node/oci/strict_json.py): the
    caller then passes the answer on unchanged."""
    try:
        document = decode_strictly(bytes(data))
        decoded = msgspec.json.decode(data, type=kind)
        check_members(document, kind.__struct_encode_fields__)
    except (*UNDECODABLE, BadInputError):
        return None
    return decoded
