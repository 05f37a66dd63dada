"""The bulk channel's bounds in time, number and memory, each with its reason.

Bounds that tests vary are fields of `Timing` and `Limits`, others are constants, here or beside the code they explain.
"""

from __future__ import annotations

from dataclasses import dataclass

from node.exchange.requests import REQUESTS_PER_CONNECTION, WAITING_EVERY_S, WAITING_FIRST_S

HEADS_RATE = 8 << 20
"""Bytes per second of one peer's requests that are longer than BATCH_BYTES (node/exchange/connection.py). Each is
decoded in one go, 60 ms for a view of the largest size, and all other tasks wait meanwhile. Sites stay far below it."""
HANDSHAKES_PER_ADDRESS = 32
"""Handshakes under way from one IP address: a single address cannot take all of `Limits.handshakes`. A member opens
three connections at once."""
BACKLOG = 1024
"""Connections that the kernel completes before they are accepted: a whole site may connect when a node restarts."""
VIEWS = 4
"""Bodies that may wait on a connection as views of whole blocks. Where more wait, the link is slower than this machine,
and further bodies are copied: each view could keep a whole block in memory for its part of it."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds."""

    connect_s: float = 1.4
    """TCP connect, for each address of a member, within a site. A lost SYN is sent again after 1 s."""
    handshake_s: float = 3.0
    """TLS and hello. A small board needs a tenth of that for its signatures, also when many connect at once."""
    retry_s: float = 0.75
    """A member that could not be reached is not dialled again before this: requests to a dead member fail at once, and
    a member that has just started waits little."""
    waiting_first_s: float = WAITING_FIRST_S
    waiting_every_s: float = WAITING_EVERY_S
    stall_s: float = 10.0
    """A peer that takes no byte of what is sent to it for this time is dropped."""
    quiet_s: float = 5.0
    """A connection with open requests on which nothing came for this time is dead: a live peer sends `Waiting`."""
    idle_s: float = 60.0
    """The asking side closes a connection without requests after this time, the answering side after three times it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what peers may take, all together and each. The last one bounds this node's own requests."""

    connections: int = 4096
    """Incoming, and likewise outgoing: three lanes for each node of a site of a thousand, and room."""
    connections_per_peer: int = 6
    """One for each lane, and those that they replace while these are not yet known to be dead."""
    handshakes: int = 128
    """Incoming ones under way: each holds a socket and the state of TLS for a peer that has not proven who it is."""
    requests: int = 2048
    """At work for all peers together, in fair shares (node/exchange/fair_shares.py); one peer can hold a fifth."""
    requests_per_connection: int = REQUESTS_PER_CONNECTION
    answer_bytes: int = 64 << 20
    """Bodies that wait for peers to take them, in fair shares; beyond it the answer is `busy`. While no link takes a
    byte, the reads of a site leave half of this on each node: every node has MOST blocks (protocol/window.py) under
    way, spread evenly over all nodes. In a site of two nodes, the other node may have exactly that half."""
    pending_per_connection: int = 512
    """Own requests that have no answer yet, cancelled ones included: a peer that never answers costs no more memory."""
