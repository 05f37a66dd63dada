"""Messages that no honest member sends: values out of all bounds, floods, other versions, and strangers."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import msgspec
import pytest

from protocol import introduction, messages, wire
from protocol.ids import BLOCK_SIZE
from tests.support import adversary
from tests.support.adversary import ClosedError, Line, frame, prefixed, stranger
from tests.support.forgery import ping, sync
from tests.support.processes import wait_for
from tests.support.siege import Siege, assert_no_slower, quarantined
from tests.support.site import UPSTREAM

GROWTH = 30 << 20
LATEST_S = 6.0
"""A pull in a flood takes less time, also on a busy machine."""
AT_ONCE = 12
"""Introductions at a time: fewer than a node serves for one address."""
DIGEST = "sha256:" + "ab" * 32
SOURCE = f"{UPSTREAM}/no/such#blobs"
DEFAULTS: dict[str, Any] = {
    "digest": DIGEST, "index": 0, "size": 1 << 19, "k": 4, "m": 1, "want": 0, "hops": 0, "source": SOURCE,
    "reference": "latest", "target": "12D3KooWGzH5FoCYHYRYNyd8DYA34eCqvkJiCFjXgNXzVLQzGrLp", "digests": [DIGEST],
}  # fmt: skip
"""Values that the bounds allow, by the field's name. The others are empty."""
HOSTILE: list[Any] = [
    -1, 1 << 40, (1 << 40) + 1, 1 << 53, (1 << 63) - 1, (1 << 64) - 1, -(1 << 63), 1.5, float("nan"), float("inf"),
    None, True, "", "x" * 300, "\x00\x1b[2J", "../../etc/passwd", "x" * 100_000, b"", b"\xff" * 131_072, [],
    [[]] * 20_000,    [[[[[[[[]]]]]]]], {}, {"a": 1}, ["sha256:" + "cd" * 32] * 1025, [0] * 100_000,
]  # fmt: skip


def hostile_requests() -> Iterator[list[Any]]:
    """Each request with each field replaced by every other hostile value, then with too few and too many fields."""
    for kind in get_args(messages.Request):
        fields = [DEFAULTS.get(name, []) for name in kind.__struct_fields__]
        tag = kind.__struct_config__.tag
        for position in range(len(fields)):
            for value in HOSTILE[position % 2 :: 2]:
                yield [tag, *fields[:position], value, *fields[position + 1 :]]
        yield [tag]
        yield [tag, *fields, *range(1000)]


def test_no_value_in_a_request_harms_a_daemon(siege: Siege) -> None:
    """S-20"""
    node = siege.honest[0]
    before = node.rss_bytes()
    with siege.unharmed():
        closed, line = 0, siege.attacker.line(node)
        for request in hostile_requests():
            try:
                line.ask(request)
            except ClosedError:
                closed += 1
                line.close()
                line = siege.attacker.line(node)
        line.close()
        assert closed > 100
        siege.pull_everywhere(siege.fresh())
        assert node.rss_bytes() < before + GROWTH


def test_no_frame_harms_a_daemon(siege: Siege) -> None:
    """S-20"""
    rng = random.Random(3)
    node = siege.honest[0]
    frames = [
        adversary.FRAME.pack(0xFFFFFFFF, 0),
        adversary.FRAME.pack(wire.MAX_HEADER, 0xFFFFFFFF),
        adversary.FRAME.pack(wire.MAX_HEADER, 0) + b"\xdd\xff\xff\xff\xff",
        frame(b"\x92\x01" + b"\x91" * 100_000),
        frame(b"\xdd\xff\xff\xff\xff" + bytes(1000)),
        frame((1, [7, []]), claimed=BLOCK_SIZE),
        *(frame(rng.randbytes(rng.randrange(1, 2000))) for _ in range(50)),
    ]
    before = node.rss_bytes()
    with siege.unharmed(), contextlib.ExitStack() as stack:
        for data in frames:
            with contextlib.suppress(ClosedError):
                line = stack.enter_context(siege.attacker.line(node))
                line.write(data)
                if data is not frames[2]:  # a header that does not end is waited for
                    assert line.is_closed()
        assert node.rss_bytes() < before + GROWTH
        siege.pull_everywhere(siege.fresh())


def test_no_message_of_an_introduction_harms_a_daemon(siege: Siege) -> None:
    """S-30"""
    node, attacker = siege.honest[0], adversary.Attacker.new(siege.key)
    hello = prefixed([introduction.VERSION, attacker.credentials.certificate])
    second: list[object] = [
        [],
        None,
        [[]] * 2000,
        [[attacker.peer]] * 1000,
        {"a": 1},
        b"\xdd\xff\xff\xff\xff",
        "x" * 10_000,
    ]
    version = introduction.VERSION
    talks = [[prefixed([version, value])] for value in HOSTILE[::2]] + [[prefixed(value)] for value in HOSTILE[1::4]]
    talks += [[hello, prefixed(value)] for value in second]
    with siege.unharmed(), ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda talk: attacker.introduce(node, *talk), [*talks, [introduction.PREFIX.pack(0xFFFFFFFF)]]))
        siege.pull_everywhere(siege.fresh())


