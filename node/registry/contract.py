"""What node/blocks asks of the registries beside their bytes; `Upstreams` (node/registry/upstreams.py) gives it.

`NoNews` knows nothing: for a node without registries, and for tests.
"""

from __future__ import annotations

from typing import Protocol

from protocol.ways import ALWAYS_SITE, Choice, Ways


class RegistryNews(Protocol):
    """Only `is_open` raises NotFoundError for an unknown `upstream`.

    - `is_open`: whether everybody may read what the registry gives to this node without a client's grant.
    - `answers`: whether the registry answered this node lately, and has not failed since.
    - `told`: another member says that the registry answers.
    - `choose`: the way for a read of `length` bytes for a client of this node, one of the site's `nodes`.
    - `ways`: what both ways gave lately; the caller notes in it what the site gives.
    """

    def is_open(self, upstream: str) -> bool: ...

    def answers(self, upstream: str) -> bool: ...

    def told(self, upstream: str) -> None: ...

    def choose(self, upstream: str, length: int, nodes: int) -> Choice: ...

    def ways(self, upstream: str) -> Ways: ...


class NoNews:
    def is_open(self, upstream: str) -> bool:
        return True

    def answers(self, upstream: str) -> bool:
        return False

    def told(self, upstream: str) -> None:
        """There is no pause to end."""

    def choose(self, upstream: str, length: int, nodes: int) -> Choice:
        return ALWAYS_SITE

    def ways(self, upstream: str) -> Ways:
        return Ways()
