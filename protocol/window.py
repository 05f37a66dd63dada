"""How many blocks a node has under way for its clients at a time.

The more there are, the better every link is used; but on a slow uplink they share it, and all of them come late: of 16
blocks on 10 Mbit/s the first one takes 13 s. So the window grows with every block that came in time and shrinks with
every one that did not, between bounds (additive increase and decrease, as TCP Vegas: Brakmo and Peterson, 1995).
"""

from __future__ import annotations

LEAST = 3
"""At first, too: the sooner a block is there, the sooner the site has something to share. It keeps a slow uplink busy;
with twice as many, ten nodes on 10 Mbit/s waited 25 s for a block."""
MOST = 16
"""Enough for four peers at wire speed; also the bound of the memory that reads take."""
TARGET_S = 4.0


class ReadWindow:
    """Shared by all clients of a node. Beside it each may have one block under way."""

    def __init__(self) -> None:
        self._size = LEAST
        self._readers = 0
        self._under_way = 0

    def entered(self) -> None:
        """A client begins to read."""
        self._readers += 1

    def left(self) -> None:
        self._readers -= 1

    def has_room(self, own: int) -> bool:
        """Whether a client with `own` blocks under way may ask for another: an equal share for each."""
        return self._under_way < self._size and own < -(-self._size // max(1, self._readers))

    def began(self) -> None:
        self._under_way += 1

    def ended(self) -> None:
        """The client has taken the block, or given it up."""
        self._under_way -= 1

    def came(self, seconds: float) -> None:
        """A block took so long."""
        if seconds < TARGET_S:
            self._size = min(MOST, self._size + 1)
        else:
            self._size = max(LEAST, self._size - 1)
