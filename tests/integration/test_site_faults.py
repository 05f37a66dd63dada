"""Faults that a site survives: a node that dies or hangs in the middle of pulls, a dead registry, altered disks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.clients import finish_pulls, pull_through, start_pulls
from tests.support.image import Image
from tests.support.processes import wait_for
from tests.support.proxy import CountingProxy
from tests.support.registry import Registry
from tests.support.site import Node, site

UPLINK = 10_000_000
"""Bytes per second from the registry, so that a pull lasts long enough to be disturbed."""
FAULT_AT = 0.2
"""The fault strikes when every client has written this share of the image."""
SLOWER = 3.0
"""Longest disturbed pull, as a multiple of the longest undisturbed one."""
PIECE_BYTES = 64 * 1024
"""One byte is altered in each piece of this size, and therefore in every shard and block."""
KEPT = ("key", "pem", "crt", "toml", "lock", "sock")


@pytest.fixture
def slow_proxy(registry: Registry) -> Iterator[CountingProxy]:
    with CountingProxy(registry.host, registry.port, rate=UPLINK) as counting:
        yield counting


@pytest.mark.parametrize("fault", [Node.kill, Node.pause], ids=["SIGKILL", "SIGSTOP"])
def test_pulls_succeed_when_a_node_dies_or_hangs(
    folder: Path, image: Image, slow_proxy: CountingProxy, fault: Callable[[Node], None]
) -> None:
    with site(folder / "calm", slow_proxy.url) as nodes:
        undisturbed = max(pull_through(nodes[:4], folder / "calm-out", image))
    with site(folder / "site", slow_proxy.url) as nodes:
        pulls = start_pulls(nodes[:4], folder / "out")
        wait_for("every client reads", lambda: all(pull.written() > FAULT_AT * image.size for pull in pulls))
        fault(nodes[4])
        assert all(pull.running for pull in pulls)
        assert max(finish_pulls(pulls, image)) <= SLOWER * undisturbed


@pytest.mark.parametrize("by", ["tag", "digest"])
def test_the_other_nodes_pull_while_the_registry_is_down(
    folder: Path, image: Image, proxy: CountingProxy, by: str
) -> None:
    """For a tag that the others never asked for, two members have to agree; a digest proves itself."""
    with site(folder / "site", proxy.url) as nodes:
        first = 2 if by == "tag" else 1
        pull_through(nodes[:first], folder / "first", image)
        proxy.cut()
        proxy.reset()
        reference = "v1" if by == "tag" else image.index.digest
        pull_through(nodes[first:], folder / by, image, reference)
        assert proxy.count.received == 0


@pytest.mark.parametrize("restarted", [False, True], ids=["running", "restarted"])
def test_altered_bytes_on_a_nodes_disk_reach_no_client(
    folder: Path, image: Image, proxy: CountingProxy, restarted: bool
) -> None:
    """S-29"""
    with site(folder / "site", proxy.url, memory="2MiB") as nodes:
        pull_through(nodes, folder / "first", image)
        if restarted:
            nodes[1].stop()
        assert alter(nodes[1].data) > image.size / PIECE_BYTES / 10, "the disk held too little for this test"
        if restarted:
            nodes[1].start()
        pull_through(nodes[1:], folder / "altered", image)


def alter(data: Path) -> int:
    """Flip a bit in every piece of every file that holds cached bytes. Returns the number of flipped bits."""
    flipped = 0
    for path in data.rglob("*"):
        if path.is_file() and path.stat().st_size > PIECE_BYTES and not path.suffix.lstrip(".").startswith(KEPT):
            flipped += _flip(path)
    return flipped


def _flip(path: Path) -> int:
    file = os.open(path, os.O_RDWR)
    try:
        if os.pread(file, 6, 0) == b"SQLite":
            return 0  # the index holds no bytes of the image
        size, offset, flipped = os.fstat(file).st_size, PIECE_BYTES // 2, 0
        while offset < size:
            (byte,) = os.pread(file, 1, offset)
            if byte:  # a hole of a sparse file stays a hole
                os.pwrite(file, bytes([byte ^ 1]), offset)
                flipped += 1
            offset += PIECE_BYTES
        return flipped
    finally:
        os.close(file)
