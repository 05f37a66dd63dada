"""A reload of a daemon's configuration during a pull applies the whole file, or nothing."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import threading
from pathlib import Path

import pytest

from protocol.ids import BLOCK_SIZE
from tests.support.faulty_origin import FaultyOrigin, content
from tests.support.processes import tail, wait_for
from tests.support.site import UPSTREAM, Node, site

SIZE = 64 * BLOCK_SIZE + 12345
SLOW = 'rate = "8MiB"\n'
"""The whole blob takes 4 s at this rate."""


def edit(node: Node, *changes: tuple[str, str]) -> str:
    """Change the configuration file, and return its former text."""
    before = text = node.config.read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    node.config.write_text(text)
    return before


def limited(node: Node) -> None:
    edit(node, ("[cluster]", f"{SLOW}[cluster]"))


class Reading(threading.Thread):
    """A client that reads the registry's blob."""

    def __init__(self, node: Node, origin: FaultyOrigin, name: str = UPSTREAM) -> None:
        super().__init__()
        self.came = bytearray()
        self.status = 0
        self._ask = node.host, node.mirror_port, f"/v2/app/blobs/{origin.digest}?ns={name}"

    def run(self) -> None:
        host, port, path = self._ask
        with contextlib.closing(http.client.HTTPConnection(host, port, timeout=60)) as connection:
            connection.request("GET", path)
            answer = connection.getresponse()
            self.status = answer.status
            while part := answer.read1(1 << 16):
                self.came += part

    def __enter__(self) -> Reading:
        self.start()
        wait_for("some of the blob", lambda: len(self.came) > BLOCK_SIZE)
        return self

    def __exit__(self, *_: object) -> None:
        self.join(60)


def test_a_pull_continues_while_its_registry_is_replaced_and_its_rate_lifted(folder: Path) -> None:
    with (
        FaultyOrigin(SIZE) as before,
        FaultyOrigin(SIZE) as after,
        site(folder / "site", before.url, 1, start=False) as (node,),
    ):
        limited(node)
        node.start()
        with Reading(node, before) as client:
            edit(node, (before.url, after.url), (SLOW, ""), ('name = "node-1"', 'name = "node-1"\nlog = "warning"'))
            done = node.ctl("reload")
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout.splitlines() == [
                'changed node.log: "info" -> "warning"',
                f'changed upstream "{UPSTREAM}": url: "{before.url}" -> "{after.url}"',
                f'changed upstream "{UPSTREAM}": rate: "8MiB" -> ""',
            ]
            assert len(client.came) < SIZE // 2, "the reload came during the read"
            assert node.status()["upstreams"][0]["uplink"] is None, "no rate limits it any more"
        assert client.came == content(0, SIZE)
        assert before.asked
        assert after.asked, "the rest must come from the new registry"
        assert before.asked_bytes + after.asked_bytes <= SIZE + 2 * BLOCK_SIZE
        assert [row["url"] for row in node.status()["upstreams"]] == [after.url]
        assert "changed" not in tail(node.log, 1000), "changes are logged below level warning"


def test_a_pull_completes_after_its_registry_left_the_configuration(folder: Path) -> None:
    with FaultyOrigin(SIZE) as origin, site(folder / "site", origin.url, 1, start=False) as (node,):
        limited(node)
        node.start()
        with Reading(node, origin) as client:
            edit(node, (f'name = "{UPSTREAM}"', 'name = "other.test"'), (SLOW, ""))
            done = node.ctl("reload", "--json")
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout) == {
                "changed": [f'upstream "{UPSTREAM}": removed', 'upstream "other.test": added'],
                "needs_restart": [],
            }
        assert client.came == content(0, SIZE)
        late = Reading(node, origin)
        late.run()
        assert late.status == 404
        assert b"other.test" in late.came, "the error names the configured upstreams"
        anew = Reading(node, origin, "other.test")
        anew.run()
        assert anew.came == content(0, SIZE)


MISTAKES = [
    ("[cache]", "[cache", "line "),
    ('memory = "64MiB"', 'memroy = "64MiB"', "memroy"),
    ('memory = "64MiB"', 'memory = "lots"', "cache.memory"),
    ("[cluster]", 'ca = "/none.pem"\n[cluster]', "/none.pem"),
    ("bootstrap = []", 'bootstrap = ["/ip4/127.0.0.1"]', "/ip4/127.0.0.1"),
    ('listen = "/ip4/', 'listen = "/ipx/', "/ipx/"),
]


def test_a_wrong_configuration_changes_nothing(folder: Path) -> None:
    with FaultyOrigin(BLOCK_SIZE) as origin, site(folder / "site", origin.url, 1) as (node,):
        for old, new, named in MISTAKES:
            before = edit(node, (old, new), ('disk = "4GiB"', 'disk = "1GiB"'))
            done = node.ctl("reload")
            assert (done.returncode, done.stdout) == (1, ""), done
            assert named in done.stderr
            assert "Traceback" not in done.stderr
            assert "the previous one stays in force" in tail(node.log, 3)
            assert node.status()["cache"]["disk"]["budget_bytes"] == 4 << 30
            node.config.write_text(before)
        done = node.ctl("reload")
        assert (done.returncode, done.stdout) == (0, "changed nothing\n")
        client = Reading(node, origin)
        client.run()
        assert client.came == content(0, BLOCK_SIZE)


def test_sighup_notifies_systemd_and_some_keys_wait_for_a_restart(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.ExitStack() as stack:
        systemd = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        systemd.bind(str(folder / "notify"))
        systemd.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", str(folder / "notify"))
        origin = stack.enter_context(FaultyOrigin(size := 24 * BLOCK_SIZE))
        (node,) = stack.enter_context(site(folder / "site", origin.url, 1))
        assert systemd.recv(200).startswith(b"READY=1")
        client = Reading(node, origin)
        client.run()
        assert node.status()["cache"]["memory"]["bytes"] > size // 2
        edit(node, ('"64MiB"', '"4MiB"'), ('"4GiB"', '"6MiB"'), ("[peers]", "[peers]\nm = 2"))
        node.process.send_signal(signal.SIGHUP)
        assert systemd.recv(200).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
        assert systemd.recv(200) == b"READY=1\nSTATUS=the configuration was read again"
        cache = node.status()["cache"]
        assert cache["memory"]["bytes"] <= cache["memory"]["budget_bytes"] == 4 << 20
        assert cache["disk"]["budget_bytes"] == 6 << 20
        wait_for("the disk has evicted", lambda: node.status()["cache"]["disk"]["bytes"] <= 6 << 20)
        done = node.ctl("reload")
        assert (done.returncode, done.stdout) == (4, "changed nothing\nneeds a restart: peers.m: 1 -> 2\n")
        client = Reading(node, origin)
        client.run()
        assert client.came == content(0, size)
