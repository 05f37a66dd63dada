"""Every decoder of external bytes, as a function of bytes that may raise only the decoder's named error.

Any other exception or failed assertion is a finding. `tests/property/test_fuzz_corpus.py` runs all targets on their
seeds, on the corpus and on mutations of both. `python -m tests.fuzz` runs them for a given time.
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

from cache.disk_index import parse_row
from node.config.schema import load
from node.content.listings import Listings, page_of_tags, referrers_of_type
from node.control.routes import Route, control_handler, control_routes, image_routes
from node.identity.certificates import Authority, Credentials, issued_by, new_authority, peer_of
from node.identity.identity import Identity, from_pem
from node.identity.verifier import Verifier
from node.membership.passports import Passports
from node.membership.peers_file import STATEMENTS, RememberedPeers
from node.mirror.mirror import LIMITS, Mirror, own_link
from node.oci.byte_ranges import parse_range
from node.oci.challenges import parse_challenges, parse_token, relayed, token_request
from node.oci.layout import read_layout
from node.oci.manifests import descriptors, parse_manifest
from node.oci.tar import read_entries
from node.registry.attempts import FailedAttemptError
from node.registry.bodies import body_start
from node.registry.calls import Passed
from node.registry.docker_config import parse_docker_config
from node.registry.transport import DirectTransport, Wire, origin_of
from node.web.server import Handler, Limits, Request, Server
from protocol import introduction, wire
from protocol.errors import BadInputError, NotFoundError, PeerMisbehavedError
from protocol.ids import BLOCK_SIZE, Digest, ObjectRef, PeerId
from protocol.records import Record, check_record
from protocol.statements import Author
from protocol.wire import check_statement
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
        introduction.decode_hello(data, ME.peer_id)


def introduction_members(data: bytes) -> None:
    with suppress(PeerMisbehavedError):
        members = introduction.decode_members(data, ME.peer_id)
        assert members[0].peer_id == ME.peer_id


def record(data: bytes) -> None:
    """A record in a row of the disk's index, and one received from a peer."""
    with suppress(BadInputError):
        stored = parse_row((str(DIGEST), 0, 0, 0, 0, bytes(32), data, None, None))
        assert stored.record.digest == str(DIGEST)
    with suppress(msgspec.MsgspecError, UnicodeDecodeError):
        said = msgspec.msgpack.decode(data, type=Record)
        with suppress(PeerMisbehavedError):
            check_record(said, ObjectRef(DIGEST, 5), 0)


def remembered_peers(data: bytes) -> None:
    with suppress(msgspec.MsgspecError, UnicodeDecodeError):
        file = msgspec.msgpack.decode(data, type=RememberedPeers)
        for statement in STATEMENTS.decode(file.statements):
            with suppress(BadInputError, PeerMisbehavedError):
                check_statement(statement)
                PASSPORTS.check(statement, None)


# Certificates

AUTHORITY_PEM = new_authority()
ME = Identity.of(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
CREDENTIALS = Credentials.issued(
    Authority(from_pem(Path("authority"), AUTHORITY_PEM), x509.load_pem_x509_certificate(AUTHORITY_PEM)), ME, "node"
)
VERIFIER = Verifier(CREDENTIALS)
PASSPORTS = Passports(Author(ME.peer_id, ME.sign, lambda: b""), VERIFIER.subject_of, VERIFIER.refusal)


def certificate(data: bytes) -> None:
    for check in (peer_of, lambda data: issued_by(data, CREDENTIALS.authority)):
        with suppress(PeerMisbehavedError):
            peer: PeerId = check(data)
            assert peer
            parsed = x509.load_der_x509_certificate(data)
            assert parsed.public_bytes(Encoding.DER)


# Registries


def manifest(data: bytes) -> None:
    parsed = parse_manifest(data)
    for kind in ("manifests", "blobs"):
        for descriptor in descriptors(parsed, kind):
            assert descriptor.ref.size >= 0
            assert descriptor.media_type.isascii()
            assert descriptor.media_type.isprintable()


def token(data: bytes) -> None:
    parsed = parse_token(data)
    if parsed is not None:
        assert parsed[0].isascii()
        assert parsed[0].isprintable()
        assert 0 < parsed[1] < 3600


def challenge(data: bytes) -> None:
    challenges = parse_challenges(data.decode("latin-1"))
    for insecure in (False, True):
        for asked in challenges:
            token_request(asked, insecure=insecure, scope="repository:a:pull")
        header = relayed(challenges, insecure=insecure, repository="a", basic=insecure)
        assert header.isascii()
        assert not header or header.isprintable()


def docker_config(data: bytes) -> None:
    with suppress(ValueError):
        parsed = parse_docker_config(data)
        parsed.of(["docker.io"])
        parsed.helper(["docker.io"])


def listing(data: bytes) -> None:
    passed = Passed(data, "application/json")
    for whole in (True, False):
        for query in ({}, {"n": "2"}, {"n": "2", "last": "b"}):
            page = page_of_tags(passed, query, whole=whole)
            assert isinstance(page.body, bytes)
    referrers_of_type(passed, "sig/a")


def link(data: bytes) -> None:
    header = own_link(data.decode("latin-1"), Request("GET", "/v2/a/tags/list", {"ns": "docker.io"}, {}))
    assert header.isascii()
    assert not header or header.isprintable()


def content_range(data: bytes) -> None:
    """The first line is the status. The others are header lines."""
    status, *lines = data.split(b"\n")
    headers = [
        (name.strip(), value.strip()) for name, colon, value in (line.partition(b":") for line in lines) if colon
    ]
    response = httpx.Response(200 if status == b"200" else 206, headers=headers)
    with suppress(FailedAttemptError):
        assert body_start(response, 10, 20, SIZE) in (0, 10)


def http_answer(data: bytes) -> None:
    """A registry's answer over a socket, head and body."""

    async def main() -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.setblocking(False)
            sent = theirs.send(data)
            theirs.shutdown(socket.SHUT_WR)

            class Joined(DirectTransport):
                async def connect(self, url: httpx.URL, connect_s: float | None) -> Wire:
                    return Wire(ours, origin_of(url))

            timeout = dict.fromkeys(("connect", "read", "write", "pool"), 1.0)
            with suppress(httpx.TransportError):
                response = await Joined(cast(Any, None), 1).handle_async_request(
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
    """Collects the failures that the server logs as its own."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


_COMPLAINTS = _Complaints()
logging.getLogger("node.web.server").addHandler(_COMPLAINTS)


def _served(handler: Handler, limits: Limits) -> Target:
    """A target that sends bytes to our server: answers must be well-formed, and none a failure of the server itself."""

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
    """An image API that holds no image."""

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
    """A fake configuration file."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read_text(self, encoding: str) -> str:
        return self._data.decode(encoding)


def config(data: bytes) -> None:
    with suppress(BadInputError):
        load(cast(Path, _Text(data)))


def archive(data: bytes) -> None:
    def read(offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= len(data), "it reads only within the data"
        return data[offset : offset + length]

    with suppress(BadInputError):
        for image in read_layout(read_entries(read, len(data)), read, None):
            assert image.objects
            assert not math.isnan(sum(packed.ref.size for packed in image.objects))


def _control_routes() -> list[Route]:
    return [*control_routes(FakeControl()), *image_routes(cast(Any, _Refusing()))]


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
    "control": _served(control_handler(_control_routes()), Limits()),
    "config": config,
    "archive": archive,
}
