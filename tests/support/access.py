"""An access check that admits every client, for tests that are not about access (node/mirror/access.py)."""

from __future__ import annotations

from node.oci.references import Locator
from protocol.errors import DeniedError
from protocol.ids import Digest


class Everybody:
    async def admit(self, locator: Locator, reference: str, authorization: str) -> Locator:
        return locator

    async def check(self, locator: Locator, digest: Digest) -> None:
        pass

    def refused(self, locator: Locator) -> DeniedError:
        raise AssertionError(f"{locator} needs no credentials in this test")
