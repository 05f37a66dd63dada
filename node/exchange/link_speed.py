"""How fast the links are, by what TCP measured of the bodies that this node sent last.

Each connection measures the rate at which its bytes are delivered (Cardwell et al., "BBR: Congestion-Based Congestion
Control", CACM 2017; `tcpi_delivery_rate` of linux/tcp.h). While the sender had too little to send, this says nothing of
the link, and the kernel marks it.
"""

from __future__ import annotations

import socket
import sys
from collections import deque
from statistics import median_low

FAST = 25e6
"""Bytes a second: 200 Mbit/s, twice the widest link that is thin (docs/decisions/0013-stripes.md)."""
_BODIES = 16
"""So many bodies decide."""
_APP_LIMITED, _RATE = 7, slice(160, 168)
"""Where struct tcp_info has the mark (bit 0) and the rate (bytes a second)."""


class LinkSpeed:
    def __init__(self) -> None:
        self._rates: deque[int] = deque(maxlen=_BODIES)

    def sent(self, sock: socket.socket) -> None:
        """A body was written to the socket."""
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RATE.stop)
        if len(info) == _RATE.stop and not info[_APP_LIMITED] & 1:
            self._rates.append(int.from_bytes(info[_RATE], sys.byteorder))

    def is_fast(self) -> bool:
        """False while nothing is known, and on kernels before 4.9."""
        return bool(self._rates) and median_low(self._rates) >= FAST
