"""Log lines about refused peers, rate-limited: a refused peer usually tries again every few seconds."""

from __future__ import annotations

import logging

import trio
from cachetools import TTLCache

log = logging.getLogger(__name__)

SILENCE_S = 300.0
"""Shortest time between two warnings about the same refusal."""
MAX_REMEMBERED = 1024
"""Peers whose last warning is remembered."""


class Refusals:
    """Warns about each refusal by peer, channel and reason; logs it at level debug when it repeats in `silence_s`."""

    def __init__(self, silence_s: float = SILENCE_S) -> None:
        self._warned: TTLCache[tuple[str, ...], None] = TTLCache(MAX_REMEMBERED, silence_s, timer=trio.current_time)

    def tell(self, channel: str, peer: str, address: str, reason: object) -> None:
        """`peer`: the peer id, or the host where no peer id is proven."""
        key = (channel, peer, str(reason))
        level = logging.DEBUG if key in self._warned else logging.WARNING
        self._warned[key] = None
        log.log(level, f"refused {peer} at {address}: {reason}", extra={"channel": channel})
