"""Pins: shared objects, room on the disk, the file, and operations in progress."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from cache.disk import DiskStore
from cache.memory import MemoryStore
from cache.store import StoreStatistics
from cache.tiered import Tiers
from node.api.documents import WorkResult
from node.images.operations import ImageOperations
from node.images.pins import Pins, digests_of, load_pins
from node.oci.layout import Packed, PackedImage
from node.oci.references import ImageName, Locator
from protocol.errors import BadInputError, NotFoundError, UnavailableError
from protocol.ids import BLOCK_SIZE, Digest, ObjectRef
from tests.support.blobs import Blob
from tests.support.memory_library import MemoryLibrary

BUDGET = 100 << 20


class Disk:
    def __init__(self) -> None:
        self.pinned: set[Digest] = set()

    def pin(self, digest: Digest) -> None:
        self.pinned.add(digest)

    def unpin(self, digest: Digest) -> None:
        self.pinned.remove(digest)

    def statistics(self) -> StoreStatistics:
        return StoreStatistics(0, BUDGET, 0)


def packed(number: int, size: int = 10 << 20) -> Packed:
    return Packed(ObjectRef(Digest("sha256", f"{number:064x}"), size), "blobs", "a/b")


def image(name: str, *numbers: int) -> PackedImage:
    return PackedImage(ImageName.parse(f"origin.test/{name}"), tuple(map(packed, numbers)))


def digests(*numbers: int) -> set[Digest]:
    return {packed(number).ref.digest for number in numbers}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pins.json"


def play(scenario: Callable[[], Awaitable[None]]) -> None:
    trio.run(scenario)


def test_objects_that_two_images_share_stay_until_both_are_unpinned(path: Path) -> None:
    async def scenario() -> None:
        disk = Disk()
        pins = Pins(path, (), disk)
        first, second = image("one", 1, 2), image("two", 2, 3)
        await pins.add(first)
        await pins.add(second)
        await pins.add(second)
        assert (disk.pinned, pins.bytes) == (digests(1, 2, 3), 30 << 20)
        await pins.remove(first.name)
        assert disk.pinned == digests(2, 3)
        with pytest.raises(NotFoundError):
            await pins.remove(first.name)
        await pins.remove(second.name)
        assert (disk.pinned, pins.bytes, len(pins)) == (set(), 0, 0)

    play(scenario)


def test_a_tag_that_moved_is_pinned_anew(path: Path) -> None:
    async def scenario() -> None:
        disk = Disk()
        pins = Pins(path, (), disk)
        await pins.add(image("app", 1, 2))
        await pins.add(image("app", 2, 3))
        assert disk.pinned == digests(2, 3)

    play(scenario)


def test_pins_outlive_the_process(path: Path) -> None:
    async def scenario() -> None:
        await Pins(path, (), Disk()).add(image("app:v1", 1, 2))
        loaded = load_pins(path)
        assert digests_of(loaded) == digests(1, 2)
        disk = Disk()
        pins = Pins(path, loaded, disk)
        (pin,) = pins
        assert (pin.image, disk.pinned) == (image("app:v1", 1, 2), digests(1, 2))
        assert pins.names("origin.test/app#manifests", "v1")
        assert not pins.names("origin.test/app#manifests", "v2")

    play(scenario)


def test_objects_of_running_operations_are_held_and_bounded(path: Path) -> None:
    async def scenario() -> None:
        disk = Disk()
        pins = Pins(path, (), disk)
        await pins.add(image("app", *range(1, 5)))
        with pins.holding([packed(n) for n in (4, 5, 6, 7, 8, 9)]):
            assert disk.pinned == digests(*range(1, 10))
            with pytest.raises(BadInputError, match="do not fit"), pins.holding([packed(10)]):
                pass
            with pins.holding([packed(9)]):
                pass
            assert disk.pinned == digests(*range(1, 10))
        assert disk.pinned == digests(1, 2, 3, 4)

    play(scenario)


def test_a_smaller_budget_must_have_room_for_pinned_objects(path: Path) -> None:
    async def scenario() -> None:
        pins = Pins(path, (), Disk())
        await pins.add(image("app", *range(1, 5)))
        pins.check_fits(50 << 20)
        with pytest.raises(BadInputError, match=r"cache\.disk: 40 MiB are pinned"):
            pins.check_fits(44 << 20)

    play(scenario)


def test_a_pin_that_cannot_be_written_does_not_count(path: Path) -> None:
    async def scenario() -> None:
        disk = Disk()
        pins = Pins(path.parent / "none" / "pins.json", (), disk)
        with pytest.raises(UnavailableError, match="cannot write"):
            await pins.add(image("app", 1))
        assert (disk.pinned, len(pins)) == (set(), 0)

    play(scenario)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"version": 2, "pins": []}',
        b'{"version": 1, "pins": [{"image": "a", "since": 1, "objects": [["sha256:x", 1, "blobs", "a/b"]]}]}',
    ],
)
def test_a_damaged_file_is_moved_aside(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    assert load_pins(path) == ()
    assert path.with_suffix(".damaged").read_bytes() == data
    assert load_pins(path) == ()


class LateLibrary(MemoryLibrary):
    """Yields an empty chunk before each object, as a library does whose first block takes long."""

    async def read(self, locator: Locator, ref: ObjectRef, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        yield b""
        async with aclosing(super().read(locator, ref, start, stop)) as chunks:
            async for chunk in chunks:
                for at in range(0, len(chunk), BLOCK_SIZE):
                    yield chunk[at : at + BLOCK_SIZE]


def test_an_image_whose_first_block_is_late_is_pinned_whole(path: Path, tmp_path: Path) -> None:
    layer = Blob.random(1, 2 * BLOCK_SIZE + 100)
    descriptor = {"mediaType": "a/layer", "digest": str(layer.ref.digest), "size": layer.ref.size}
    manifest = Blob(json.dumps({"layers": [descriptor]}).encode())
    library = LateLibrary("app")
    library.tag("v1", manifest.content, "application/vnd.oci.image.manifest.v1+json")
    library.tag("layer", layer.content, "a/layer")

    async def scenario() -> None:
        unused: Any = SimpleNamespace(put=lambda *row: None)
        memory, name = MemoryStore(BUDGET, trio.current_time), ImageName.parse("origin.test/app:v1")
        async with DiskStore.open(tmp_path / "cache", BUDGET) as disk:
            for blob in (manifest, layer):
                for piece in blob.pieces:
                    await memory.put(piece, blob.bytes_of(piece), blob.record(piece))
            site: Any = SimpleNamespace(tiers=Tiers(memory, disk, None))
            operations = ImageOperations(
                site=site,
                disk=disk,
                library=library,
                table=unused,
                pinned=Pins(path, (), disk),
                prefetcher=unused,
                upstreams=(),
                record_for=unused,
                finished=unused,
                public=unused,
            )
            events = [event async for event in operations.pin(name, ())]
            assert isinstance(events[-1], WorkResult)
            assert events[-1].ok
            assert all(disk.holds(piece) for piece in layer.pieces)

    play(scenario)
