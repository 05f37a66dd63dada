"""Writes and checks the state files of a daemon's data folder, except the cache, without a daemon."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from random import Random
from typing import Any, cast

from cache.store import StoreStatistics
from node.api.documents import PrefetchOrder
from node.config.schema import UplinkPolicy
from node.content.listings import Listings
from node.content.name_table import NameTable
from node.identity.certificates import own_authority
from node.identity.identity import load_or_create
from node.images.pins import Pins, load_pins
from node.images.prefetch import Prefetcher
from node.membership.membership import Membership
from node.membership.peers_file import PeersFile
from node.mirror.access import PublicTable
from node.oci.layout import Packed, PackedImage
from node.oci.manifests import Resolved
from node.oci.references import ImageName, Locator
from node.registry.calls import Passed
from node.registry.uplink import Uplink, UplinkFile
from protocol.ids import Digest, ObjectRef
from protocol.members import Member
from tests.support.file_trace import say
from tests.support.passports import identity_of, passports_of, stated

APP = Locator("docker.io", "org/app", "manifests")
IDENTITIES = [identity_of(f"peer {number}") for number in range(3)]
PEERS = [identity.peer_id for identity in IDENTITIES]
TAGS = b'{"name":"org/app","tags":["v%d"]}'


def ref(number: int) -> ObjectRef:
    return ObjectRef(Digest("sha256", f"{number:064x}"), number)


def image(number: int) -> PackedImage:
    packed = Packed(ref(number), "manifests", "a/b")
    return PackedImage(ImageName("docker.io", "org/app", f"v{number}"), (packed,))


class _Disk:
    def pin(self, digest: Digest) -> None: ...

    def unpin(self, digest: Digest) -> None: ...

    def statistics(self) -> StoreStatistics:
        return StoreStatistics(0, 1 << 30, 0)


class _Registry:
    def __init__(self, number: int) -> None:
        self._number = number

    async def passthrough(self, locator: Locator, tail: str, query: Mapping[str, str]) -> Passed:
        return Passed(TAGS % self._number, "application/json")


class Remembered:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def _open(self, number: int) -> Iterator[tuple[NameTable, Listings, PublicTable]]:
        listings = Listings(_Registry(number).passthrough, cast(Any, None), self._folder / "listings.sqlite", 1e6)
        names, public = NameTable(self._folder / "names.sqlite"), PublicTable(self._folder / "access.sqlite")
        with closing(names), closing(listings), closing(public):
            yield names, listings, public

    def _files(self) -> tuple[Pins, Prefetcher, UplinkFile, Uplink, PeersFile]:
        pins = Pins(self._folder / "pins.json", load_pins(self._folder / "pins.json"), _Disk())
        none: Any = None
        orders = self._folder / "prefetch.json"
        prefetcher = Prefetcher(orders, library=none, verifier=none, fetcher=none, holds=none, holds_all=none)
        uplink = Uplink("docker.io", UplinkPolicy(daily=1000))
        uplinks = UplinkFile(self._folder / "uplink.msgpack", [uplink])
        return pins, prefetcher, uplinks, uplink, PeersFile(self._folder / "peers.msgpack")

    async def work(self, life: int) -> None:
        """Write every file several times, with growing numbers."""
        say("identity", str(load_or_create(self._folder).peer_id))
        own_authority(self._folder)
        say("authority", True)
        pins, prefetcher, uplinks, uplink, peers = self._files()
        own = Member(PEERS[0], "own", "site", ("10.0.0.1:1",))
        membership = Membership(own, 1, Random(1), passports_of(own, IDENTITIES[0]))
        with self._open(life) as (names, listings, public):
            for number in range(2 * life, 2 * life + 2):
                names.put(str(APP), "latest", Resolved(ref(number), "a/b"))
                await listings.tags(APP, {"n": str(number)})
                public.note(Locator("docker.io", f"org/app{number}", "blobs"))
                await pins.add(image(number))
                say("pinned", number)
                prefetcher.order(PrefetchOrder(images=(f"docker.io/org/app:v{number}",)))
                uplink.note(100)
                uplinks.save()
                other = IDENTITIES[1 + number % 2]
                moved = Member(other.peer_id, "other", "site", (f"10.0.0.2:{number + 1}",))
                membership.remembered([stated(moved, other)])
                peers.save(membership)

    async def check(self, said: Mapping[str, list[object]]) -> None:
        """Check that all durable values `said` exist, any others were written once, and every file can be rewritten."""
        peer_id = str(load_or_create(self._folder).peer_id)
        assert peer_id in (said["identity"] or [peer_id])
        own_authority(self._folder)
        pins, prefetcher, uplinks, uplink, peers = self._files()
        pinned = sorted(int(str(pin.image.name).rpartition(":v")[2]) for pin in pins)
        assert pinned[: len(said["pinned"])] == said["pinned"]
        assert pinned == list(range(len(pinned)))
        assert all(item.order.images == (str(item.name),) for item in prefetcher.load())
        assert all(statement.peer_id in PEERS for statement in peers.load())
        uplinks.load()
        assert uplink.use().used % 100 == 0
        with self._open(99) as (names, listings, public):
            name = names.get(str(APP), "latest")
            assert name is None or name.ref in map(ref, range(4))
            names.put(str(APP), "latest", Resolved(ref(99), "a/b"))
            body = (await listings.tags(APP, {"n": "0"})).body
            assert body in [b'{"name":"org/app","tags":[]}', TAGS % 0, TAGS % 99]
            public.note(Locator("docker.io", "org/other", "blobs"))
        await pins.add(image(99))
        prefetcher.order(PrefetchOrder(images=("docker.io/org/app:v99",)))
        with self._open(99) as (names, _, public):
            again = names.get(str(APP), "latest")
            assert again is not None and again.ref == ref(99)  # noqa: PT018
            assert public.age(Locator("docker.io", "org/other", "blobs")) is not None
        assert any(pin.image == image(99) for pin in load_pins(self._folder / "pins.json"))
        assert len(prefetcher.load()) == 1
