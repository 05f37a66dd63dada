"""The HTTP server over real loopback sockets: framing, bounds, broken bodies, hostile bytes, shutdown."""

from __future__ import annotations

import logging
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

import h11
import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from node.web.connections import OpenConnections, Phase
from node.web.server import (
    Buffer,
    FileBody,
    Handler,
    Limits,
    Request,
    Response,
    serve_http,
)
from protocol.errors import UnavailableError

DEFAULTS = Limits()
BIG = bytes(range(256)) * 4096 * 8


@dataclass
class Served:
    port: int
    stop: trio.Event

    async def connect(self, source: str = "127.0.0.1") -> trio.SocketStream:
        return await trio.open_tcp_stream("127.0.0.1", self.port, local_address=source)

    async def raw(self, data: bytes) -> bytes:
        """Send `data`, and return all bytes up to the server's FIN. Raises after a reset."""
        stream = await self.connect()
        async with stream:
            await stream.send_all(data)
            await stream.send_eof()
            return b"".join([bytes(part) async for part in stream])


@asynccontextmanager
async def serving(handler: Handler, limits: Limits = DEFAULTS) -> AsyncIterator[Served]:
    stop = trio.Event()
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve_http, listeners, handler, limits=limits, stop=stop))
        yield Served(listeners[0].socket.getsockname()[1], stop)
        nursery.cancel_scope.cancel()


def run(main: Callable[[], Awaitable[None]], seconds: float = 60) -> None:
    async def bounded() -> None:
        with trio.fail_after(seconds):
            await main()

    trio.run(bounded)


def get(path: str, headers: str = "", method: str = "GET") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode()


def answers(data: bytes, methods: str) -> list[tuple[int, dict[str, str], bytes]]:
    """`data` as a strict client parses it: status, headers and body of the answer to each of `methods`."""
    client = h11.Connection(h11.CLIENT)
    parsed: list[tuple[int, dict[str, str], bytes]] = []
    client.receive_data(data)
    for number, method in enumerate(methods.split()):
        if number:
            client.start_next_cycle()
        client.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
        client.send(h11.EndOfMessage())
        body = b""
        while not isinstance(event := client.next_event(), h11.EndOfMessage):
            assert event not in (h11.NEED_DATA, h11.PAUSED), f"incomplete: {data!r}"
            if isinstance(event, h11.Response):
                status, headers = event.status_code, {k.decode(): v.decode() for k, v in event.headers}
            elif isinstance(event, h11.Data):
                body += event.data
        parsed.append((status, headers, body))
    return parsed


async def echo(request: Request) -> Response:
    text = f"{request.method} {request.path} {sorted(request.query.items())} {len(request.body)}"
    return Response(200, {"Content-Type": "text/plain"}, text.encode())


def test_pipelined_requests_are_answered_in_order_on_one_connection() -> None:
    async def main() -> None:
        async with serving(echo) as served:
            data = await served.raw(get("/a?x=1&y=%2F") + get("/b%20c", method="HEAD") + get("/d"))
            first, second, third = answers(data, "GET HEAD GET")
            assert first[2] == b"GET /a [('x', '1'), ('y', '/')] 0"
            assert second[1]["content-length"] == str(len("HEAD /b c [] 0"))
            assert third[2] == b"GET /d [] 0"
            assert first[1]["date"].endswith("GMT")

    run(main)


def test_requests_may_arrive_byte_by_byte() -> None:
    async def main() -> None:
        async with serving(echo) as served, await served.connect() as stream:
            for byte in get("/slow") + get("/again", "Connection: close\r\n"):
                await stream.send_all(bytes([byte]))
            data = b"".join([bytes(part) async for part in stream])
            assert [body for _, _, body in answers(data, "GET GET")] == [b"GET /slow [] 0", b"GET /again [] 0"]

    run(main)


