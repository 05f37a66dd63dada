"""Stands in for node/mirror/access.py where who reads is not the question."""

from __future__ import annotations

from node.oci.references import Locator
from protocol.errors import DeniedError


class Everybody:
    """Everybody may read everything."""

    async def admit(self, locator: Locator, reference: str, authorization: str) -> Locator:
        return locator

    def refused(self, locator: Locator) -> DeniedError:
        raise AssertionError(f"nobody was granted {locator}")
