"""Real daemons, one of which lies: clients get right bytes, and the others find the liar. S-nn: docs/SECURITY.md."""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.clients import REPOSITORY, TAG, pull_through
from tests.support.containerd import containerd
from tests.support.image import Image
from tests.support.processes import wait_for
from tests.support.proxy import CountingProxy
from tests.support.site import UPSTREAM, Node, site, start_all

DEAD_SERVER = "http://127.0.0.1:9"
LIAR = "node-3"
LIMIT_S = 120.0
"""Only a test that hangs takes this long."""


def have_lie(nodes: list[Node], lie: str) -> list[Node]:
    """Start the nodes, LIAR among them with this lie. Returns the others."""
    for node in nodes:
        if node.name == LIAR:
            node.program = ["/usr/bin/env", f"LIE={lie}", sys.executable, "-m", "tests.support.liar"]
    start_all(nodes)
    return [node for node in nodes if node.name != LIAR]


def liar_at(node: Node) -> dict[str, Any]:
    """The liar's row of `p2pctl peers`."""
    rows = json.loads(node.ctl("--json", "peers").stdout)["peers"]
    row: dict[str, Any] = next((row for row in rows if row["name"] == LIAR), {"quarantine": "", "evidence": []})
    return row


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("containerd") or not shutil.which("ctr"),
    reason="containerd needs to be installed, and root to run it",
)
def test_every_node_names_the_signer_of_false_records_and_pulls_succeed(
    folder: Path, image: Image, proxy: CountingProxy
) -> None:
    """S-05, S-17: the first read of a large layer may lack its last block, but is never whole with a wrong byte."""
    with ExitStack() as stack:
        nodes = stack.enter_context(site(folder / "site", proxy.url, start=False))
        honest = have_lie(nodes, "records")
        engine = stack.enter_context(containerd(folder / "engine"))
        engine.use_mirror(UPSTREAM, DEAD_SERVER, honest[0].mirror)
        wait_for(
            "a pull succeeds", lambda: engine.pull(f"{REPOSITORY}:{TAG}").returncode == 0, seconds=LIMIT_S, every=0.5
        )
        for node in honest:
            wait_for(
                f"{node.name} shut it out", lambda node=node: liar_at(node)["quarantine"], seconds=LIMIT_S, every=0.3
            )  # type: ignore[misc]
            proven = [case for case in liar_at(node)["evidence"] if case["verdict"] == "proven here"]
            assert {case["found_by"] for case in proven} == {honest[0].name}
            assert "proven here" in node.ctl("peers").stdout
        pull_through(honest[1:], folder / "out", image)
        honest[1].stop()
        honest[1].start()
        wait_for("the quarantine is loaded again", lambda: liar_at(honest[1])["quarantine"], seconds=LIMIT_S, every=0.3)


@pytest.mark.parametrize("lie", ["shards", "signed"])
def test_a_liar_about_shards_fails_no_pull_and_is_detected_by_readers(
    folder: Path, image: Image, proxy: CountingProxy, lie: str
) -> None:
    """S-01, S-04: nobody but the liar is quarantined."""
    with site(folder / "site", proxy.url, start=False) as nodes:
        honest = have_lie(nodes, lie)
        pull_through(honest, folder / "out", image)
        assert all("wrong" in liar_at(node)["quarantine"] for node in honest[:1])
        for node in honest:
            rows = json.loads(node.ctl("--json", "peers").stdout)["peers"]
            assert not [row["name"] for row in rows if row["quarantine"] and row["name"] != LIAR]
