"""The largest inputs that somebody outside may send take no long turn of the loop to decode, whatever they contain."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
import pytest

from node.content.listings import INDEX, page_of_tags, referrers_of_type
from node.oci.challenges import MAX_CHALLENGE, parse_challenges, parse_token
from node.oci.manifests import MAX_MANIFEST, media_type_of, parse_manifest
from node.oci.strict_json import MAX_MARKS
from node.registry.authorization import MAX_TOKEN_REPLY
from node.registry.calls import Passed
from protocol import wire

LIMIT_S = 0.1
"""CPU time. The slowest of these takes a third of it on the machine of docs/benchmarks."""
DESCRIPTOR = b'{"digest":"sha256:' + b"ab" * 32 + b'","size":5,"artifactType":"x/y","mediaType":"a/b"}'


def filled(start: bytes, unit: bytes, end: bytes, most: int = MAX_MANIFEST, marks: int = 0) -> bytes:
    """`unit`, which has so many marks, as often as the bounds allow."""
    count = (most - len(start) - len(end)) // len(unit)
    count = min(count, (MAX_MARKS - 100) // marks) if marks else count
    return start + unit * count + end


BODIES = {
    "descriptors": filled(b'{"layers":[', DESCRIPTOR + b",", DESCRIPTOR + b"]}", marks=10),
    "objects": filled(b'{"layers":[],"x":[', b"{},", b"0]}", marks=2),
    "too many objects": filled(b'{"layers":[],"x":[', b"{},", b"0]}", marks=2) + b"{" * MAX_MARKS,
    "digits": filled(b'{"layers":[],"x":', b"9", b"}"),
    "integers": filled(b'{"layers":[],"x":[', b"9" * 4000 + b",", b"0]}", marks=1),
    "fractions": filled(b'{"layers":[],"x":[', b"9" * 120 + b".5e99,", b"0]}", marks=1),
    "nested": b"[" * MAX_MARKS,
    "deep": filled(b'{"layers":[],"x":', b'{"a":', b"}", marks=2),
    "escapes": filled(b'{"layers":[],"x":"', b"\\u00e9", b'"}'),
    "folded name": filled(b'{"layers":[],"', "ﬃ".encode(), b'":1}'),
    "names": filled(b'{"layers":[]', b',"' + b"s" * 100 + b'":1', b"}", marks=2),
    "braces": b"{" * MAX_MANIFEST,
    "nothing": bytes(MAX_MANIFEST),
}


def cpu_s(work: Callable[[], object]) -> float:
    began = time.thread_time()
    work()
    return time.thread_time() - began


@pytest.mark.parametrize("name", BODIES)
def test_a_manifest(name: str) -> None:
    """S-36"""
    body = BODIES[name]
    assert cpu_s(lambda: parse_manifest(body)) < LIMIT_S
    assert cpu_s(lambda: media_type_of(body, "a/b")) < LIMIT_S
    assert cpu_s(lambda: parse_token(body[:MAX_TOKEN_REPLY])) < LIMIT_S


def test_the_largest_manifest_that_is_read_has_all_its_entries() -> None:
    assert len(parse_manifest(BODIES["descriptors"]).layers) > 3000


def test_lists() -> None:
    tags = Passed(msgspec.json.encode({"name": "a", "tags": [f"v{number}" for number in range(MAX_MARKS - 10)]}), "x")
    assert cpu_s(lambda: page_of_tags(tags, {"n": "30000", "last": "v1"}, whole=True)) < LIMIT_S
    assert page_of_tags(tags, {"n": "5"}, whole=True).link
    start = b'{"schemaVersion":2,"mediaType":"' + INDEX.encode() + b'","manifests":['
    index = Passed(filled(start, DESCRIPTOR + b",", DESCRIPTOR + b"]}", marks=10), INDEX)
    assert cpu_s(lambda: referrers_of_type(index, "x/z")) < LIMIT_S
    assert referrers_of_type(index, "x/y").filters == "artifactType"


@pytest.mark.parametrize("unit", ["a ", "a=b,", 'a="\\"",', ",", " \t,", "a", "=", '"'])
def test_challenges(unit: str) -> None:
    header = "Bearer " + unit * (MAX_CHALLENGE // len(unit))
    assert cpu_s(lambda: parse_challenges(header)) < LIMIT_S


def test_the_largest_holdings() -> None:
    shards = [[4, 1, index % 5, b"\xff" * 60_000] for index in range(wire.MAX_BITMAPS)]
    header = msgspec.msgpack.encode((1, [34, b"\xff" * wire.MAX_BITMAP, shards]))
    assert len(header) > wire.MAX_HEADER * 0.9
    heads = wire.Heads(wire.REPLIES)
    heads.feed(wire.PREFIX.pack(len(header), 0) + header)
    assert cpu_s(heads.next) < LIMIT_S
