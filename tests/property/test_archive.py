"""Image archives: written ones are read back, by this code and by Python's tarfile; hostile ones are refused."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from node.images.archive import ArchiveReader, ArchiveWriter
from node.oci.layout import MAX_INDEX, PackedImage, read_layout
from node.oci.references import ImageName
from node.oci.tar import END, MAX_ENTRIES, MAX_EXTENSION, header, padding, read_entries
from protocol.errors import BadInputError
from protocol.ids import BLOCK_SIZE, MAX_OBJECT_SIZE
from tests.support.archives import Layout, blob_path, digest, small
from tests.support.image import noise

NAME = ImageName.parse("origin.test/demo/app:v1")
FORMS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def reader_of(data: bytes) -> Callable[[int, int], bytes]:
    def read(offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= len(data), "it reads only inside the file"
        return data[offset : offset + length]

    return read


def images_of(data: bytes, name: ImageName | None = None) -> list[PackedImage]:
    read = reader_of(data)
    return read_layout(read_entries(read, len(data)), read, name)


def refused(data: bytes, *words: str, name: ImageName | None = None) -> None:
    with pytest.raises(BadInputError) as caught:
        images_of(data, name)
    for word in words:
        assert word in str(caught.value)


# Tar


names = st.text("abcdefghij0123456789.-_", min_size=1, max_size=40).filter(lambda part: part not in (".", ".."))
paths = st.lists(names, min_size=1, max_size=5).map("/".join)
files = st.dictionaries(paths, st.binary(max_size=1500), max_size=8)


@given(files, st.sampled_from(FORMS), st.sampled_from(["", "./"]))
def test_archives_of_other_writers_are_read(content: dict[str, bytes], form: int, before: str) -> None:
    data = Layout(content).pack(form, before)
    entries = read_entries(reader_of(data), len(data))
    assert {name: data[e.offset : e.offset + e.size] for name, e in entries.items()} == content


@given(files)
def test_archives_of_ours_are_read_by_others_and_by_us(content: dict[str, bytes]) -> None:
    data = b"".join(header(name, len(body)) + body + padding(len(body)) for name, body in content.items()) + END
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        read = {info.name: tar.extractfile(info) for info in tar}
        assert {name: file.read() if file else None for name, file in read.items()} == content
    entries = read_entries(reader_of(data), len(data))
    assert {name: data[e.offset : e.offset + e.size] for name, e in entries.items()} == content


@given(st.integers(0, MAX_OBJECT_SIZE), st.sampled_from(["blobs/sha256/" + "0" * 64, "blobs/sha512/" + "0" * 128]))
def test_headers_of_any_size_and_name(size: int, name: str) -> None:
    """Only the headers are read: the bytes of the file need not exist."""
    head = header(name, size)
    length = len(head) + size + len(padding(size)) + len(END)

    def read(offset: int, count: int) -> bytes:
        return head[offset : offset + count] if offset < len(head) else bytes(count)

    (entry,) = read_entries(read, length).values()
    assert (entry.name, entry.offset, entry.size) == (name, len(head), size)


@given(st.data())
def test_bytes_of_any_kind_are_an_archive_or_refused(data: st.DataObject) -> None:
    """A mutated valid archive, cut anywhere, causes only the named error, and no read outside the file."""
    good = bytearray(small().pack(data.draw(st.sampled_from(FORMS))))
    for _ in range(data.draw(st.integers(0, 6))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(good[: data.draw(st.integers(0, len(good)))])
    with suppress(BadInputError):
        assert images_of(cut)


def header_of(name: str, **fields: object) -> bytes:
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.PAX_FORMAT) + END


def sized(field: bytes) -> bytes:
    """A header whose size field holds these bytes, with the right checksum."""
    head = bytearray(header("file", 0))
    head[124:136] = field.ljust(12, b"\0")
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + END


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (header_of("../etc/passwd"), ["../etc/passwd", "not a path inside"]),
        (header_of("/etc/passwd"), ["/etc/passwd", "not a path inside"]),
        (header_of("blobs/../../x"), ["blobs/../../x"]),
        (header_of("a//b"), ["a//b"]),
        (header_of("blobs/x", type=tarfile.SYMTYPE, linkname="/etc/passwd"), ["blobs/x", "symbolic link"]),
        (header_of("blobs/x", type=tarfile.LNKTYPE, linkname="index.json"), ["blobs/x", "hard link"]),
        (header_of("null", type=tarfile.CHRTYPE), ["null", "device"]),
        (header_of("pipe", type=tarfile.FIFOTYPE), ["pipe", "named pipe"]),
        (header_of("sparse", type=tarfile.GNUTYPE_SPARSE), ["sparse"]),
        (header_of("evil\x1b[2J"), ["control characters"]),
        (header_of("n" * 300), ["too long"]),
        (header("twice", 0) * 2 + END, ["twice", "in the archive twice"]),
        (header("cut", 1 << 20) + END, ["cut", "cut short"]),
        (header("no-end", 0), ["cut short", "end mark"]),
        (sized(b"\xff" * 12), ["file", "size"]),
        (sized(b"\x80" + b"\xff" * 11), ["file", "cut short"]),
        (sized(b"-1"), ["file", "size"]),
        (sized(b"99"), ["file", "size"]),
        (b"\x1f\x8b" + bytes(600), ["gzip"]),
        (b"hello" * 200, ["not a tar archive"]),
        (b"", ["cut short"]),
    ],
)
def test_hostile_tars(data: bytes, words: list[str]) -> None:
    refused(data, *words)


def test_too_many_entries() -> None:
    refused(header("f", 0)[:0] + b"".join(header(f"f{i}", 0) for i in range(MAX_ENTRIES + 1)) + END, str(MAX_ENTRIES))


@pytest.mark.parametrize("kind", [b"x", b"L", b"g"])
def test_a_huge_extended_header_is_not_read(kind: bytes) -> None:
    info = tarfile.TarInfo("long")
    info.size, info.type = MAX_EXTENSION + 1, kind
    data = info.tobuf(tarfile.PAX_FORMAT) + bytes(MAX_EXTENSION + 512) + END
    refused(data, str(MAX_EXTENSION))


@given(st.binary(max_size=200))
def test_extended_headers_of_any_kind_are_refused_or_read(records: bytes) -> None:
    info = tarfile.TarInfo("x")
    info.size, info.type = len(records), b"x"
    data = info.tobuf(tarfile.PAX_FORMAT) + records + padding(len(records)) + header("file", 0) + END
    with suppress(BadInputError):
        assert len(read_entries(reader_of(data), len(data))) == 1


# Layouts


def test_a_layout_of_two_platforms() -> None:
    layout = small()
    layout.files |= {"manifest.json": b"[]", "repositories": b"{}"}  # of docker save
    (image,) = images_of(layout.pack(folders=True))
    assert image.name == NAME
    assert str(image.root.ref.digest) == layout.roots[0]["digest"]
    kinds = [packed.kind for packed in image.objects]
    assert (kinds.count("manifests"), kinds.count("blobs")) == (3, 5)
    assert len({packed.ref.digest for packed in image.objects}) == len(image.objects)


def test_a_platform_that_is_not_in_the_archive_is_left_out() -> None:
    layout = small()
    index = json.loads(layout.files[blob_path(str(layout.roots[0]["digest"]))])
    absent = index["manifests"][1]["digest"]
    manifest = json.loads(layout.files.pop(blob_path(absent)))
    del layout.files[blob_path(manifest["layers"][1]["digest"])], layout.files[blob_path(manifest["config"]["digest"])]
    (image,) = images_of(layout.pack())
    assert absent not in {str(packed.ref.digest) for packed in image.objects}
    assert len(image.objects) == 5
    del layout.files[blob_path(index["manifests"][0]["digest"])]
    refused(layout.pack(), blob_path(str(layout.roots[0]["digest"])), "names nothing that is in the archive")


def test_layers_of_sha512_and_several_images() -> None:
    layout = Layout()
    root = layout.manifest([b"layer"], "amd64", "sha512")
    layout.name(root, "origin.test/a:1")
    layout.name(root, "origin.test/a:2")
    layout.name(layout.manifest([b"another"], "amd64"), "localhost/b:1")
    images = images_of(layout.pack())
    assert [str(image.name) for image in images] == ["origin.test/a:1", "origin.test/a:2", "localhost/b:1"]
    refused(layout.pack(), "3 images", name=NAME)


def test_names_come_from_the_archive_only_whole() -> None:
    layout = small()
    for called in ({"org.opencontainers.image.ref.name": "v1"}, {}, {"io.containerd.image.name": "app:v1"}):
        root = {**layout.roots[0], "annotations": called}
        layout.files["index.json"] = json.dumps({"manifests": [root]}).encode()
        refused(layout.pack(), "index.json", "--name")
        assert images_of(layout.pack(), NAME)[0].name == NAME
    wrong = ImageName.parse(f"origin.test/demo/app@sha256:{'0' * 64}")
    refused(layout.pack(), "is not", name=wrong)


def broken(change: Callable[[Layout], None]) -> bytes:
    layout = small()
    change(layout)
    return layout.pack()


def first(layout: Layout, media_type: str) -> str:
    """The file of the first blob with this media type."""
    wanted = media_type.encode()
    return next(name for name, data in layout.files.items() if name.startswith("blobs/") and wanted in data)


def replace_index(**fields: object) -> Callable[[Layout], None]:
    def change(layout: Layout) -> None:
        layout.files["index.json"] = json.dumps({"manifests": [{**layout.roots[0], **fields}]}).encode()

    return change


def drop(name: str) -> Callable[[Layout], None]:
    return lambda layout: layout.files.pop(name) and None


def write(name: str, data: bytes) -> Callable[[Layout], None]:
    return lambda layout: layout.files.update({name: data})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("oci-layout"), ["oci-layout", "not an OCI image layout"]),
        (drop("index.json"), ["index.json"]),
        (write("oci-layout", b'{"imageLayoutVersion": "9"}'), ["oci-layout", "version"]),
        (write("index.json", b"{"), ["index.json", "JSON"]),
        (write("index.json", b"[" * 100_000), ["index.json", "JSON"]),
        (write("index.json", b'{"manifests": null}'), ["index.json", "0 images"]),
        (write("index.json", b" " * (MAX_INDEX + 1)), ["index.json", str(MAX_INDEX)]),
        (write("index.json", json.dumps({"manifests": [{}] * 2000}).encode()), ["index.json"]),
        (replace_index(size=-1), ["index.json", "size"]),
        (replace_index(size=1 << 60), ["index.json", "size"]),
        (replace_index(size=5), ["blobs/sha256/", "5"]),
        (replace_index(digest="sha256:../../etc/passwd"), ["index.json", "digest"]),
        (replace_index(digest=f"sha256:{'0' * 64}"), ["index.json", "not in the archive"]),
        (replace_index(mediaType="a\r\nb"), ["index.json", "media type"]),
        (write("blobs/md5/00", b""), ["md5"]),
        (lambda layout: layout.files.pop(blob_path(digest(b"shared"))), ["blobs/sha256/", digest(b"shared")]),
        (lambda layout: layout.files.update({first(layout, "vnd.oci.image.index"): b"{}"}), ["blobs/sha256/"]),
    ],
)
def test_hostile_layouts(change: Callable[[Layout], None], words: list[str]) -> None:
    refused(broken(change), *words)


def test_manifests_of_other_bytes_are_refused_when_read_and_layers_when_hashed(tmp_path: Path) -> None:
    layout = small()
    layer, index = blob_path(digest(b"shared")), first(layout, "vnd.oci.image.index")
    refused(broken(write(index, layout.files[index].replace(b"arm64", b"arm46"))), index, "digest")
    (tmp_path / "archive").write_bytes(broken(write(layer, b"shared"[::-1])))

    async def main() -> None:
        with (tmp_path / "archive").open("rb") as file:
            reader = ArchiveReader(file.fileno())
            (image,) = await reader.images(None)
            wrong = next(packed for packed in image.objects if packed.entry == layer)
            with pytest.raises(BadInputError, match=layer):
                assert [part async for part in reader.hashes(wrong)]

    trio.run(main)


def test_an_index_that_is_nested_in_itself_or_too_deep_ends() -> None:
    layout = Layout()
    inner = layout.manifest([b"layer"], "amd64")
    for _ in range(5):
        inner = layout.index([inner])
    layout.name(inner, "origin.test/deep:1")
    refused(layout.pack(), "an index below")


# Files


@settings(max_examples=20)
@given(st.lists(st.integers(0, 3 * BLOCK_SIZE), max_size=3))
def test_an_exported_archive_can_be_imported(sizes: list[int]) -> None:
    layout = Layout()
    layers = [noise(size, size) for size in sizes]
    layout.name(layout.index([layout.manifest(layers, "amd64")]), str(NAME))
    packed = layout.pack()
    (image,) = images_of(packed)

    async def main() -> None:
        with TemporaryFile() as file:
            writer = ArchiveWriter(file.fileno())
            await writer.begin(image.root, NAME)
            for written in image.objects:
                await writer.head(written)
                await writer.write(packed[written.offset : written.offset + written.ref.size])
                await writer.tail(written.ref)
            await writer.end()
            reader = ArchiveReader(file.fileno())
            (again,) = await reader.images(None)
            assert [o.ref for o in again.objects] == [o.ref for o in image.objects]
            for read in again.objects:
                hashes = b"".join([part async for part in reader.hashes(read)])
                blocks = [
                    await reader.block(read, index, hashes[32 * index : 32 * index + 32])
                    for index in range(read.ref.block_count)
                ]
                assert digest(b"".join(blocks), read.ref.digest.algorithm) == str(read.ref.digest)

    trio.run(main)


def test_bytes_that_change_after_they_were_hashed_are_refused() -> None:
    packed = small().pack()

    async def main() -> None:
        with TemporaryFile() as file:
            os.write(file.fileno(), packed)
            reader = ArchiveReader(file.fileno())
            (image,) = await reader.images(None)
            layer = image.objects[-1]
            (sha,) = [part async for part in reader.hashes(layer)]
            os.pwrite(file.fileno(), b"x", layer.offset)
            with pytest.raises(BadInputError, match="changed while"):
                await reader.block(layer, 0, sha)
            os.ftruncate(file.fileno(), layer.offset)
            with pytest.raises(BadInputError, match="cut short"):
                await reader.block(layer, 0, sha)

    trio.run(main)


def test_a_pipe_is_no_archive() -> None:
    ends = os.pipe()
    try:
        for kind in (ArchiveReader, ArchiveWriter):
            with pytest.raises(BadInputError, match="regular file"):
                kind(ends[0])
    finally:
        for end in ends:
            os.close(end)
