"""Transfers that break on either side of a real p2pd: the bytes that the client gets, and the registry's requests."""

from __future__ import annotations

import contextlib
import http.client
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from node.blocks.room import HELD
from protocol.ids import BLOCK_SIZE
from tests.support.faulty_origin import Fault, FaultyOrigin, content
from tests.support.processes import tail, wait_for
from tests.support.site import UPSTREAM, Node, site

SIZE = 24 * BLOCK_SIZE + 12345
GIB = 1 << 30


@contextlib.contextmanager
def connected(node: Node) -> Iterator[http.client.HTTPConnection]:
    with contextlib.closing(http.client.HTTPConnection(node.host, node.mirror_port, timeout=60)) as connection:
        yield connection


def ask(connection: http.client.HTTPConnection, origin: FaultyOrigin, span: str = "") -> http.client.HTTPResponse:
    headers = {"Range": f"bytes={span}"} if span else {}
    connection.request("GET", f"/v2/app/blobs/{origin.digest}?ns={UPSTREAM}", headers=headers)
    return connection.getresponse()


def read(node: Node, origin: FaultyOrigin, span: str = "") -> tuple[int, bytes]:
    with connected(node) as connection:
        answer = ask(connection, origin, span)
        return answer.status, answer.read()


@contextlib.contextmanager
def slow_client(node: Node, origin: FaultyOrigin) -> Iterator[socket.socket]:
    """A client that has requested the blob, and whose buffers hold little of it."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(60)
        sock.connect((node.host, node.mirror_port))
        request = f"GET /v2/app/blobs/{origin.digest}?ns={UPSTREAM} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        sock.sendall(request.encode())
        yield sock


@pytest.mark.parametrize("how", ["reset", "fin", "stall"])
def test_a_body_that_breaks_at_the_registry_is_whole_at_the_client(folder: Path, how: str) -> None:
    """p2pd gives up a stalled body after 10 s. The client of this test gives up after 60 s without a byte."""
    faults = [Fault(at, how) for at in ((5 * BLOCK_SIZE + 77,) if how == "stall" else range(99_999, SIZE, SIZE // 4))]
    with FaultyOrigin(SIZE, *faults) as origin, site(folder / "site", origin.url, 1) as (node,):
        assert read(node, origin) == (200, content(0, SIZE))
        again = sum(stop - start for start, stop in origin.asked) - SIZE
        assert again <= len(faults) * 16 * BLOCK_SIZE, "only missing bytes are requested again"


def test_without_the_registry_a_body_ends_with_fin_and_the_next_request_is_refused(folder: Path) -> None:
    """containerd reopens where the body ended, and asks the registry itself if that is refused."""
    with contextlib.ExitStack() as stack:
        origin = stack.enter_context(FaultyOrigin(SIZE, *[Fault(SIZE - 1000, "fin") for _ in range(20)]))
        (node,) = stack.enter_context(site(folder / "site", origin.url, 1))
        with connected(node) as connection:
            answer = ask(connection, origin)
            assert answer.status == 200
            with pytest.raises(http.client.IncompleteRead) as broken:  # FIN; a reset would be a ConnectionResetError
                answer.read()
            got = broken.value.partial
        assert 0 < len(got) < SIZE
        assert got == content(0, len(got))
        status, _ = read(node, origin, f"{SIZE - 5000}-")
        assert status == 503
        assert "Traceback" not in tail(node.log, 10000)


def test_a_client_that_disconnects_ends_its_read(folder: Path) -> None:
    with FaultyOrigin(GIB, hashed=False) as origin, site(folder / "site", origin.url, 1) as (node,):
        with connected(node) as connection:
            assert len(ask(connection, origin).read(BLOCK_SIZE)) == BLOCK_SIZE
        seen = origin.asked_bytes
        assert read(node, origin, f"{GIB - 1}-") == (206, content(GIB - 1, GIB))  # waits behind the reads in progress
        assert seen <= origin.asked_bytes <= BLOCK_SIZE * (HELD + 32)
        assert "Traceback" not in tail(node.log, 10000)


def test_a_slow_client_delays_no_other_and_gets_all(folder: Path) -> None:
    """One client reads a few bytes of a cold blob and then stops, while another client reads all of it."""
    with (
        FaultyOrigin(SIZE) as origin,
        site(folder / "site", origin.url, 1) as (node,),
        slow_client(node, origin) as slow,
    ):
        began = slow.recv(64)
        assert began.startswith(b"HTTP/1.1 200")
        before = node.rss_bytes()
        assert read(node, origin) == (200, content(0, SIZE))
        assert node.rss_bytes() - before < 96 << 20
        assert origin.asked_bytes == SIZE, "both clients share one read of each byte"
        rest = began + b"".join(iter(lambda: slow.recv(1 << 16), b""))
        assert rest.partition(b"\r\n\r\n")[2] == content(0, SIZE)


@pytest.mark.parametrize("nodes", [1, 3])
def test_a_range_in_the_middle_of_a_cold_blob_costs_the_blocks_that_it_touches(folder: Path, nodes: int) -> None:
    middle = GIB // 2 + 3 * BLOCK_SIZE - 1000
    with FaultyOrigin(GIB, hashed=False) as origin, site(folder / "site", origin.url, nodes) as members:
        for node in members:
            span = f"{middle}-{middle + (64 << 10) - 1}"
            assert read(node, origin, span) == (206, content(middle, middle + (64 << 10)))
        assert origin.asked_bytes == 2 * BLOCK_SIZE
        first = middle // BLOCK_SIZE * BLOCK_SIZE
        assert sorted(origin.asked) in (
            [(first, first + 2 * BLOCK_SIZE)],
            [(first, first + BLOCK_SIZE), (first + BLOCK_SIZE, first + 2 * BLOCK_SIZE)],
        )


def test_open_ended_ranges_that_are_closed_early_cost_at_most_the_read_ahead(folder: Path) -> None:
    """containerd 2.1 reads a layer in this way, with several connections."""
    with FaultyOrigin(GIB, hashed=False) as origin, site(folder / "site", origin.url, 1) as (node,):
        for start in range(0, GIB, GIB // 4):
            with connected(node) as connection:
                answer = ask(connection, origin, f"{start}-")
                assert (answer.status, answer.getheader("Content-Range")) == (206, f"bytes {start}-{GIB - 1}/{GIB}")
                assert answer.read(1000) == content(start, start + 1000)
        wait_for("the node is idle", lambda: read(node, origin, "0-0")[0] == 206)
        assert origin.asked_bytes <= 4 * HELD * BLOCK_SIZE
        assert "level=error" not in tail(node.log, 10000)
