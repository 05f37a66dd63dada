"""The bulk channel's bounds in time, number and memory, each with its reason.

Bounds that tests vary are fields of `Timing` and `Limits`. Others are constants, here or beside the code using them.
"""

from __future__ import annotations

from dataclasses import dataclass

from node.exchange.keep_alive import WAITING_EVERY_S, WAITING_FIRST_S
from node.exchange.requests import REQUESTS_PER_CONNECTION

HEADS_RATE = 8 << 20
"""Bytes per second of one peer's requests longer than BATCH_BYTES (node/exchange/connection.py). Decoding one blocks
all other tasks, for 60 ms if it is a view of the largest size. Sites stay far below this rate."""
HANDSHAKES_PER_ADDRESS = 32
"""Handshakes in progress from one IP address: a single address must not take all of `Limits.handshakes`. A member opens
three connections at once."""
BACKLOG = 1024
"""Connections that the kernel completes before they are accepted: a whole site may connect when a node restarts."""
VIEWS = 4
"""Bodies that may wait on a connection as views of whole blocks. If more wait, the link is slower than this machine,
and further bodies are copied: a view of a part of a block keeps the whole block in memory."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds."""

    connect_s: float = 1.4
    """TCP connect, for each address of a member, within a site. A lost SYN is sent again after 1 s."""
    handshake_s: float = 3.0
    """TLS and hello. A small board needs a tenth of that for its signatures, even if many peers connect at once."""
    retry_s: float = 0.75
    """Pause before an unreachable member is dialled again: meanwhile requests to a dead member fail at once, and a
    member that has just started waits only briefly."""
    waiting_first_s: float = WAITING_FIRST_S
    waiting_every_s: float = WAITING_EVERY_S
    stall_s: float = 10.0
    """A connection is closed if its peer accepts no byte of a write for this time."""
    quiet_s: float = 5.0
    """A connection with open requests that received nothing for this time is dead: a live peer sends `Waiting`."""
    idle_s: float = 60.0
    """The asking side closes a connection without requests after this time, the answering side after 3 * `idle_s`."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on the resources of all peers together and of each peer. The last bounds this node's own requests."""

    connections: int = 4096
    """Incoming, and as many outgoing: three lanes for each node of a site of a thousand, and a reserve."""
    connections_per_peer: int = 6
    """One for each lane, and as many old ones that the new ones replace and that are not yet noticed as dead."""
    handshakes: int = 128
    """Incoming, in progress: each holds a socket and TLS state for a peer that has not yet proven its identity."""
    requests: int = 2048
    """In progress for all peers, in fair shares (node/exchange/fair_shares.py). A peer's connections allow a fifth."""
    requests_per_connection: int = REQUESTS_PER_CONNECTION
    answer_bytes: int = 64 << 20
    """Bodies that wait to be sent, in fair shares; beyond it the answer is `busy`. While no link accepts a byte, the
    reads of a site fill at most half of this on each node: every node reads MOST blocks (protocol/window.py) at once,
    spread evenly over all nodes. In a site of two nodes, the other node may have exactly that half."""
    pending_per_connection: int = 512
    """Own unanswered requests, cancelled ones included: bounds the memory that a peer costs which never answers."""
