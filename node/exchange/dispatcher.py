"""Routes requests of members: the type of a request names the part that answers it.

An exchange needs its handler when it is built, and the parts that answer need the exchange. The dispatcher is built
first and learns its routes while the node is assembled; the exchange does not listen before that.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from node.exchange.contract import Answer
from protocol.ids import PeerId
from protocol.messages import Failed, Request


class Dispatcher:
    """The handler of an exchange."""

    def __init__(self) -> None:
        self._handlers: dict[type, Callable[[PeerId, Any], Awaitable[Answer]]] = {}

    def route(self, handler: Callable[[PeerId, Any], Awaitable[Answer]], *requests: type) -> None:
        """Have `handler` answer these types of request."""
        self._handlers.update(dict.fromkeys(requests, handler))

    async def __call__(self, peer: PeerId, request: Request) -> Answer:
        handler = self._handlers.get(type(request))
        if handler is None:
            return Answer(Failed("bad-request", f"no part of this node answers {type(request).__name__}"))
        return await handler(peer, request)
