"""Well-formed bytes for each target, from which fuzzing starts. tests/fuzz/corpus holds the inputs found from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import msgspec

from protocol import introduction, messages, wire
from protocol.ids import ObjectRef, Shard
from protocol.members import Member, News
from protocol.records import make_record
from protocol.shard_proofs import make_proof
from protocol.statements import Author
from tests.fuzz.targets import CREDENTIALS, DIGEST, ME, TARGETS
from tests.support.archives import Layout

CORPUS = Path(__file__).parent / "corpus"
MEMBER = Member(ME.peer_id, "node-1", "site", ("10.0.0.1:4502",))
AUTHOR = Author(ME.peer_id, ME.sign, lambda: CREDENTIALS.certificate)
STATEMENT = AUTHOR.state(MEMBER, 1)
NEWS = News((STATEMENT, STATEMENT.bare()), (AUTHOR.suspect(ME.peer_id, 1),), held=1)
RECORD = make_record(ObjectRef(DIGEST, 5), 0, bytes(32), signer=ME.peer_id, sign=ME.sign)
PROOF = make_proof(RECORD, Shard(4, 1, 2), bytes(2), maker=ME.peer_id, sign=ME.sign)
NAME = str(DIGEST)

_SHARDS = (NAME, 0, 1, 5, 4, 1, 2, 1, "docker.io/org/app#blobs")
_REQUESTS: Sequence[messages.Request] = (
    messages.GetShards(*_SHARDS),
    messages.GetHoldings(NAME),
    messages.FindHolders(NAME),
    messages.Announce((NAME,)),
    messages.Resolve("docker.io/org/app#manifests", "latest"),
    messages.Ping(NEWS, bytes(16)),
    messages.PingRequest(ME.peer_id, bytes(16), NEWS),
    messages.Sync(STATEMENT, bytes(32)),
)
_REPLIES: Sequence[messages.Reply] = (
    messages.ShardFound(4, 1, 2, RECORD),
    messages.ShardFound(4, 1, 2, RECORD, origin=bytes(16), proof=PROOF),
    messages.HoldingsFound(b"\x01", ((4, 1, 0, b"\x01"),)),
    messages.Holders((ME.peer_id,)),
    messages.Done(),
    messages.Waiting(((7, 1),)),
    messages.Resolved(NAME, 5, "a/b", 1.0),
    messages.Pong(NEWS, bytes(64)),
    messages.SyncReply((STATEMENT,), bytes(8), bytes(16), more=True),
    messages.Failed("busy", "later"),
)
_DESCRIPTOR = f'{{"mediaType":"application/x.a+b","digest":"{NAME}","size":5}}'
_CONFIG = """[node]
name = "a"
[peers]
listen = "/ip4/127.0.0.1/tcp/4501"
bulk = "127.0.0.1:4502"
[cache]
disk = "10GiB"
min_free = "5%"
[[upstream]]
name = "docker.io"
url = ["https://a.test", "https://b.test"]
rate = "2MiB"
daily = "5GiB"
hours = ["22:00-06:00"]
[[tags]]
match = "*:latest"
ttl = "10s"
cache = false
"""


def _framed(message: messages.Request | messages.Reply) -> bytes:
    length = wire.body_length_of(message)
    return wire.encode_head(7, message, length) + bytes(length)


def _archive() -> bytes:
    layout = Layout()
    layout.name(layout.index([layout.manifest([b"layer"], "amd64")]), "docker.io/org/app:v1")
    return layout.pack()


def _ask(target: str, *headers: str, method: str = "GET", body: str = "") -> bytes:
    length = [f"Content-Length: {len(body)}"] if body else []
    return "\r\n".join([f"{method} {target} HTTP/1.1", "Host: x", *length, *headers, "", body]).encode()


_SEEDS: Mapping[str, Sequence[bytes]] = {
    "request": [_framed(message) for message in _REQUESTS],
    "reply": [_framed(message) for message in _REPLIES],
    "bulk_hello": [wire.encode_hello("bulk"), wire.encode_hello("control", plain=True)],
    "introduction_hello": [introduction.encode_hello(CREDENTIALS.certificate)[4:]],
    "introduction_members": [introduction.encode_members([STATEMENT])[4:]],
    "record": [msgspec.msgpack.encode(RECORD)],
    "remembered_peers": [msgspec.msgpack.encode((2, [STATEMENT]))],
    "certificate": [CREDENTIALS.certificate, CREDENTIALS.authority],
    "manifest": [
        f'{{"schemaVersion":2,"config":{_DESCRIPTOR},"layers":[{_DESCRIPTOR}]}}'.encode(),
        f'{{"manifests":[{_DESCRIPTOR[:-1]},"platform":{{"os":"linux","architecture":"arm64"}}}}]}}'.encode(),
    ],
    "token": [b'{"token":"abc","expires_in":300}', b'{"access_token":"a.b-c","issued_at":"x"}'],
    "challenge": [
        b'Bearer realm="https://auth.test/token",service="r",scope="repository:a:pull"',
        b'Basic realm="x", Bearer realm="http://a", error="a\\"b"',
        b"Negotiate YII=, Digest qop=auth",
    ],
    "docker_config": [
        b'{"auths":{"https://index.docker.io/v1/":{"auth":"dXNlcjpwYXNz"}},"credHelpers":{"a.test":"ecr-login"}}',
        b'{"auths":{"b.test":{"identitytoken":"x"}},"credsStore":"pass"}',
    ],
    "listing": [
        b'{"name":"a","tags":["a","b","c"]}',
        f'{{"schemaVersion":2,"mediaType":"x","manifests":[{_DESCRIPTOR[:-1]},"artifactType":"sig/a"}}]}}'.encode(),
    ],
    "link": [b'</v2/a/tags/list?n=2&last=b>; rel="next"', b"<https://x.test/v2/a?last=%E4%BD%A0>;rel=next"],
    "content_range": [b"206\nContent-Range: bytes 10-19/1000", b"200\nContent-Length: 1000", b"206\ncontent-range: x"],
    "http_answer": [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 206 Partial\r\nContent-Range: bytes 0-1/2\r\n\r\nab",
        b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n",
    ],
    "byte_range": [b"bytes=0-99", b"bytes=-5, 10-, 3-4"],
    "mirror": [
        _ask("/v2/"),
        _ask("/v2/org/app/manifests/latest?ns=docker.io", "Accept: */*", "If-None-Match: *"),
        _ask(f"/v2/docker.io/org/app/blobs/{NAME}", "Range: bytes=0-1", method="HEAD"),
        _ask("/v2/org/app/tags/list?n=1&last=a&ns=docker.io"),
        _ask(f"/v2/org/app/referrers/{NAME}?artifactType=a/b&ns=docker.io", "Authorization: Bearer x"),
        _ask("/v2/org/app/blobs/uploads/", "Expect: 100-continue", method="POST", body="abc"),
    ],
    "control": [
        _ask("/status") + _ask("/cache"),
        _ask("/why?image=docker.io/library/alpine:3"),
        _ask("/pull?image=alpine&all_platforms=1", method="POST"),
        _ask("/prefetch", method="POST", body='{"images":["alpine:3"],"rate":5,"window":"22:00-06:00"}'),
        _ask("/gc?older_than=7d&to=5GiB&dry_run=1", method="POST"),
        _ask("/export?image=alpine:3&platforms=linux/arm64", method="POST"),
        _ask("/tags?match=*%3Alatest"),
    ],
    "config": [_CONFIG.encode()],
    "archive": [_archive()],
}


@cache
def seeds(target: str) -> tuple[bytes, ...]:
    """The seeds of this file and those of the corpus."""
    kept = sorted((CORPUS / target).glob("*"))
    return (*_SEEDS[target], *(path.read_bytes() for path in kept))


assert _SEEDS.keys() == TARGETS.keys()
