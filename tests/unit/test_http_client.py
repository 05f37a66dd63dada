"""The transport below httpx against a scripted server: framings, reuse of connections, TLS, bounds."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from node.registry.transport import Body, DirectTransport
from node.runtime import sockets

BIG = bytes(range(256)) * 4096
PLAIN = ssl.create_default_context()


class Scripted:
    """Answers each request with the next of `answers`, byte by byte if `slowly`. `closes`: closes after an answer."""

    def __init__(self, *answers: bytes, closes: bool = False, slowly: bool = False) -> None:
        self.answers = list(answers)
        self.closes = closes
        self.slowly = slowly
        self.requests: list[bytes] = []
        self.connections = 0
        self.open = 0

    async def serve(self, stream: trio.abc.Stream) -> None:
        self.connections += 1
        self.open += 1
        try:
            async with stream:
                while request := await self._request(stream):
                    self.requests.append(request)
                    answer = self.answers.pop(0)
                    for part in [answer[i : i + 1] for i in range(len(answer))] if self.slowly else [answer]:
                        await stream.send_all(part)
                    if self.closes:
                        return
        finally:
            self.open -= 1

    async def _request(self, stream: trio.abc.Stream) -> bytes:
        data = b""
        while not data.endswith(b"\r\n\r\n"):
            try:
                part = await stream.receive_some()
            except trio.BrokenResourceError:
                return b""
            if not part:
                return b""
            data += part
        return data


@asynccontextmanager
async def listening(server: Scripted, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    async def serve(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):  # clients leave, and some refuse the certificate
            await server.serve(trio.SSLStream(stream, tls, server_side=True) if tls else stream)

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, serve, listeners)
        yield f"{'https' if tls else 'http'}://127.0.0.1:{listeners[0].socket.getsockname()[1]}/"
        nursery.cancel_scope.cancel()


def client_of(transport: DirectTransport, **timeouts: float) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=transport, timeout=httpx.Timeout(60, **timeouts))


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        with trio.fail_after(60):
            await main()

    trio.run(bounded)


def answer(body: bytes, *headers: str, status: str = "200 OK", announced: bool = True) -> bytes:
    lines = [f"HTTP/1.1 {status}", *headers, *([f"Content-Length: {len(body)}"] if announced else [])]
    return "\r\n".join([*lines, "", ""]).encode() + body


CHUNKED = answer(b"5\r\nhello\r\n1\r\n!\r\n0\r\n\r\n", "Transfer-Encoding: chunked", announced=False)


@pytest.mark.parametrize("slowly", [False, True])
@pytest.mark.parametrize(
    ("raw", "body", "connections"),
    [
        (answer(b"hello"), b"hello", 1),
        (answer(b""), b"", 1),
        (answer(b"", status="204 No Content", announced=False), b"", 1),
        (b"HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n" + answer(b"hello"), b"hello", 1),
        (CHUNKED, b"hello!", 1),
        (answer(b"hello", "Connection: close"), b"hello", 2),
        (answer(b"hello").replace(b"1.1", b"1.0"), b"hello", 2),
    ],
)
def test_every_framing_gives_its_body_and_frees_the_connection(
    raw: bytes, body: bytes, connections: int, slowly: bool
) -> None:
    server = Scripted(raw, answer(b"second"), slowly=slowly)

    async def main() -> None:
        async with listening(server) as url, client_of(DirectTransport(PLAIN, 4)) as client:
            assert (await client.get(url)).content == body
            assert (await client.get(url)).content == b"second"

    run(main)
    assert server.connections == connections


def test_bytes_after_a_body_end_the_connection() -> None:
    """All bytes arrive at once. If they arrive only after the next request was sent, it fails and is retried."""
    server = Scripted(answer(b"hello") + b"unrequested bytes", answer(b"second"))

    async def main() -> None:
        async with listening(server) as url, client_of(DirectTransport(PLAIN, 4)) as client:
            assert (await client.get(url)).content == b"hello"
            assert (await client.get(url)).content == b"second"

    run(main)
    assert server.connections == 2


def test_a_body_lands_in_the_callers_buffer_and_unread_bytes_end_the_connection() -> None:
    server = Scripted(answer(BIG), answer(BIG), answer(b"", "X-Head: yes", f"Content-Length: {9}", announced=False))

    async def main() -> None:
        async with listening(server) as url, client_of(DirectTransport(PLAIN, 4)) as client:
            buffer = bytearray(len(BIG))
            async with client.stream("GET", url) as response:
                body: Body = response.extensions["body"]
                got = 0
                while got < len(BIG):
                    got += await body.recv_into(memoryview(buffer)[got:])
                assert await body.recv_into(memoryview(bytearray(1))) == 0
            assert buffer == BIG
            async with client.stream("GET", url) as response:
                await response.extensions["body"].recv_into(memoryview(buffer)[:10])
            assert server.connections == 1
            head = await client.head(url)
            assert (head.headers["content-length"], head.content) == ("9", b"")

    run(main)
    assert server.connections == 2


def test_a_body_without_a_length_ends_with_its_connection() -> None:
    async def main() -> None:
        server = Scripted(answer(BIG, announced=False), closes=True)
        async with listening(server) as url, client_of(DirectTransport(PLAIN, 1)) as client:
            assert (await client.get(url)).content == BIG

    run(main)


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (answer(BIG)[:1000], httpx.RemoteProtocolError),
        (CHUNKED[:-5], httpx.RemoteProtocolError),
        (b"", httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\nContent-Le", httpx.RemoteProtocolError),
        (b"SSH-2.0-OpenSSH\r\n\r\n", httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000, httpx.RemoteProtocolError),
        (answer(b"hello", "Content-Length: 6"), httpx.RemoteProtocolError),
    ],
)
def test_answers_that_are_cut_or_not_http_raise_their_error(raw: bytes, error: type[httpx.TransportError]) -> None:
    server = Scripted(raw, raw, closes=True)

    async def twice() -> None:
        async with listening(server) as url, client_of(DirectTransport(PLAIN, 1)) as client:
            for _ in range(2):  # the failed request frees the only connection for the next one
                with pytest.raises(error):
                    await client.get(url)

    run(twice)
    assert server.connections == 2


def test_a_silent_server_and_a_full_pool_are_bounded_in_time() -> None:
    async def main() -> None:
        server = Scripted(answer(BIG)[:-1], answer(b""))
        async with listening(server) as url, client_of(DirectTransport(PLAIN, 1), read=1, pool=1) as client:
            async with client.stream("GET", url):
                with pytest.raises(httpx.PoolTimeout):
                    await client.get(url)
            server.answers.insert(0, answer(BIG)[:-1])
            with pytest.raises(httpx.ReadTimeout):
                await client.get(url)
            assert (await client.get(url)).content == b""

    run(main)


def test_idle_connections_count_and_a_dead_one_is_not_used() -> None:
    servers = [Scripted(*[answer(b"x")] * 3) for _ in range(3)]

    async def main() -> None:
        async with AsyncExitStack() as stack:
            first, second, third = [await stack.enter_async_context(listening(server)) for server in servers]
            client = await stack.enter_async_context(client_of(DirectTransport(PLAIN, 2)))
            for url in (first, second, third, second):
                assert (await client.get(url)).content == b"x"
            while servers[0].open:
                await trio.lowlevel.checkpoint()
            servers[2].closes = True
            assert (await client.get(third)).content == b"x"
            while servers[2].open:
                await trio.lowlevel.checkpoint()
            assert (await client.get(third)).content == b"x"

    run(main)
    assert [server.connections for server in servers] == [1, 1, 2]


def certificate(folder: Path, name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """TLS contexts of a server with a certificate for `name`, and of a client that trusts this certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "pem").write_bytes(private + signed.public_bytes(serialization.Encoding.PEM))
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(folder / "pem")
    return server, ssl.create_default_context(cafile=folder / "pem")


