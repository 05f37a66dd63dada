"""Manifests that could be read in two ways are read in none: duplicate members, other cases, odd sizes and shapes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.oci.challenges import parse_token
from node.oci.manifests import Manifest, descriptors, media_type_of, parse_manifest, read_manifest
from node.oci.strict_json import MAX_MARKS, decode_strictly
from protocol.errors import BadInputError

DIGEST = "sha256:" + "ab" * 32
LAYER = {"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": DIGEST, "size": 7}
MANIFEST: dict[str, Any] = {
    "schemaVersion": 2,
    "mediaType": "application/vnd.oci.image.manifest.v1+json",
    "config": {**LAYER, "mediaType": "application/vnd.oci.image.config.v1+json"},
    "layers": [
        {**LAYER, "platform": {"os": "linux", "architecture": "amd64"}, "annotations": {"Size": "x", "size": "y"}}
    ],
    "annotations": {"Layers": "of no meaning here"},
}
PLACES = [(), ("config",), ("layers", 0), ("layers", 0, "platform")]
"""Objects of a manifest whose members have a meaning."""


def at(document: Any, place: tuple[str | int, ...]) -> Any:
    for step in place:
        document = document[step]
    return document


def cased(name: str) -> st.SearchStrategy[str]:
    """Names that Go's encoding/json takes for `name`: other cases, and the letters whose simple fold is ASCII."""
    others = {"k": "kK\u212a", "s": "sS\u017f"}
    letters = [others.get(letter.lower(), letter.lower() + letter.upper()) for letter in name]
    return st.tuples(*map(st.sampled_from, letters)).map("".join).filter(lambda text: text != name)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


def test_a_manifest_is_read() -> None:
    manifest = read_manifest(json.dumps(MANIFEST).encode())
    assert [str(blob.ref.digest) for blob in descriptors(manifest, "blobs")] == [DIGEST, DIGEST]


@given(json_values)
def test_documents_are_read_as_by_other_decoders(value: Any) -> None:
    assert decode_strictly(json.dumps(value).encode()) == value


@given(st.data())
def test_a_member_in_another_case_makes_it_no_manifest(data: st.DataObject) -> None:
    """S-36"""
    document = json.loads(json.dumps(MANIFEST))
    part = at(document, data.draw(st.sampled_from(PLACES)))
    name = data.draw(st.sampled_from([name for name in part if name != "annotations"]))
    part[data.draw(cased(name))] = data.draw(st.sampled_from([part[name], [], None]))
    if data.draw(st.booleans()):
        del part[name]
    assert parse_manifest(json.dumps(document).encode()) == Manifest()


@given(st.data())
def test_a_member_that_occurs_twice_makes_it_no_manifest(data: st.DataObject) -> None:
    """S-36"""
    place = data.draw(st.sampled_from([*PLACES, ("annotations",), ("layers", 0, "annotations")]))
    document = json.loads(json.dumps(MANIFEST))
    part = at(document, place)
    name = data.draw(st.sampled_from(list(part)))
    again = name.replace("e", "\\u0065", 1) if data.draw(st.booleans()) else name
    marker = "MARK"
    part[marker] = None
    text = json.dumps(document).replace(f'"{marker}": null', f'"{again}": {json.dumps(part[name])}', 1)
    assert parse_manifest(text.encode()) == Manifest()


@pytest.mark.parametrize("size", [-1, 1.0, "7", None, True, 1 << 63, 10**30, []])
def test_a_size_that_is_none_makes_it_no_manifest(size: object) -> None:
    body = json.dumps({**MANIFEST, "layers": [{**LAYER, "size": size}]}).encode()
    assert parse_manifest(body) == Manifest()
    assert media_type_of(body, "a/b") is None


def test_a_missing_size_makes_it_no_manifest() -> None:
    assert parse_manifest(json.dumps({**MANIFEST, "layers": [{"digest": DIGEST}]}).encode()) == Manifest()


def test_a_size_beyond_all_objects_is_left_out() -> None:
    manifest = read_manifest(json.dumps({**MANIFEST, "layers": [LAYER, {**LAYER, "size": 1 << 62}]}).encode())
    assert [blob.ref.size for blob in descriptors(manifest, "blobs")] == [7, 7]


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbf{}",
        "{}".encode("utf-16"),
        b"{} {}",
        b'{"a": NaN}',
        b'{"a": 1e5, "a": 2}',
        b"[" * 100_000,
        b"[" + b"1," * MAX_MARKS + b"1]",
        b"9" * 10_000,
    ],
)
def test_what_others_may_read_in_another_way_is_refused(data: bytes) -> None:
    """S-36"""
    with pytest.raises(BadInputError):
        decode_strictly(data)


@pytest.mark.parametrize(
    "reply", [b'{"token":"a","token":"b"}', b'{"token":"a","Token":"b"}', b'{"token":"a","EXPIRES_IN":1}', b"[]", b"7"]
)
def test_a_token_reply_that_could_be_read_in_two_ways_is_none(reply: bytes) -> None:
    """S-63"""
    assert parse_token(reply) is None
    assert parse_token(b'{"token":"a","other":{}}') is not None
