"""What names stand for, remembered on disk, and manifests of any shape."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from node.content.name_table import NameTable
from node.oci.manifests import MAX_MANIFEST_ENTRIES, Resolved, descriptors, media_type_of, parse_manifest
from protocol.ids import Digest, ObjectRef

SOURCE = "origin.test/app#manifests"
FOUND = Resolved(ObjectRef(Digest("sha256", "ab" * 32), 123), "application/vnd.oci.image.index.v1+json", 5.0)


def test_a_name_is_remembered_with_its_age_across_a_restart(tmp_path: Path) -> None:
    table = NameTable(tmp_path / "names.sqlite")
    table.put(SOURCE, "v1", FOUND)
    table.close()
    found = NameTable(tmp_path / "names.sqlite").get(SOURCE, "v1")
    assert found is not None
    assert (found.ref, found.media_type) == (FOUND.ref, FOUND.media_type)
    assert 5.0 <= found.age_s < 15.0


def test_a_clock_that_was_set_back_makes_a_name_old_not_young(tmp_path: Path) -> None:
    table = NameTable(tmp_path / "names.sqlite")
    table.put(SOURCE, "v1", Resolved(FOUND.ref, FOUND.media_type, -3600.0))
    found = table.get(SOURCE, "v1")
    assert found is not None
    assert found.age_s > 1e6


def test_a_damaged_table_is_started_anew(tmp_path: Path) -> None:
    path = tmp_path / "names.sqlite"
    path.write_bytes(b"this is no database" * 1000)
    table = NameTable(path)
    table.put(SOURCE, "v1", FOUND)
    assert table.get(SOURCE, "v1") is not None


@pytest.mark.parametrize(
    ("body", "told", "found"),
    [
        (b'{"mediaType":"x/own","layers":[]}', "x/told", "x/own"),
        (b'{"layers":[]}', "application/vnd.docker.distribution.manifest.v2+json", None),
        (b'{"layers":[]}', "application/vnd.oci.image.index.v1+json", "application/vnd.oci.image.manifest.v1+json"),
        (b'{"manifests":[]}', "x/told", "application/vnd.oci.image.index.v1+json"),
        (b'{"schemaVersion":1}', "application/vnd.docker.distribution.manifest.v1+json", None),
        (b'{"mediaType":"not a type","x":1}', "x/told", ""),
        (b"[]", "x/told", ""),
        (b"\xff", "x/told", ""),
    ],
)
def test_a_manifest_tells_its_own_type(body: bytes, told: str, found: str | None) -> None:
    """`found` None: what was told fits; empty: the bytes do not tell."""
    assert media_type_of(body, told) == (told if found is None else found or None)


def test_a_row_that_the_disk_altered_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "names.sqlite"
    table = NameTable(path)
    table.put(SOURCE, "v1", FOUND)
    table.put(SOURCE, "v2", FOUND)
    table.close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE name SET digest = 'sha256:no' WHERE reference = 'v1'")
    table = NameTable(path)
    assert table.get(SOURCE, "v1") is None
    assert [reference for _, reference, _ in table.images()] == ["v2"]
    assert [one.tag for one in table.tags("*")] == ["v2"]


def test_what_a_disk_does_not_take_is_remembered_until_the_node_stops(tmp_path: Path, caplog) -> None:
    table = NameTable(tmp_path / "names.sqlite")
    table._database.run("PRAGMA query_only = ON", ())
    table.put(SOURCE, "v1", FOUND)
    table.trim()
    found = table.get(SOURCE, "v1")
    assert found is not None
    assert found.ref == FOUND.ref
    assert NameTable(tmp_path / "names.sqlite").get(SOURCE, "v1") is None
    assert caplog.text.count("readonly database") == 2


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{", b"\xff", b'{"layers": 3}', b'{"layers": [{"digest": "x", "size": -1}]}', b"[" * 100_000,
     b'{"manifests": [{"digest": "sha256:' + b"ab" * 32 + b'", "size": 1, "platform": ' + b"[" * 5000],
)  # fmt: skip
def test_what_is_no_manifest_names_nothing(body: bytes) -> None:
    manifest = parse_manifest(body)
    assert [*descriptors(manifest, "blobs"), *descriptors(manifest, "manifests")] == []


def test_descriptors_are_bounded_and_their_media_types_clean() -> None:
    layer = {"digest": "sha256:" + "cd" * 32, "size": 7, "mediaType": "a/b\r\nX-Evil: 1"}
    manifest = parse_manifest(msgspec.json.encode({"layers": [layer] * (MAX_MANIFEST_ENTRIES + 5)}))
    found = list(descriptors(manifest, "blobs"))
    assert len(found) == MAX_MANIFEST_ENTRIES
    assert {one.media_type for one in found} == {"application/octet-stream"}
