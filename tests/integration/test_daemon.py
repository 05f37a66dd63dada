"""A daemon as its operator sees it: start, stop, mistakes in the configuration, restarts, and p2pctl's answers."""

from __future__ import annotations

import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from protocol.records import Record
from tests.support.clients import REPOSITORY, TAG, pull_through
from tests.support.image import Image
from tests.support.processes import tail, wait_for
from tests.support.proxy import CountingProxy
from tests.support.site import P2PCTL, P2PD, Node, run, site

READY = 4
"""Longest start, as a multiple of the time in which `p2pd --print-peer-id` runs."""
IDLE_RSS = 128 * 2**20
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def node(folder: Path) -> Node:
    """A single node, not started, whose registry never answers."""
    return Node("node-1", "127.0.0.1", folder / "node", NOWHERE)


def test_the_daemon_is_ready_soon_and_small(node: Node) -> None:
    began = time.monotonic()
    node.peer_id()
    calibration_s = time.monotonic() - began
    node.start()
    try:
        assert node.ready_s <= READY * calibration_s
        assert node.rss_bytes() <= IDLE_RSS
        wait_for("the log says ready", lambda: "msg=ready" in tail(node.log, 100))
        status = node.status()
        assert (status["name"], status["site"], status["peers_alive"]) == ("node-1", "loopback", 0)
        assert status["peer_id"] == node.peer_id()
        assert any(address.endswith(f"/p2p/{node.peer_id()}") for address in status["addresses"])
        assert 0 < status["rss_bytes"] <= IDLE_RSS
    finally:
        assert node.stop() == 0, tail(node.log)


def test_the_peer_id_is_printed_without_a_start_and_never_changes(node: Node) -> None:
    first = node.peer_id()
    assert first.startswith("12D3KooW")
    assert node.peer_id() == first


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("[mirror]\nlisten = ", "[mirror]\nlissten = ", "lissten"),
        ('memory = "64MiB"', 'memory = "lots"', "cache.memory"),
        (f'url = "{NOWHERE}"', 'url = "ftp://registry"', "url"),
        ("[cache]", "[cache", "TOML"),
    ],
)
def test_a_mistake_in_the_configuration_is_named(node: Node, old: str, new: str, named: str) -> None:
    text = node.config.read_text()
    assert old in text
    node.config.write_text(text.replace(old, new))
    answer = run([*P2PD, "--config", str(node.config)])
    assert answer.returncode == 2
    assert named in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_missing_configuration_is_named(folder: Path) -> None:
    answer = run([*P2PD, "--config", str(folder / "none.toml")])
    assert answer.returncode == 2
    assert "none.toml" in answer.stderr


def test_two_daemons_never_share_a_folder(node: Node) -> None:
    node.start()
    try:
        text = node.config.read_text()
        for port in (node.mirror_port, node.libp2p_port, node.bulk_port):
            text = text.replace(str(port), "0")
        second = node.folder / "second.toml"
        second.write_text(text.replace("p2pd.sock", "second.sock"))
        answer = run([*P2PD, "--config", str(second)])
        assert answer.returncode not in (0, None)
        assert "data_dir" in answer.stderr or str(node.data) in answer.stderr
        assert node.status()["name"] == "node-1"
    finally:
        node.end()


def test_p2pctl_says_plainly_that_the_daemon_is_down(folder: Path) -> None:
    answer = run([*P2PCTL, "--socket", str(folder / "none.sock"), "status", "--json"])
    assert answer.returncode != 0
    assert "none.sock" in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize("end", [Node.stop, Node.kill], ids=["SIGTERM", "SIGKILL"])
def test_the_cache_outlives_the_daemon(folder: Path, image: Image, proxy: CountingProxy, end: object) -> None:
    with site(folder / "site", proxy.url, 1) as (node,):
        pull_through([node], folder / "first", image)
        wait_for("the cache is durable", lambda: _durable_bytes(node) >= 0.99 * image.size)
        end(node)  # type: ignore[operator]
        proxy.reset()
        node.start()
        pull_through([node], folder / "again", image)
        assert proxy.count.received <= 0.02 * image.size, proxy.count.asked.most_common(5)


def _durable_bytes(node: Node) -> int:
    """Bytes of the blocks in the disk's index. The index names a block only after its bytes were synced."""
    with closing(sqlite3.connect(f"file:{node.data}/cache/index.sqlite?mode=ro", uri=True)) as index:
        rows = index.execute("SELECT record FROM piece WHERE k = 0").fetchall()
    return sum(msgspec.msgpack.decode(record, type=Record).length for (record,) in rows)


def test_why_accounts_for_every_block(folder: Path, image: Image, proxy: CountingProxy) -> None:
    with site(folder / "site", proxy.url, 3) as nodes:
        pull_through(nodes, folder / "out", image)
        for node in nodes:
            answer = node.ctl("why", f"{REPOSITORY}:{TAG}", "--json")
            assert answer.returncode == 0, answer.stderr
            why = json.loads(answer.stdout)
            listed = {row["digest"]: row for row in why["objects"]}
            assert {blob.digest for blob in (image.manifest, *image.blobs)} <= listed.keys()
            for blob in image.blobs:
                blocks = listed[blob.digest]["blocks"]
                assert [block["index"] for block in blocks] == list(range(len(blocks)))
                assert sum(block["length"] for block in blocks) == blob.size
                assert all(block["source"] != "not read" for block in blocks)
            counted = sum(len(row["blocks"]) for row in why["objects"])
            assert sum(total["blocks"] for total in why["totals"].values()) == counted


def test_p2pctl_pulls_and_shows_the_bytes_by_source(folder: Path, image: Image, proxy: CountingProxy) -> None:
    with site(folder / "site", proxy.url, 1) as (node,):
        answer = node.ctl("pull", f"{REPOSITORY}:{TAG}", "--json")
        assert answer.returncode == 0, answer.stderr
        result = json.loads(answer.stdout.splitlines()[-1])
        assert result["ok"] is True
        assert result["by_source"]["origin"] >= sum(blob.size for blob in image.blobs)
        proxy.cut()
        pull_through([node], folder / "out", image)
