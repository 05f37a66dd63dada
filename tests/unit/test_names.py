"""Names that are kept on disk, and manifests of any shape."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from node.content.name_table import NameTable
from node.oci.manifests import MAX_MANIFEST_ENTRIES, Resolved, descriptors, media_type_of, parse_manifest
from protocol.ids import Digest, ObjectRef
from tests.support.failing_sqlite import Calls, failing

SOURCE = "origin.test/app#manifests"
INDEX = Resolved(ObjectRef(Digest("sha256", "ab" * 32), 123), "application/vnd.oci.image.index.v1+json", 5.0)


def test_a_name_is_remembered_with_its_age_across_a_restart(tmp_path: Path) -> None:
    table = NameTable(tmp_path / "names.sqlite")
    table.put(SOURCE, "v1", INDEX)
    table.close()
    resolved = NameTable(tmp_path / "names.sqlite").get(SOURCE, "v1")
    assert resolved is not None
    assert (resolved.ref, resolved.media_type) == (INDEX.ref, INDEX.media_type)
    assert 5.0 <= resolved.age_s < 65.0


def test_a_clock_that_was_set_back_makes_a_name_old_not_young(tmp_path: Path) -> None:
    table = NameTable(tmp_path / "names.sqlite")
    table.put(SOURCE, "v1", Resolved(INDEX.ref, INDEX.media_type, -3600.0))
    resolved = table.get(SOURCE, "v1")
    assert resolved is not None
    assert resolved.age_s > 1e6


def test_digests_that_manifests_name_push_out_neither_tags_nor_pinned_objects(tmp_path: Path, monkeypatch) -> None:
    """S-45"""
    monkeypatch.setattr("node.content.name_table._MAX_ROWS", 10)
    now = [0.0]
    table = NameTable(tmp_path / "names.sqlite", lambda: now[0], pinned=lambda digest: digest == named[0].ref.digest)
    named = [Resolved(ObjectRef(Digest("sha256", f"{n:064x}"), n + 1), INDEX.media_type, 0.0) for n in range(100)]
    table.put(SOURCE, "v1", INDEX)
    for resolved in named:
        now[0] += 1
        table.put_many(SOURCE, [resolved])
    for _ in range(3):
        table.trim()
    assert table.get(SOURCE, "v1") is not None
    left = [n for n, resolved in enumerate(named) if table.get(SOURCE, str(resolved.ref.digest))]
    assert left == [0, *range(92, 100)]


def test_the_former_table_gives_its_digests_but_no_tags(tmp_path: Path) -> None:
    """Its tags may be the answers of other members."""
    path, digest = tmp_path / "names.sqlite", str(INDEX.ref.digest)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "CREATE TABLE name (source TEXT, reference TEXT, digest TEXT NOT NULL, size INTEGER NOT NULL,"
            " media_type TEXT NOT NULL, confirmed REAL NOT NULL, PRIMARY KEY (source, reference)) WITHOUT ROWID"
        )
        for reference in ("v1", digest):
            row = (SOURCE, reference, digest, INDEX.ref.size, INDEX.media_type, 5.0)
            connection.execute("INSERT INTO name VALUES (?, ?, ?, ?, ?, ?)", row)
    for _ in range(2):
        table = NameTable(path)
        assert table.get(SOURCE, "v1") is None
        resolved = table.get(SOURCE, digest)
        assert resolved is not None
        assert resolved.ref == INDEX.ref
        assert table.origin(SOURCE, digest) == "manifest"
        table.close()


def test_a_damaged_table_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "names.sqlite"
    path.write_bytes(b"this is no database" * 1000)
    table = NameTable(path)
    table.put(SOURCE, "v1", INDEX)
    assert table.get(SOURCE, "v1") is not None


@pytest.mark.parametrize(
    ("body", "claimed", "expected"),
    [
        (b'{"mediaType":"x/own","layers":[]}', "x/claimed", "x/own"),
        (b'{"mediaType":"x/own"}', "x/claimed", ""),
        (b'{"mediaType":"application/vnd.oci.image.index.v1+json","layers":[]}', "x/claimed", ""),
        (b'{"layers":[],"manifests":[]}', "x/claimed", ""),
        (b'{"layers":[]}', "application/vnd.docker.distribution.manifest.v2+json", None),
        (b'{"layers":[]}', "application/vnd.oci.image.index.v1+json", "application/vnd.oci.image.manifest.v1+json"),
        (b'{"manifests":[]}', "x/claimed", "application/vnd.oci.image.index.v1+json"),
        (b'{"schemaVersion":1,"fsLayers":[]}', "application/vnd.docker.distribution.manifest.v1+json", None),
        (b'{"mediaType":"not a type","x":1}', "x/claimed", ""),
        (b"[]", "x/claimed", ""),
        (b"\xff", "x/claimed", ""),
    ],
)
def test_the_type_of_a_manifest_is_read_from_its_bytes(body: bytes, claimed: str, expected: str | None) -> None:
    """`expected` None stands for the claimed type, and "" for no type in the bytes."""
    assert media_type_of(body, claimed) == (claimed if expected is None else expected or None)


def test_a_row_that_the_disk_altered_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "names.sqlite"
    table = NameTable(path)
    table.put(SOURCE, "v1", INDEX)
    table.put(SOURCE, "v2", INDEX)
    table.close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE answer SET digest = 'sha256:no' WHERE reference = 'v1'")
    table = NameTable(path)
    assert table.get(SOURCE, "v1") is None
    assert [reference for _, reference, _ in table.images()] == ["v2"]
    assert [row.tag for row in table.tags("*")] == ["v2"]


def test_names_that_the_disk_refuses_are_remembered_until_the_node_stops(tmp_path: Path, caplog) -> None:
    calls = Calls(on=True)
    with failing(calls):
        table = NameTable(tmp_path / "names.sqlite")
        calls.first = calls.made
        table.put(SOURCE, "v1", INDEX)
        resolved = table.get(SOURCE, "v1")
        table.close()
    assert resolved is not None
    assert resolved.ref == INDEX.ref
    assert NameTable(tmp_path / "names.sqlite").get(SOURCE, "v1") is None
    assert "disk I/O error" in caplog.text


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b"\xff",
        b'{"layers": 3}',
        b'{"layers": [{"digest": "x", "size": -1}]}',
        b"[" * 100_000,
        b'{"manifests": [{"digest": "sha256:' + b"ab" * 32 + b'", "size": 1, "platform": ' + b"[" * 5000,
    ],
)
def test_bytes_that_are_not_a_manifest_name_nothing(body: bytes) -> None:
    manifest = parse_manifest(body)
    assert [*descriptors(manifest, "blobs"), *descriptors(manifest, "manifests")] == []


def test_descriptors_are_bounded_and_their_media_types_clean() -> None:
    layer = {"digest": "sha256:" + "cd" * 32, "size": 7, "mediaType": "a/b\r\nX-Evil: 1"}
    manifest = parse_manifest(msgspec.json.encode({"layers": [layer] * (MAX_MANIFEST_ENTRIES + 5)}))
    blobs = list(descriptors(manifest, "blobs"))
    assert len(blobs) == MAX_MANIFEST_ENTRIES
    assert {blob.media_type for blob in blobs} == {"application/octet-stream"}
