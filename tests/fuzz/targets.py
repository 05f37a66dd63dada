"""Every decoder of bytes from outside, as a function of bytes: what it refuses it refuses by its named error.

Any other exception is a finding, and so is what the assertions here deny. `tests/property/test_fuzz_corpus.py` runs all
of them on their seeds, the corpus and changes of both; `python -m tests.fuzz` for as long as it is told.
"""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import httpx
import msgspec
import trio
import trio.testing
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from cache.disk_index import _parse as parse_row
from node.config.schema import load
from node.content.listings import Listings, _of_type, _page
from node.control.image_routes import offline_routes
from node.control.routes import control_handler
from node.identity.certificates import Authority, Credentials, _new_authority, issued_by, peer_of
from node.identity.identity import Identity, from_pem
from node.membership.peers_file import _File as RememberedFile
from node.mirror.mirror import LIMITS, Mirror, _own_link
from node.oci.byte_ranges import parse_range
from node.oci.challenges import parse_challenges, parse_token, relayed, token_request
from node.oci.layout import read_layout
from node.oci.manifests import descriptors, parse_manifest
from node.oci.tar import read_entries
from node.registry.docker_config import parse_docker_config
from node.registry.transport import DirectTransport, _origin, _Wire
from node.registry.upstreams import Passed, _body_start, _FailedError
from node.web.server import Handler, Limits, Request, Server
from protocol import introduction, wire
from protocol.errors import BadInputError, NotFoundError, PeerMisbehavedError
from protocol.ids import BLOCK_SIZE, Digest, ObjectRef, PeerId
from protocol.records import Record, check_record
from tests.support.access import Everybody
from tests.support.fake_control import FakeControl
from tests.support.memory_library import MemoryLibrary

Target = Callable[[bytes], object]
SIZE = 1000
DIGEST = Digest("sha256", "ab" * 32)
URL = httpx.URL("http://registry.test/v2/")
ALLOWED_STATUS = (501, 503, 505)

# Members


def _frames(kind: Any) -> Target:
    def target(data: bytes) -> None:
        heads = wire.Heads(kind)
        heads.feed(data)
        with suppress(PeerMisbehavedError):
            while (head := heads.next()) is not None:
                assert 0 <= head.body_length <= BLOCK_SIZE
                wire.encode_head(head.request_id, head.message, head.body_length)  # type: ignore[arg-type]
                heads.take(memoryview(bytearray(head.body_length)))

    return target


def bulk_hello(data: bytes) -> None:
    heads: wire.Heads[Any] = wire.Heads(wire.REQUESTS)
    heads.feed(data)
    with suppress(PeerMisbehavedError):
        hello = heads.hello()
        assert hello is None or hello.magic == wire.MAGIC


def introduction_hello(data: bytes) -> None:
    with suppress(PeerMisbehavedError):
        introduction.decode_hello(data)


def introduction_members(data: bytes) -> None:
    with suppress(PeerMisbehavedError):
        members = introduction.decode_members(data, ME.peer_id)
        assert members[0].peer_id == ME.peer_id


def record(data: bytes) -> None:
    """In a row of the disk's index, and as somebody's word for a block."""
    with suppress(BadInputError):
        stored = parse_row((str(DIGEST), 0, 0, 0, 0, bytes(32), data, 1))
        assert stored.record.digest == str(DIGEST)
    with suppress(msgspec.MsgspecError, UnicodeDecodeError):
        said = msgspec.msgpack.decode(data, type=Record)
        with suppress(PeerMisbehavedError):
            check_record(said, ObjectRef(DIGEST, 5), 0)


def remembered_peers(data: bytes) -> None:
    with suppress(msgspec.MsgspecError, UnicodeDecodeError):
        msgspec.msgpack.decode(data, type=RememberedFile)


# Certificates

AUTHORITY_PEM = _new_authority()
ME = Identity.of(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
CREDENTIALS = Credentials.issued(
    Authority(from_pem(Path("authority"), AUTHORITY_PEM), x509.load_pem_x509_certificate(AUTHORITY_PEM)), ME, "node"
)


def certificate(data: bytes) -> None:
    for check in (peer_of, lambda data: issued_by(data, CREDENTIALS.authority)):
        with suppress(PeerMisbehavedError):
            peer: PeerId = check(data)
            assert peer
            parsed = x509.load_der_x509_certificate(data)
            assert parsed.public_bytes(Encoding.DER)


# Registries


def manifest(data: bytes) -> None:
    found = parse_manifest(data)
    for kind in ("manifests", "blobs"):
        for one in descriptors(found, kind):
            assert one.ref.size >= 0
            assert one.media_type.isascii()
            assert one.media_type.isprintable()


def token(data: bytes) -> None:
    found = parse_token(data)
    if found is not None:
        assert found[0].isascii()
        assert found[0].isprintable()
        assert 0 < found[1] < 3600


def challenge(data: bytes) -> None:
    challenges = parse_challenges(data.decode("latin-1"))
    for insecure in (False, True):
        for one in challenges:
            token_request(one, insecure=insecure, scope="repository:a:pull")
        header = relayed(challenges, insecure=insecure, repository="a", basic=insecure)
        assert header.isascii()
        assert not header or header.isprintable()


def docker_config(data: bytes) -> None:
    with suppress(ValueError):
        found = parse_docker_config(data)
        found.of(["docker.io"])
        found.helper(["docker.io"])


def listing(data: bytes) -> None:
    passed = Passed(data, "application/json")
    for whole in (True, False):
        for query in ({}, {"n": "2"}, {"n": "2", "last": "b"}):
            page = _page(passed, query, whole=whole)
            assert isinstance(page.body, bytes)
    _of_type(passed, "sig/a")


def link(data: bytes) -> None:
    found = _own_link(data.decode("latin-1"), Request("GET", "/v2/a/tags/list", {"ns": "docker.io"}, {}))
    assert found.isascii()
    assert not found or found.isprintable()


def content_range(data: bytes) -> None:
    """First line: the status; then header lines."""
    status, *lines = data.split(b"\n")
    headers = [
        (name.strip(), value.strip()) for name, colon, value in (line.partition(b":") for line in lines) if colon
    ]
    response = httpx.Response(200 if status == b"200" else 206, headers=headers)
    with suppress(_FailedError):
        assert _body_start(response, 10, 20, SIZE) in (0, 10)


def http_answer(data: bytes) -> None:
    """A registry's answer over a socket, head and body."""

    async def main() -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.setblocking(False)
            sent = theirs.send(data)
            theirs.shutdown(socket.SHUT_WR)
            transport = DirectTransport(cast(Any, None), 1)

            async def connected(url: httpx.URL, connect_s: float | None) -> _Wire:
                return _Wire(ours, _origin(url))

            cast(Any, transport)._connected = connected
            timeout = dict.fromkeys(("connect", "read", "write", "pool"), 1.0)
            with suppress(httpx.TransportError):
                response = await transport.handle_async_request(
                    httpx.Request("GET", URL, extensions={"timeout": timeout})
                )
                got, buffer = 0, memoryview(bytearray(4096))
                while count := await response.extensions["body"].recv_into(buffer):
                    got += count
                    assert got <= sent
                await response.aclose()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.1))