def test_a_body_is_read_after_100_continue_and_refused_beyond_its_bound() -> None:
    async def main() -> None:
        async with serving(echo, Limits(body_bytes=10)) as served:
            async with await served.connect() as stream:
                await stream.send_all(get("/p", "Content-Length: 10\r\nExpect: 100-continue\r\n", "POST"))
                assert (await stream.receive_some()).startswith(b"HTTP/1.1 100")
                await stream.send_all(b"0123456789")
                assert b"POST /p [] 10" in await stream.receive_some()
            declared = await served.raw(get("/p", "Content-Length: 11\r\nExpect: 100-continue\r\n", "POST"))
            assert declared.startswith(b"HTTP/1.1 413")
            chunked = get("/p", "Transfer-Encoding: chunked\r\n", "POST") + b"b\r\n0123456789a\r\n0\r\n\r\n"
            assert (await served.raw(chunked)).startswith(b"HTTP/1.1 413")

    run(main)


def test_an_unknown_method_reaches_the_handler_without_a_body_and_ends_the_connection() -> None:
    async def main() -> None:
        async with serving(echo) as served:
            data = get("/p", "Content-Length: 20000000\r\n", "PUT") + b"x" * 100 + get("/never")
            (answer,) = answers(await served.raw(data), "PUT")
            assert (answer[0], answer[1]["connection"], answer[2]) == (200, "close", b"PUT /p [] 0")

    run(main)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 20000 + b"\r\n", 431),
        (get("/", "Content-Length: 2000000\r\n", method="POST"), 413),
        (get("/?" + "&".join(f"a{i}=1" for i in range(40))), 400),
        (get("/", "Content-Length: 1\r\nContent-Length: 2\r\n"), 400),
    ],
)
def test_malformed_or_unknown_requests_are_refused_and_the_connection_closed(data: bytes, status: int) -> None:
    async def main() -> None:
        async with serving(echo) as served:
            (answer,) = answers(await served.raw(data), "GET")
            assert answer[0] == status
            assert answer[1]["connection"] == "close"

    run(main)


def test_a_malformed_request_after_a_head_is_answered_with_a_body(caplog) -> None:
    async def main() -> None:
        async with serving(echo) as served:
            head, malformed = answers(await served.raw(get("/a", method="HEAD") + b"nonsense\r\n\r\n"), "HEAD GET")
            assert (head[0], malformed[0]) == (200, 400)
            assert b"malformed" in malformed[2]

    run(main)
    assert not caplog.records


def test_generators_and_files_are_sent_whole_and_closed(tmp_path) -> None:
    path = tmp_path / "file"
    path.write_bytes(BIG)
    closed: list[str] = []

    async def generate() -> AsyncIterator[Buffer]:
        try:
            for start in range(0, len(BIG), 1 << 20):
                yield memoryview(BIG)[start : start + (1 << 20)]
        finally:
            closed.append("generator")

    async def handler(request: Request) -> Response:
        if request.path == "/file":
            file = path.open("rb")
            files.append(file)
            return Response(200, {}, FileBody(file, 5, len(BIG) - 3))
        headers = {"Content-Length": str(len(BIG))} if request.path == "/sized" else {}
        return Response(200, headers, generate(), first=[] if headers else [b"first"])

    files: list = []

    async def main() -> None:
        async with serving(handler) as served:
            data = await served.raw(get("/sized") + get("/chunked") + get("/file") + get("/sized", method="HEAD"))
            sized, chunked, file, head = answers(data, "GET GET GET HEAD")
            assert sized[2] == BIG
            assert chunked[2] == b"first" + BIG
            assert file[2] == BIG[5:-3]
            assert head[1]["content-length"] == str(len(BIG))
            assert closed == ["generator"] * 2, "a HEAD never starts its generator"
            assert [file.closed for file in files] == [True]

    run(main)