@pytest.mark.parametrize("version", [wire.VERSION - 1, wire.VERSION + 1, 0])
def test_another_version_is_refused_clearly_and_is_no_crime(siege: Siege, version: int) -> None:
    """S-34"""
    node = siege.honest[0]
    logged = node.log.stat().st_size
    with siege.unharmed(shut_out=False):
        for _ in range(5):
            with siege.attacker.line(node, hello=[adversary.MAGIC, version, "control"]) as line:
                assert line.hello[1] == wire.VERSION, "the other side can name both versions"
                assert line.is_closed()
        siege.attacker.introduce(node, prefixed([introduction.VERSION - 1, siege.attacker.credentials.certificate]))
        siege.pull_everywhere(siege.fresh())
    new = node.log.read_bytes()[logged:].decode()
    if version:
        wait_for(
            "the log names the version", lambda: f"version {version}" in node.log.read_text() or f" {version}" in new
        )


def flood(stop: threading.Event, line: Line, requests: list[bytes]) -> None:
    """Send the requests again and again, and read no answer."""
    with contextlib.suppress(ClosedError):
        while not stop.is_set():
            for data in requests:
                line.write(data)


@pytest.mark.parametrize("kind", ["Resolve", "GetShards", "Announce", "Sync", "Ping", "FindHolders", "GetHoldings"])
def test_a_flood_of_requests_hardly_slows_pulls(siege: Siege, kind: str) -> None:
    """S-40: on as many connections as a member may have."""
    made: dict[str, Sequence[object]] = {
        "Resolve": [messages.Resolve(f"{UPSTREAM}/flood/a#manifests", f"t{number}") for number in range(500)],
        "GetShards": [
            messages.GetShards("sha256:" + f"{number:064x}", 0, 0xFFFF, 1 << 23, 4, 1, number % 5, 2, SOURCE)
            for number in range(500)
        ],
        "Announce": [messages.Announce(tuple("sha256:" + f"{number:064x}" for number in range(100)))],
        "Sync": [sync(siege.statement)],
        "Ping": [ping()],
        "FindHolders": [messages.FindHolders(DIGEST)],
        "GetHoldings": [messages.GetHoldings(DIGEST)],
    }
    calm = siege.cold_pulls(1)
    stop = threading.Event()
    requests = [frame((number, message)) for number, message in enumerate(made[kind])]
    with siege.unharmed(), contextlib.ExitStack() as stack:
        threads = []
        for node in siege.honest[:2]:
            for lane in ("control", "urgent", "bulk"):
                line = stack.enter_context(siege.attacker.line(node, lane))
                threads.append(threading.Thread(target=flood, args=(stop, line, requests)))
        stack.callback(stop.set)
        for thread in threads:
            thread.start()
        try:
            attacked = siege.cold_pulls(2)
        finally:
            stop.set()
        stack.close()
        for thread in threads:
            thread.join(60)
        print(f"{kind}: {sorted(calm)} before, {sorted(attacked)} in the flood")
        assert_no_slower(calm, attacked)
        assert max(attacked) < LATEST_S, "no pull waits behind all that the member asked for"


def test_strangers_keep_no_member_out(siege: Siege) -> None:
    """S-43: connections without a certificate, or with that of another cluster, to both ports of a node."""
    node, outsider = siege.honest[0], stranger()
    calm = siege.cold_pulls(1)
    with siege.unharmed(), contextlib.ExitStack() as stack:
        for port in (node.bulk_port, node.libp2p_port):
            for _ in range(200):
                sock = stack.enter_context(socket.create_connection((node.host, port), timeout=10))
                with contextlib.suppress(OSError):
                    sock.sendall(b"\x16\x03\x01" if port == node.bulk_port else b"\x13/multistream")
        for _ in range(5):
            with pytest.raises(ClosedError):
                Line(node, outsider)
        assert adversary.introduce(outsider.identity, node, prefixed([1, outsider.certificate])) == []
        assert_no_slower(calm, siege.cold_pulls(1))
        assert not quarantined(node)


def test_encoded_requests_are_those_of_the_product() -> None:
    """The attacker's frames are read as the product reads its own."""
    head: wire.Heads[messages.Request] = wire.Heads(wire.REQUESTS)
    head.feed(frame((7, messages.GetHoldings(DIGEST))))
    parsed = head.next()
    assert parsed is not None
    assert parsed.message == messages.GetHoldings(DIGEST)
    assert frame((7, messages.GetHoldings(DIGEST))) == wire.encode_head(7, messages.GetHoldings(DIGEST), 0)
    assert msgspec.msgpack.encode((7, 1))
