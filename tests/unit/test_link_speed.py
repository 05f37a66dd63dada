"""The speed of links, from the kernel's figures of the connections that sent bodies."""

from __future__ import annotations

import socket
import sys
from typing import cast

import pytest

from node.exchange.link_speed import FAST, LinkSpeed


class Info:
    """A socket with this rate in bytes a second, which the kernel took while the sender had enough to send or not."""

    def __init__(self, rate: float, *, app_limited: bool = False, size: int = 168) -> None:
        info = bytearray(168)
        info[7] = app_limited
        info[160:168] = int(rate).to_bytes(8, sys.byteorder)
        self._info = bytes(info[:size])

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        assert (level, option, size) == (socket.IPPROTO_TCP, socket.TCP_INFO, 168)
        return self._info


def speed_of(*sent: Info) -> LinkSpeed:
    speed = LinkSpeed()
    for info in sent:
        speed.sent(cast(socket.socket, info))
    return speed


@pytest.mark.parametrize(
    ("sent", "fast"),
    [
        ([], False),
        ([Info(FAST)], True),
        ([Info(FAST - 1)], False),
        ([Info(5e6)] * 3 + [Info(1e9)] * 2, False),
        ([Info(1e9)] * 3 + [Info(5e6)] * 2, True),
        ([Info(1e9, app_limited=True)] * 20, False),
        ([Info(1e9, size=104)] * 20, False),
        ([Info(1e9)] * 100 + [Info(5e6)] * 16, False),
    ],
)
def test_the_median_of_the_last_bodies_that_filled_their_link_decides(sent: list[Info], fast: bool) -> None:
    assert speed_of(*sent).is_fast() == fast


def test_the_kernel_gives_the_rate_of_a_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as sock:
        assert len(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 168)) == 168