def test_a_broken_body_ends_with_fin_and_a_bug_is_logged(caplog) -> None:
    async def broken(error: Exception) -> AsyncIterator[Buffer]:
        yield b"half"
        raise error

    async def handler(request: Request) -> Response:
        if request.path == "/early":
            return Response(200, {"Content-Length": "8"}, broken(UnavailableError("no bytes left")))
        if request.path == "/bug":
            return Response(200, {"Content-Length": "8"}, broken(ZeroDivisionError("bug in a body")))
        raise ZeroDivisionError("bug in a handler")

    async def main() -> None:
        async with serving(handler) as served:
            assert (await served.raw(get("/early") + get("/never"))).endswith(b"\r\n\r\nhalf")
            assert [record.exc_info for record in caplog.records] == [None]
            caplog.clear()
            assert (await served.raw(get("/bug"))).endswith(b"\r\n\r\nhalf")
            failed, again = answers(await served.raw(get("/x") + get("/x")), "GET GET")
            assert failed[0] == again[0] == 500
            assert b"ZeroDivisionError" not in failed[2]

    with caplog.at_level(logging.INFO):
        run(main)
    assert [record.exc_info[0] for record in caplog.records] == [ZeroDivisionError] * 3


def test_clients_that_leave_or_stall_cost_nothing(caplog, tmp_path) -> None:
    """S-31"""
    path = tmp_path / "file"
    path.write_bytes(BIG)
    ended = trio.Event()

    async def endless() -> AsyncIterator[Buffer]:
        try:
            while True:
                yield BIG
        finally:
            ended.set()

    async def handler(request: Request) -> Response:
        return Response(200, {}, endless() if request.path == "/endless" else FileBody(path.open("rb"), 0, len(BIG)))

    async def main() -> None:
        async with serving(handler, Limits(write_stall_s=0.2)) as served, await served.connect() as stream:
            await stream.send_all(get("/endless"))
            await stream.receive_some(1000)
            await ended.wait()
        async with serving(handler) as served:
            for target in ("/file", "/endless"):
                stream = await served.connect()
                stream.socket.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00"
                )  # close with a reset
                await stream.send_all(get(target))
                await stream.receive_some(1000)
                await stream.aclose()
            assert (await served.raw(get("/file"))).endswith(BIG[-1000:])

    with caplog.at_level(logging.INFO):
        run(main)
    assert not caplog.records


def test_slow_requests_and_idle_connections_are_bounded_in_time() -> None:
    """S-31"""

    async def main() -> None:
        async with serving(echo, Limits(idle_s=0.2)) as served, await served.connect() as stream:
            assert await stream.receive_some() == b""
        async with serving(echo, Limits(request_s=0.2)) as served, await served.connect() as stream:
            await stream.send_all(b"GET / HT")
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 408")

    run(main)


def test_the_longest_idle_connection_makes_room_and_a_full_server_answers_503() -> None:
    release = trio.Event()

    async def handler(request: Request) -> Response:
        if request.path == "/wait":
            await release.wait()
        return await echo(request)

    async def main() -> None:
        async with serving(handler, Limits(connections=2)) as served:
            idle, busy = await served.connect(), await served.connect()
            await idle.send_all(get("/1"))
            await idle.receive_some()
            await busy.send_all(get("/wait"))
            async with await served.connect() as third:
                await third.send_all(get("/3"))
                assert (await third.receive_some()).startswith(b"HTTP/1.1 200")
                assert await idle.receive_some() == b""
                await third.send_all(get("/wait"))
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert (await served.raw(get("/4"))).startswith(b"HTTP/1.1 503")
                release.set()
                assert (await busy.receive_some()).startswith(b"HTTP/1.1 200")
            await idle.aclose()
            await busy.aclose()

    run(main)


def test_connections_of_one_address_make_way_for_another_address() -> None:
    """S-44"""

    async def handler(request: Request) -> Response:
        if request.path == "/wait":
            await trio.sleep_forever()
        return await echo(request)

    async def main() -> None:
        async with serving(handler, Limits(connections=4)) as served:
            crowd = [await served.connect() for _ in range(4)]
            for stream in crowd:
                await stream.send_all(get("/wait"))
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert (await served.raw(get("/5"))).startswith(b"HTTP/1.1 503"), "of the same address"
            for index in (1, 2):
                async with await served.connect(f"127.0.0.{index + 1}") as other:
                    await other.send_all(get(f"/{index}"))
                    assert (await other.receive_some()).startswith(b"HTTP/1.1 200")
                assert (await crowd[index - 1].receive_some()).startswith(b"HTTP/1.1 503"), "the oldest"
            for stream in crowd:
                await stream.aclose()

    run(main)


