"""A reload applies some changes, reports others as needing a restart, and changes nothing if a part refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import trio

from cache.disk import DiskStore
from cache.memory import ENTRY_BYTES, MemoryStore
from cache.store import BlockStore
from node.config.schema import Config, config_of, load, uplink_policy
from node.control.reload import LIVE, Reloader, prepared
from node.registry.uplink import Uplink
from node.registry.upstreams import Upstreams
from node.runtime.systemd import Notifier
from node.stages import Registry
from protocol.errors import BadInputError
from protocol.ids import BLOCK_SIZE
from tests.support.blobs import Blob

FIRST = '[[upstream]]\nname = "r.test"\nurl = "http://127.0.0.1:9"\n'
EDITS = {
    'node.name="edge-9"': 'node.name: "edge-1" -> "edge-9"',
    'node.site="harbour"': 'node.site: "default" -> "harbour"',
    'node.data_dir="/other"': 'node.data_dir: "/var/lib/p2pd" -> "/other"',
    'node.log="debug"': 'node.log: "info" -> "debug"',
    'mirror.listen="127.0.0.1:5055"': 'mirror.listen: "127.0.0.1:5050" -> "127.0.0.1:5055"',
    'mirror.tag_ttl="5s"': 'mirror.tag_ttl: "60s" -> "5s"',
    "mirror.tag_witnesses=1": "mirror.tag_witnesses: 2 -> 1",
    'mirror.tag_max_age="1d"': 'mirror.tag_max_age: "7d" -> "1d"',
    'mirror.max_object="1GiB"': 'mirror.max_object: "64GiB" -> "1GiB"',
    'tags=[{match="*:edge"}]': 'tags: [] -> [{"match":"*:edge","ttl":"","max_age":"","cache":true,"verify":[]}]',
    'peers.listen="/ip4/127.0.0.1/tcp/1"': 'peers.listen: "/ip4/0.0.0.0/tcp/4501" -> "/ip4/127.0.0.1/tcp/1"',
    'peers.bulk="127.0.0.1:1"': 'peers.bulk: "0.0.0.0:4502" -> "127.0.0.1:1"',
    'peers.bootstrap=["/ip4/10.0.0.1/tcp/1"]': 'peers.bootstrap: [] -> ["/ip4/10.0.0.1/tcp/1"]',
    "peers.mdns=false": "peers.mdns: true -> false",
    "peers.plain=true": "peers.plain: false -> true",
    "peers.k=3": "peers.k: 4 -> 3",
    "peers.m=2": "peers.m: 1 -> 2",
    'upstream=[{name="r.test",url="http://127.0.0.1:8"}]': (
        'upstream "r.test": url: "http://127.0.0.1:9" -> "http://127.0.0.1:8"'
    ),
    'cluster.key="/k"': 'cluster.key: "" -> "/k"',
    "cluster.open=true": "cluster.open: false -> true",
    'cache.memory="1MiB"': 'cache.memory: "64MiB" -> "1MiB"',
    'cache.disk="1GiB"': 'cache.disk: "10GiB" -> "1GiB"',
    'cache.min_free="1%"': 'cache.min_free: "5%" -> "1%"',
    'cache.containerd_store="/c"': 'cache.containerd_store: "" -> "/c"',
    'control.socket="/s"': 'control.socket: "/run/p2pd/p2pd.sock" -> "/s"',
    'control.metrics=""': 'control.metrics: "127.0.0.1:5051" -> ""',
}


class Daemon:
    """A fake of the daemon's components, as a reload uses them."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "p2pd.toml"
        self.write()
        self.applied: list[Config] = []
        self.refuses = False
        self.reloader = Reloader(self._path, load(self._path), self.prepared, Notifier())

    def write(self, edit: str = "") -> None:
        """Write the first configuration with `edit`."""
        self._path.write_text(
            f"{edit}\n"
            + ("" if "node.name" in edit else 'node.name = "edge-1"\n')
            + ("" if "upstream" in edit else FIRST)
        )

    def prepared(self, config: Config) -> Callable[[], None]:
        if self.refuses:
            raise BadInputError("it does not fit")
        return lambda: self.applied.append(config)


def keys() -> set[str]:
    listed = set()
    for name in Config.__struct_fields__:
        part = getattr(Config(), name)
        inner = part.__struct_fields__ if isinstance(part, msgspec.Struct) else ()
        listed |= {f"{name}.{key}" for key in inner} or {name}
    return listed


