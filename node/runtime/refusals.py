"""Log lines about refused peers, at most one for each peer and period."""

from __future__ import annotations

import logging

import trio
from cachetools import TTLCache

log = logging.getLogger(__name__)


SILENCE_S = 300.0
"""The same refusal is told again after this time."""


_REMEMBERED = 1024


class Refusals:
    """One warning for who was refused on which channel and why; the same again within `SILENCE_S` at level debug."""

    def __init__(self, silence_s: float = SILENCE_S) -> None:
        self._told: TTLCache[tuple[str, ...], None] = TTLCache(_REMEMBERED, silence_s, timer=trio.current_time)

    def tell(self, channel: str, who: str, at: str, why: object) -> None:
        """`who`: the peer id, or, where none is proven, the host; `at`: where it was."""
        key = (channel, who, str(why))
        level = logging.DEBUG if key in self._told else logging.WARNING
        self._told[key] = None
        log.log(level, f"refused {who} at {at}: {why}", extra={"channel": channel})
