"""p2pd restarted as systemd does it, again and again, while containerd pulls through it all the time."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.chaos.faults import forget
from tests.support.clients import REPOSITORY, TAG
from tests.support.containerd import Containerd, containerd
from tests.support.image import Image
from tests.support.processes import tail, wait_for
from tests.support.proxy import CountingProxy
from tests.support.registry import Registry
from tests.support.site import UPSTREAM, Node, site

REFERENCE = f"{REPOSITORY}:{TAG}"
RESTARTS = 3
RATE = 'rate = "24MiB"\n'
"""With an empty cache a pull takes a second at least, so that each restart meets one."""

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("containerd") or not shutil.which("ctr"),
    reason="containerd needs to be installed, and root to run it",
)


def pull_until(over: threading.Event, engine: Containerd) -> int:
    """How often the image was pulled, from nothing each time; the last one is there still."""
    count = 0
    while True:
        pulled = engine.pull(REFERENCE)
        assert pulled.returncode == 0, pulled.stdout + pulled.stderr
        count += 1
        if over.is_set():
            return count
        assert engine.ctr("images", "remove", "--sync", REFERENCE).returncode == 0


def restart_in_mid_pull(node: Node, image: Image) -> int:
    """What its clients got of it before, in bytes."""
    wait_for("a pull is under way", lambda: served(node) > 1 << 20, seconds=30)
    before = served(node)
    assert node.stop() == 0, tail(node.log)
    forget(node.data)
    node.start()
    return before


def served(node: Node) -> int:
    return sum(node.status()["bytes_served"].values())


def test_no_pull_fails_while_the_daemon_is_restarted(
    folder: Path, image: Image, proxy: CountingProxy, registry: Registry
) -> None:
    with ExitStack() as stack:
        (node,) = stack.enter_context(site(folder / "site", proxy.url, 1, start=False))
        node.config.write_text(node.config.read_text().replace("[cluster]", f"{RATE}[cluster]"))
        node.start()
        engines = [stack.enter_context(containerd(folder / f"engine-{i}")) for i in (1, 2)]
        for engine in engines:
            engine.use_mirror(UPSTREAM, registry.url, node.mirror)
        pool, over = stack.enter_context(ThreadPoolExecutor(len(engines))), threading.Event()
        stack.callback(over.set)
        pulling = [pool.submit(pull_until, over, engine) for engine in engines]
        before = [restart_in_mid_pull(node, image) for _ in range(RESTARTS)]
        over.set()
        counts = [one.result() for one in pulling]
        assert max(before) < image.size, "each restart met a pull from an empty cache"
        assert min(counts) > 1
        for engine in engines:
            blobs = engine.content_store / "blobs" / "sha256"
            for path in blobs.iterdir():
                assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
            assert {layer.digest.partition(":")[2] for layer in image.layers} <= {path.name for path in blobs.iterdir()}
        assert "Traceback" not in tail(node.log, 10000)
