"""A member that has others keep worthless data for it: what clients use stays, also in an outage."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from protocol.ids import BLOCK_SIZE, Digest
from protocol.members import Member
from protocol.messages import Announce, GetShards, Resolve
from protocol.placement import Placement
from protocol.stripes import StripeId
from tests.support import registry as registries
from tests.support.adversary import lines
from tests.support.lying_daemon import NOWHERE
from tests.support.processes import scratch
from tests.support.siege import Siege, besieged, peers
from tests.support.site import UPSTREAM, Node

OBJECTS = 600
DISK = "32MiB"
"""Of each node: 600 shards of a quarter of a block are 79 MB."""
IMAGE_BYTES = 6_000_000
NAMES = 5000
"""More than any table of names has."""


@pytest.fixture(scope="module")
def small(registry: registries.Registry) -> Iterator[Siege]:
    """A site of nodes with small disks."""
    changes = {'disk = "4GiB"': f'disk = "{DISK}"', "[mirror]": '[mirror]\ntag_ttl = "1s"'}
    with scratch() as folder, besieged(folder, registry, changes=changes) as siege:
        yield siege


def homed_at_the_liar(siege: Siege, count: int) -> list[tuple[Digest, dict[str, int]]]:
    """Objects of one block that exist nowhere and whose home is the liar, with the rank of each keeper."""
    members = [Member(row["peer_id"], row["name"], row["site"], ()) for row in peers(siege.liar)]
    members = [member for member in members if member.peer_id != siege.attacker.peer]
    placement = Placement([*members, Member(siege.attacker.peer, "liar", "loopback", ())], 4, 1)
    homed: list[tuple[Digest, dict[str, int]]] = []
    number = 0
    while len(homed) < count:
        number += 1
        digest = Digest.parse("sha256:" + hashlib.sha256(b"nothing %d" % number).hexdigest())
        _, keepers = placement.keepers(StripeId(digest, 0), BLOCK_SIZE)
        if keepers[0] == siege.attacker.peer:
            homed.append((digest, {str(keeper): rank for rank, keeper in enumerate(keepers)}))
    return homed


def test_shards_of_objects_that_do_not_exist_evict_no_image(small: Siege) -> None:
    """S-59: the attacker is their home, and makes them up. Then the uplink is cut."""
    image = small.fresh(size=IMAGE_BYTES)
    small.pull_everywhere(image)
    ids = {node: node.peer_id() for node in small.honest}
    with small.unharmed():
        small.lies(GetShards="made up")
        homed = homed_at_the_liar(small, OBJECTS)

        def have_kept(node: Node) -> int:
            requests = [
                GetShards(str(digest), 0, 1, BLOCK_SIZE, 4, 1, ranks[ids[node]], 2, f"{UPSTREAM}/{NOWHERE}#blobs")
                for digest, ranks in homed
            ]
            with small.attacker.line(node, "urgent") as line:
                return sum(answer[0] == 32 for answer in line.ask_all(requests))

        with ThreadPoolExecutor(len(small.honest)) as pool:
            kept = sum(pool.map(have_kept, small.honest))
        assert kept > 3 * OBJECTS, "nearly all of them are kept"
        small.proxy.cut()
        small.pull_everywhere(image)


def test_announcements_and_names_push_out_nobody(small: Siege) -> None:
    """S-60: what clients use is found in an outage, after the liar filled each table with its own entries."""
    image, tagged = small.fresh(), [small.fresh(size=1000) for _ in range(5)]
    small.pull(small.honest[0], image)
    for published in tagged:
        small.pull_everywhere(published)
    with small.unharmed():
        digests = ["sha256:" + hashlib.sha256(b"%d" % number).hexdigest() for number in range(70_000)]
        announcements = [Announce(tuple(digests[begin : begin + 1000])) for begin in range(0, len(digests), 1000)]
        names = [Resolve(f"{UPSTREAM}/flood/a{number}#manifests", "latest") for number in range(NAMES)]
        with lines(small.attacker, small.honest) as open_lines:
            with ThreadPoolExecutor(len(open_lines)) as pool:
                list(pool.map(lambda line: line.ask_all(announcements, at_once=4), open_lines))
            open_lines[0].ask_all(names)
        small.proxy.cut()
        for published in tagged:
            small.pull_everywhere(published)
        for node in small.honest[1:]:
            small.pull(node, image, image.image.index.digest)


@pytest.fixture(autouse=True)
def restored(small: Siege) -> Iterator[None]:
    yield
    small.lies()
    small.proxy.restore()
    small.renew_liar()