def test_this_file_edits_every_key() -> None:
    assert {edit.partition("=")[0] for edit in EDITS} == keys() > LIVE


@pytest.mark.parametrize(("edit", "line"), EDITS.items())
def test_a_changed_key_is_applied_or_reported_as_needing_a_restart(tmp_path: Path, edit: str, line: str) -> None:
    daemon = Daemon(tmp_path)
    before, live = daemon.reloader.config, edit.partition("=")[0] in LIVE
    daemon.write(edit)
    for again in range(2):
        report = daemon.reloader.reload()
        assert report.changed == ((line,) if live and not again else ())
        assert report.needs_restart == (() if live else (line,)), "until the restart"
    assert (daemon.reloader.config != before) is live
    assert daemon.applied[-1] == daemon.reloader.config
    daemon.write()
    report = daemon.reloader.reload()
    assert (len(report.changed), report.needs_restart) == (int(live), ())
    assert daemon.reloader.config == before


def test_a_change_that_one_part_refuses_changes_nothing(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    before, daemon.refuses = daemon.reloader.config, True
    daemon.write('cache.memory = "1MiB"')
    with pytest.raises(BadInputError, match="it does not fit"):
        daemon.reloader.reload()
    assert (daemon.reloader.config, daemon.applied) == (before, [])


# The parts themselves


class Accepting:
    """A component that accepts every change."""

    policies = max_age_s = None

    def change(self, grace_s: Mapping[str, float], max_age_s: float) -> None: ...

    def check_fits(self, budget_bytes: int) -> None: ...


def config(memory: int, disk: int, **uplink: str) -> Config:
    cache = {"memory": f"{memory}B", "disk": f"{disk}B", "min_free": "0B"}
    return config_of({"cache": cache, "upstream": [{"name": "r.test", "url": "http://127.0.0.1:9", **uplink}]})


def test_memory_disk_and_uplink_change_together_and_held_bytes_stay_right(tmp_path: Path) -> None:
    blobs = [Blob.random(seed, BLOCK_SIZE) for seed in range(4)]
    room = 4 * (BLOCK_SIZE + 2 * ENTRY_BYTES)

    async def put(*stores: BlockStore) -> None:
        for blob, store in product(blobs, stores):
            assert await store.put(blob.pieces[0], blob.content, blob.record(blob.pieces[0]))

    async def held(store: BlockStore) -> list[bool]:
        stored = [await store.get(blob.pieces[0]) for blob in blobs]
        assert all(
            piece is None or bytes(piece.data) == blob.content for piece, blob in zip(stored, blobs, strict=True)
        )
        return [piece is not None for piece in stored]

    async def main() -> None:
        old = config(room, room, rate="1MiB")
        link = Uplink("r.test", uplink_policy(old.upstream[0]))
        memory = MemoryStore(room, trio.current_time)
        async with (
            DiskStore.open(tmp_path, room) as disk,
            Upstreams(old.upstream, count=lambda name, size: None, rng=Random(1), uplinks=[link]) as upstreams,
        ):
            some = Accepting()
            introducer = SimpleNamespace(bootstrap=SimpleNamespace(prepared=lambda addresses: lambda: None))
            node: Any = SimpleNamespace(
                admitted=SimpleNamespace(place=SimpleNamespace(bootstrap=())),
                storage=SimpleNamespace(pins=some, memory=memory, disk=disk),
                network=SimpleNamespace(introducer=introducer),
                registry=Registry(upstreams, {"r.test": link}, lambda: 1),
                member=SimpleNamespace(resolver=SimpleNamespace(known=some)),
                clients=SimpleNamespace(access=some, library=some, listings=some),
            )
            await put(memory, disk)
            change = prepared(node, config(room // 2, room // 2, rate="8MiB", daily="1GiB"))
            assert (memory.statistics().entries, disk.statistics().budget_bytes, link.use().rate) == (4, room, 1 << 20)
            change()
            assert memory.statistics().bytes <= memory.statistics().budget_bytes == room // 2
            assert await held(memory) == [False, False, True, True], "the latest stay"
            assert (link.use().rate, link.use().daily) == (8 << 20, 1 << 30)
            await disk.discard(blobs[3].pieces[0])
            await put(disk)
            assert disk.statistics().bytes <= disk.statistics().budget_bytes == room // 2
            assert (await held(disk))[3]

            prepared(node, config(room, room))()
            assert not link.use().rate
            await put(memory, disk)
            assert await held(memory) == await held(disk) == [True] * 4

    trio.run(main)
