"""Log lines about refused peers, rate-limited: a refused peer usually tries again every few seconds."""

from __future__ import annotations

import logging

import trio
from cachetools import TTLCache

log = logging.getLogger(__name__)

SILENCE_S = 300.0
"""A repeated refusal is warned about again after this time."""
MAX_REMEMBERED = 1024
"""Refusals that are remembered, by channel, peer and reason."""


class Refusals:
    """Logs a refusal as a warning, but at level debug if it repeats within `silence_s` after the last warning."""

    def __init__(self, silence_s: float = SILENCE_S) -> None:
        self._warned: TTLCache[tuple[str, ...], None] = TTLCache(MAX_REMEMBERED, silence_s, timer=trio.current_time)

    def tell(self, channel: str, peer: str, address: str, reason: object) -> None:
        """`peer`: the peer id, or the host if no peer id is proven."""
        key = (channel, peer, str(reason))
        silent = key in self._warned
        if not silent:
            self._warned[key] = None
        level = logging.DEBUG if silent else logging.WARNING
        log.log(level, f"refused {peer} at {address}: {reason}", extra={"channel": channel})
