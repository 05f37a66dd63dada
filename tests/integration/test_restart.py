"""p2pd is restarted repeatedly, as by systemd, while containerd pulls through it without a pause."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

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
"""With an empty cache a pull takes at least a second, so that each restart interrupts one."""

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("containerd") or not shutil.which("ctr"),
    reason="containerd needs to be installed, and root to run it",
)


def pull_until(over: threading.Event, engine: Containerd) -> int:
    """Pull and remove the image until `over`. Returns the number of pulls; the last image is kept."""
    count = 0
    while True:
        pulled = engine.pull(REFERENCE)
        assert pulled.returncode == 0, pulled.stdout + pulled.stderr
        count += 1
        if over.is_set():
            return count
        assert engine.ctr("images", "remove", "--sync", REFERENCE).returncode == 0


def restart_in_mid_pull(node: Node) -> int:
    """Restart the node with an empty cache. Returns the bytes that it had served before."""
    wait_for("a pull is under way", lambda: served(node) > 1 << 20)
    before = served(node)
    assert node.stop() == 0, tail(node.log)
    node.forget()
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
        before = [restart_in_mid_pull(node) for _ in range(RESTARTS)]
        over.set()
        counts = [pull.result() for pull in pulling]
        assert max(before) < image.size, "each restart interrupted a pull from an empty cache"
        assert min(counts) > 1
        for engine in engines:
            blobs = engine.content_store / "blobs" / "sha256"
            for path in blobs.iterdir():
                assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
            assert {layer.digest.partition(":")[2] for layer in image.layers} <= {path.name for path in blobs.iterdir()}
        assert "Traceback" not in tail(node.log, 10000)