def test_tls_gives_the_same_answer_and_proves_the_host_name(tmp_path: Path) -> None:
    tls, trusting = certificate(tmp_path, "localhost")

    async def main() -> None:
        server = Scripted(answer(BIG), answer(BIG), CHUNKED)
        async with listening(server, tls) as url:
            named = url.replace("127.0.0.1", "localhost")
            async with client_of(DirectTransport(trusting, 1)) as client:
                for body in (BIG, BIG, b"hello!"):
                    assert (await client.get(named)).content == body
            assert server.connections == 1
            for context, other in ((trusting, url), (PLAIN, named)):
                async with client_of(DirectTransport(context, 1)) as client:
                    with pytest.raises(httpx.ConnectError):
                        await client.get(other)

    run(main)


def test_a_bad_host_name_or_header_raises_its_error(tmp_path: Path) -> None:
    tls, trusting = certificate(tmp_path, "localhost")

    async def main() -> None:
        async with listening(Scripted(), tls) as url, client_of(DirectTransport(trusting, 1)) as client:
            for name in (".local", "x" * 70):
                with pytest.raises(httpx.ConnectError):
                    await client.get(url.replace("127.0.0.1", name))
            with pytest.raises(httpx.LocalProtocolError):
                await client.get(url.replace("127.0.0.1", "localhost"), headers={"X": "a\nb"})

    run(main)


def test_a_port_without_a_listener_and_another_scheme() -> None:
    async def main() -> None:
        async with client_of(DirectTransport(PLAIN, 1)) as client:
            for url, error in (("http://127.0.0.1:1/", httpx.ConnectError), ("ftp://x/", httpx.UnsupportedProtocol)):
                for _ in range(2):
                    with pytest.raises(error):
                        await client.get(url)

    run(main)


@pytest.mark.parametrize("secure", [False, True])
def test_a_body_that_arrives_byte_by_byte_is_read_without_a_timer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secure: bool
) -> None:
    """The reader waits only for bytes that will certainly arrive. Otherwise it would wait forever."""
    monkeypatch.setattr(sockets, "GATHER_S", float("inf"))
    tls, trusting = certificate(tmp_path, "localhost")
    body = BIG[: sockets.RECORD_BYTES + 2000]
    server = Scripted(answer(body), answer(b"second"), slowly=True)

    async def main() -> None:
        async with listening(server, tls if secure else None) as url, client_of(DirectTransport(trusting, 1)) as client:
            for expected in (body, b"second"):
                assert (await client.get(url.replace("127.0.0.1", "localhost"))).content == expected

    run(main)
    assert server.connections == 1