class Open:
    """A connection as the table sees it."""

    def __init__(self, address: str, phase: Phase, since: float) -> None:
        self.address, self.phase, self.since, self.is_cut = address, phase, since, False

    def cut(self) -> bool:
        self.is_cut = True
        return True


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(Phase), st.floats(0, 10)), min_size=1, max_size=12),
    st.sampled_from("abcd"),
)
def test_no_address_loses_a_busy_connection_to_an_address_that_has_more(
    states: list[tuple[str, Phase, float]], newcomer: str
) -> None:
    """S-44"""
    table: OpenConnections[Open] = OpenConnections(len(states))
    connections = [Open(*state) for state in states]
    count = Counter(connection.address for connection in connections)
    with ExitStack() as stack:
        for connection in connections:
            stack.enter_context(table.holding(connection))
        made = table.makes_way(newcomer, 10.0)
        cut = [connection for connection in connections if connection.is_cut]
        assert len(cut) == made
        for victim in cut:
            assert victim.phase is Phase.IDLE or count[victim.address] >= count[newcomer]
            assert victim.phase is not Phase.WORK or count[victim.address] > count[newcomer] + 1
        if not made:
            assert all(connection.phase is not Phase.IDLE for connection in connections)
            assert max(count.values()) <= count[newcomer] + 1
    assert table.makes_way(newcomer, 10.0), "all have ended"


def test_shutdown_lets_bodies_end_and_turns_new_requests_away() -> None:
    release = trio.Event()

    async def body() -> AsyncIterator[Buffer]:
        yield b"half"
        await release.wait()
        yield b"half"

    async def handler(request: Request) -> Response:
        return Response(200, {"Content-Length": "8"}, body())

    async def main() -> None:
        async with serving(handler) as served, await served.connect() as running:
            await running.send_all(get("/1") + get("/2"))
            data = bytes(await running.receive_some())
            served.stop.set()
            await trio.testing.wait_all_tasks_blocked(0.05)
            with pytest.raises(OSError, match="connect"):
                await served.connect()
            release.set()
            data += b"".join([bytes(part) async for part in running])
            first, second = answers(data, "GET GET")
            assert first[2] == b"halfhalf"
            assert (second[0], second[1]["connection"]) == (503, "close")

    run(main)


def test_a_body_that_outlives_the_grace_period_is_cut() -> None:
    async def body() -> AsyncIterator[Buffer]:
        yield b"half"
        await trio.sleep_forever()

    async def handler(request: Request) -> Response:
        return Response(200, {}, body())

    async def main() -> None:
        async with serving(handler, Limits(grace_s=0.1)) as served, await served.connect() as running:
            await running.send_all(get("/1"))
            assert await running.receive_some()
            served.stop.set()
            assert b"0\r\n\r\n" not in b"".join([bytes(part) async for part in running])

    run(main)


LINES = st.sampled_from(
    [
        *(b"GET / HTTP/1.1\r\n", b"HEAD /v2/ HTTP/1.0\r\n", b"POST //..%00 HTTP/1.1\r\n"),
        *(b"GET http://[::1/x?%ff HTTP/1.1\r\n", b"Host: x\r\n", b"Content-Length: 3\r\n"),
        *(b"Content-Length: -1\r\n", b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n"),
        *(b"Connection: close\r\n", b"Range: bytes=5-2,-\r\n", b"\r\n", b"3\r\nabc\r\n", b"0\r\n\r\n"),
    ]
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(LINES | st.binary(max_size=20), max_size=12))
def test_no_bytes_cause_a_traceback_or_a_server_error(parts: list[bytes], caplog) -> None:
    """S-31"""

    async def main() -> None:
        async with serving(echo) as served:
            answer = await served.raw(b"".join(parts))
            assert b"HTTP/1.1 5" not in answer.replace(b"HTTP/1.1 501", b"").replace(b"HTTP/1.1 505", b"")

    with caplog.at_level(logging.INFO):
        run(main)
    assert not caplog.records
