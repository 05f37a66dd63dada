"""Stands in for node/mirror/access.py in tests that are not about access."""

from __future__ import annotations

from node.oci.references import Locator
from protocol.errors import DeniedError


class Everybody:
    """Every client may read everything."""

    async def admit(self, locator: Locator, reference: str, authorization: str) -> Locator:
        return locator

    def refused(self, locator: Locator) -> DeniedError:
        raise AssertionError(f"no client was granted {locator}")