# Clients and operators


def byte_range(data: bytes) -> None:
    spans = parse_range(data.decode("latin-1"), SIZE)
    for span in spans or ():
        assert 0 <= span.start < span.stop <= SIZE
    assert len(spans or ()) < 2 or sum(span.length for span in spans or ()) <= SIZE


class _Complaints(logging.Handler):
    """What the server logs as a failure of its own."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


_COMPLAINTS = _Complaints()
logging.getLogger("node.web.server").addHandler(_COMPLAINTS)


def _served(handler: Handler, limits: Limits) -> Target:
    """Bytes on a connection to a server of ours: well-formed answers, none of them a failure of the server's own."""

    def target(data: bytes) -> None:
        _COMPLAINTS.records.clear()
        answer = trio.run(_exchanged, handler, limits, data, clock=trio.testing.MockClock(autojump_threshold=0.1))
        assert not _COMPLAINTS.records, _COMPLAINTS.records[0].getMessage()
        head = answer.partition(b"\r\n")[0]
        if head:
            version, status, _ = head.decode("ascii").split(" ", 2)
            assert version == "HTTP/1.1"
            assert int(status) < 500 or int(status) in ALLOWED_STATUS, head

    return target


async def _exchanged(handler: Handler, limits: Limits, data: bytes) -> bytes:
    ours, theirs = trio.socket.socketpair()
    answer = bytearray()

    async def ask() -> None:
        with suppress(OSError):
            await trio.SocketStream(ours).send_all(data)
            ours.shutdown(trio.socket.SHUT_WR)
            while part := await ours.recv(1 << 16):
                answer.extend(part)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await Server(handler, limits).serve(trio.SocketStream(theirs))
    ours.close()
    return bytes(answer)


class _Refusing:
    """An offline API that has nothing."""

    def __getattr__(self, name: str) -> Callable[..., object]:
        def refuse(*arguments: object, **named: object) -> object:
            raise NotFoundError(name)

        return refuse


def _mirror() -> Handler:
    async def passthrough(*arguments: object) -> Passed:
        return Passed(b'{"name":"org/app","tags":["b","a"]}', "application/json", '</v2/x?last=b>; rel="next"')

    library = MemoryLibrary("org/app")
    library.tag("latest", b'{"schemaVersion":2}', "application/vnd.oci.image.manifest.v1+json")
    listings = Listings(cast(Any, passthrough), cast(Any, library), Path(":memory:"), 1e6)
    return Mirror(cast(Any, library), ("docker.io",), listings, cast(Any, Everybody())).handle


class _Text:
    """Stands for a configuration file."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read_text(self, encoding: str) -> str:
        return self._data.decode(encoding)


def config(data: bytes) -> None:
    with suppress(BadInputError):
        load(cast(Path, _Text(data)))


def archive(data: bytes) -> None:
    def read(offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= len(data), "it asks only for what is there"
        return data[offset : offset + length]

    with suppress(BadInputError):
        for image in read_layout(read_entries(read, len(data)), read, None):
            assert image.objects
            assert not math.isnan(sum(packed.ref.size for packed in image.objects))


TARGETS: Mapping[str, Target] = {
    "request": _frames(wire.REQUESTS),
    "reply": _frames(wire.REPLIES),
    "bulk_hello": bulk_hello,
    "introduction_hello": introduction_hello,
    "introduction_members": introduction_members,
    "record": record,
    "remembered_peers": remembered_peers,
    "certificate": certificate,
    "manifest": manifest,
    "token": token,
    "challenge": challenge,
    "docker_config": docker_config,
    "listing": listing,
    "link": link,
    "content_range": content_range,
    "http_answer": http_answer,
    "byte_range": byte_range,
    "mirror": _served(_mirror(), LIMITS),
    "control": _served(control_handler(FakeControl(), offline_routes(cast(Any, _Refusing()))), Limits()),
    "config": config,
    "archive": archive,
}
