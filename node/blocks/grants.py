"""The grants of this node's clients, for the private objects that these clients read now.

A grant (node/mirror/access.py) stays on the node whose client showed it. For other members that node is the blocks'
`reader` (docs/decisions/0006-private-images.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from node.blocks.values import Stretch
from node.oci.references import Locator
from protocol.ids import Digest


class Grants:
    def __init__(self) -> None:
        self._locators: dict[Digest, list[Locator]] = {}

    @contextmanager
    def granted(self, locator: Locator, digest: Digest) -> Iterator[None]:
        """Within the context, a client of this node reads the object with the locator's grant."""
        locators = self._locators.setdefault(digest, [])
        locators.append(locator)
        try:
            yield
        finally:
            locators.remove(locator)
            if not locators and self._locators.get(digest) is locators:
                del self._locators[digest]

    def as_own_client(self, stretch: Stretch) -> Stretch:
        """`stretch` with the grant of a local client that reads the same object, and so will need these blocks too."""
        for locator in reversed(self._locators.get(stretch.ref.digest, [])):
            if replace(locator, grant=None) == stretch.locator:
                return stretch._replace(locator=locator, reader="")
        return stretch
