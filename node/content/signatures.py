"""The library for clients: a tag that needs a signature is answered only with an image that has one.

`[[tags]] verify` names public keys (node/oci/signatures.py has the formats). The signatures are objects of the registry
like any others: they come through the site, are held for an outage, and prove themselves, whoever sent them. So in an
outage one member's word for such a tag is enough. What was verified once is remembered across restarts, by key.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import BinaryIO

import trio
from cachetools import TTLCache

from node.config.schema import TagsPart
from node.content.image_walk import read_manifest
from node.content.library import SiteLibrary
from node.oci.manifests import MAX_MANIFEST, UNTYPED, Resolved
from node.oci.references import Locator, is_digest
from node.oci.signatures import (
    MAX_KEY_FILE,
    Carried,
    VerifyKey,
    bundles,
    carried,
    is_accessory,
    signature_tag,
    signs,
)
from node.registry.calls import Passed
from node.runtime.sqlite import Database
from protocol.errors import BadInputError, NotFoundError, ShoalError, UnavailableError, UnsignedError
from protocol.ids import Buffer, Digest, ObjectRef

log = logging.getLogger(__name__)

REFUSED_S = 10.0
"""Time for which an image without a signature is refused without another look: somebody may just be signing it."""
MAX_REFUSED = 1024
MAX_VERIFIED = 10_000
"""Images that are remembered as verified; those verified longest ago are verified again."""
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS verified (repository TEXT, digest TEXT, key TEXT, at REAL NOT NULL,"
    " PRIMARY KEY (repository, digest, key)) WITHOUT ROWID;"
)

Referrers = Callable[[Locator, Digest, Mapping[str, str]], Awaitable[Passed]]
"""`Listings.referrers`."""


def load_keys(rules: Iterable[TagsPart]) -> Mapping[str, VerifyKey]:
    """The public keys that the rules name, by path. Raises BadInputError naming the rule and the file."""
    keys: dict[str, VerifyKey] = {}
    for rule in rules:
        for path in rule.keys:
            try:
                with Path(path).open("rb") as file:
                    keys[path] = VerifyKey.parse(file.read(MAX_KEY_FILE))
            except OSError as error:
                reason = error.strerror or "cannot be read"
                raise BadInputError(f'tags "{rule.match[:200]}": verify = "{path}": {reason}') from error
            except BadInputError as error:
                raise BadInputError(f'tags "{rule.match[:200]}": verify = "{path}": {error}') from error
    return keys


class Verified:
    """The images whose signatures were verified, in SQLite: by repository, digest, and fingerprint of the key."""

    def __init__(self, path: Path) -> None:
        self._database = Database(path, _SCHEMA)

    def close(self) -> None:
        self._database.close()

    def has(self, repository: str, digest: Digest, keys: Iterable[VerifyKey]) -> bool:
        select = "SELECT 1 FROM verified WHERE repository = ? AND digest = ? AND key = ?"
        return bool(self._database.run(select, *((repository, str(digest), key.fingerprint) for key in keys)))

    def note(self, repository: str, digest: Digest, key: VerifyKey) -> None:
        row = repository, str(digest), key.fingerprint, time.time()
        self._database.run("INSERT OR REPLACE INTO verified VALUES (?, ?, ?, ?)", row)
        self._database.run(
            "DELETE FROM verified WHERE at < (SELECT at FROM verified ORDER BY at DESC LIMIT 1 OFFSET ?)",
            (MAX_VERIFIED - 1,),
        )


class SignedLibrary:
    """Implements `Library`. `keys`: all public keys of the configuration, by path; a reload replaces them together with
    the policies."""

    def __init__(
        self, library: SiteLibrary, referrers: Referrers, keys: Mapping[str, VerifyKey], verified: Verified
    ) -> None:
        self._library, self._referrers, self.keys, self._verified = library, referrers, keys, verified
        self._refused: TTLCache[tuple[str, Digest, tuple[VerifyKey, ...]], bool] = TTLCache(
            MAX_REFUSED, REFUSED_S, timer=trio.current_time
        )

    async def resolve(self, locator: Locator, reference: str) -> Resolved:
        keys = self._keys_for(locator, reference)
        if not keys:
            return await self._library.resolve(locator, reference)
        check = partial(self._check, locator, reference, keys)
        resolved = await self._library.resolve(locator, reference, check)
        await check(resolved)
        return resolved

    def read(
        self, locator: Locator, ref: ObjectRef, start: int, stop: int, *more: tuple[int, int]
    ) -> AsyncGenerator[Buffer, None]:
        return self._library.read(locator, ref, start, stop, *more)

    async def sized(self, locator: Locator, resolved: Resolved) -> Resolved:
        return await self._library.sized(locator, resolved)

    def holds_sealed(self, locator: Locator, ref: ObjectRef) -> bool:
        return self._library.holds_sealed(locator, ref)

    def sealed(self, ref: ObjectRef, start: int, stop: int) -> BinaryIO | None:
        return self._library.sealed(ref, start, stop)

    def _keys_for(self, locator: Locator, reference: str) -> Mapping[str, VerifyKey]:
        if is_digest(reference) or locator.kind == "blobs" or is_accessory(reference):
            return {}
        policy = self._library.resolver.known.policies.of(locator, reference)
        return {path: self.keys[path] for path in policy.verify}

    async def _check(
        self, locator: Locator, reference: str, wanted: Mapping[str, VerifyKey], resolved: Resolved
    ) -> None:
        """Raises UnsignedError if the image has no signature by one of the keys, and UnavailableError if its signatures
        cannot be had now."""
        digest, keys = resolved.ref.digest, tuple(wanted.values())
        repository = f"{locator.upstream}/{locator.repository}"
        if self._verified.has(repository, digest, keys):
            return
        unsigned = UnsignedError(
            f"{repository}:{reference} is {digest}, which has no signature by a key in {', '.join(wanted)}"
        )
        if (repository, digest, keys) in self._refused:
            raise unsigned
        missing: UnavailableError | None = None
        for look in (self._simple_signer, self._bundle_signer):
            try:
                signer = await look(locator, digest, keys)
            except UnavailableError as error:
                missing = error
                continue
            if signer is not None:
                self._verified.note(repository, digest, signer)
                return
        if missing is not None:
            raise UnavailableError(f"the signatures of {repository}:{reference} ({digest}): {missing}") from missing
        self._refused[repository, digest, keys] = True
        log.warning("%s", unsigned)
        raise unsigned

    async def _simple_signer(self, locator: Locator, digest: Digest, keys: Sequence[VerifyKey]) -> VerifyKey | None:
        """The key that made a signature at the image's signature tag, if there is one."""
        signers: list[VerifyKey] = []

        async def find(signatures: Resolved) -> None:
            signer = await self._signer(locator, signatures, digest, keys)
            if signer is None:
                raise UnsignedError(f"no signature of {digest} in {signatures.ref.digest}")
            signers.append(signer)

        try:
            signatures = await self._library.resolve(locator, signature_tag(digest), find)
            if not signers:
                await find(signatures)
        except (NotFoundError, UnsignedError) as error:
            log.debug("%s", error)
        return signers[0] if signers else None

    async def _bundle_signer(self, locator: Locator, digest: Digest, keys: Sequence[VerifyKey]) -> VerifyKey | None:
        """The key that made a signature in a bundle that refers to the image, if there is one."""
        try:
            listed = await self._referrers(locator, digest, {})
        except NotFoundError:
            return None
        failure: ShoalError | None = None
        for ref in bundles(listed.body, MAX_MANIFEST):
            try:
                signer = await self._signer(locator, Resolved(ref, UNTYPED), digest, keys)
            except ShoalError as error:
                failure = error
                continue
            if signer is not None:
                return signer
        if failure is not None:
            raise UnavailableError(str(failure)) from failure
        return None

    async def _signer(
        self, locator: Locator, manifest: Resolved, digest: Digest, keys: Sequence[VerifyKey]
    ) -> VerifyKey | None:
        """The key that made one of the signatures in a manifest. A signature that cannot be read may be another one
        than that which is looked for, so its error is raised only if no other one fits."""
        failure: ShoalError | None = None
        for carrier in carried(await read_manifest(self._library, locator, manifest)):
            try:
                document = await self._document(locator.of_kind("blobs"), carrier)
            except ShoalError as error:
                failure = error
                continue
            for key in keys:
                if signs(document, carrier, digest, [key]):
                    return key
        if failure is not None:
            raise UnavailableError(str(failure)) from failure
        return None

    async def _document(self, locator: Locator, carrier: Carried) -> bytes:
        async with aclosing(self._library.read(locator, carrier.ref, 0, carrier.ref.size)) as chunks:
            return b"".join([bytes(chunk) async for chunk in chunks])
