"""The effect on others of a member that sends far too many requests, over real sockets. S-nn: docs/SECURITY.md.

Latency is the CPU time of this process, in which all members run: the work that the node did between a request and its
answer. Other processes on the machine do not change it. Calm and flood are measured in the same run.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from statistics import median, quantiles

import pytest
import trio

from node.exchange.contract import Lane, Sender
from node.exchange.limits import Limits, Timing
from protocol import wire
from protocol.ids import PeerId
from protocol.members import MAX_MEMBERS, Member, News, Statement
from protocol.messages import GetShards, Ping, Request, Sync
from protocol.summary import MAX_STATEMENTS, ROW
from tests.support.exchanges import GET, PING, Cluster, Node, Raw, play

ASKED = 10_000
SAMPLES = 100
FACTOR, GRACE_S = 10.0, 0.05
"""Measured: a factor of 0.6 to 1.7 in floods of requests for blocks and of pings."""
ROUNDS = 3
"""Requests that each connection of the flood may have decoded before the answer. A message is decoded in one step. On a
slow machine the limit for large requests (HEADS_RATE) delays none of them."""
PATIENT = Timing(connect_s=60.0, handshake_s=60.0, stall_s=60.0, quiet_s=60.0)
"""Timeouts that even a slow machine does not reach."""
STATEMENT = Statement(
    Member(PeerId("12D3KooW" + "x" * 44), "n" * 20, "site", ("10.0.0.1:4502",)),
    1,
    leaving=False,
    seal=bytes(16),
    signature=bytes(64),
    certificate=bytes(450),
)
FLOODS = {
    "blocks": GET,
    "pings": PING,
    "statements": Ping(News((STATEMENT,) * MAX_STATEMENTS)),
    "views": Sync(STATEMENT, bytes(ROW.size * MAX_MEMBERS)),
}


async def p99_s(asker: Node, node: Node, message: Request) -> float:
    """CPU seconds."""
    took = []
    for _ in range(SAMPLES):
        began = time.process_time()
        if isinstance(message, GetShards):
            await asker.read(node.peer, message, silence_s=60.0)
        else:
            await asker.ask(node.peer, message, lane=Lane.CONTROL, silence_s=60.0)
        took.append(time.process_time() - began)
    return quantiles(took, n=100)[-1]


def decode_s(message: Request) -> float:
    """CPU seconds."""
    heads, data, took = wire.Heads(wire.REQUESTS), wire.encode_head(1, message, 0), []
    for _ in range(5):
        began = time.process_time()
        heads.feed(data)
        assert heads.next() is not None
        took.append(time.process_time() - began)
    return median(took)


async def ask_on(raw: Raw, message: Request) -> None:
    """Send requests without reading answers, until the node closes the connection."""
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        for request_id in range(1, 1 + ASKED):
            await raw.send(wire.encode_head(request_id, message, 0))


def test_requests_of_one_member_begin_one_at_a_time(tmp_path: Path) -> None:
    """S-40: whatever a request costs, others wait for one of them, and not for as many as the member sent at once."""
    at_once = 60

    async def scenario(cluster: Cluster) -> None:
        begun = [0]

        async def count(peer: PeerId, request: GetShards, sender: Sender) -> None:
            begun[-1] += 1

        async def watch() -> None:
            while True:
                begun.append(0)
                await trio.lowlevel.checkpoint()

        node = await cluster.start(server=count)
        credentials = cluster.credentials().client_context()
        raws = [await cluster.dial_raw(node, credentials) for _ in range(Limits().connections_per_peer)]
        for raw in raws:
            await raw.read_frame()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            for raw in raws:
                await raw.send(b"".join(wire.encode_head(number, GET, 0) for number in range(1, 1 + at_once)))
            while sum(begun) < at_once * len(raws):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        # Each connection also begins the first request of a read at once.
        assert max(begun) <= 2 + len(raws)

    play(tmp_path, scenario)


@pytest.mark.parametrize("flood", FLOODS)
@pytest.mark.parametrize("asked", [PING, GET], ids=["ping", "block"])
def test_a_flood_of_one_member_hardly_slows_the_others(tmp_path: Path, flood: str, asked: Request) -> None:
    """S-40: the member uses all connections that it may have, and reads no answer."""
    message = FLOODS[flood]

    async def scenario(cluster: Cluster) -> None:
        node, other = await cluster.start(timing=PATIENT), await cluster.start(timing=PATIENT)
        calm_s = await p99_s(other, node, asked)
        async with trio.open_nursery() as nursery:
            credentials = cluster.credentials().client_context()
            for _ in range(Limits().connections_per_peer):
                nursery.start_soon(ask_on, await cluster.dial_raw(node, credentials), message)
            while node.exchange.statistics().connections_in < 1 + Limits().connections_per_peer:
                await trio.lowlevel.checkpoint()
            flooded_s = await p99_s(other, node, asked)
            nursery.cancel_scope.cancel()
        at_once_s = ROUNDS * Limits().connections_per_peer * decode_s(message)
        print(f"{flood}: p99 {1000 * calm_s:.1f} ms, flooded {1000 * flooded_s:.1f} ms, at once {1000 * at_once_s:.1f}")
        assert flooded_s < FACTOR * calm_s + GRACE_S + at_once_s

    play(tmp_path, scenario, real_time=True)
