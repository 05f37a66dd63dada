"""A site that is cut off: archives in and out, pins, prefetch and gc, with real daemons and skopeo."""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.archives import Layout
from tests.support.clients import REPOSITORY, TAG, finish_pulls, pull_through, start_pulls
from tests.support.image import ARCHITECTURE, Image, noise
from tests.support.processes import free_ports, running, wait_for
from tests.support.proxy import CountingProxy
from tests.support.pull import pull_with_skopeo, verify
from tests.support.site import P2PCTL, ROOT, UPSTREAM, Node, site, start_all

IMAGE = f"{REPOSITORY}:{TAG}"


@pytest.fixture
def nowhere() -> str:
    """A registry that refuses connections."""
    (port,) = free_ports("127.0.0.1", 1)
    return f"http://127.0.0.1:{port}"


@pytest.fixture
def archive(folder: Path, image: Image) -> Path:
    """An archive written by skopeo."""
    return skopeo_archive(folder / "skopeo.tar", image, f":{IMAGE}")


def skopeo_archive(file: Path, image: Image, reference: str) -> Path:
    """Write an archive with skopeo, which needs an index.json that names the image's index as its only manifest."""
    layout = file.with_suffix(".layout")
    shutil.copytree(image.folder, layout)
    root = {**image.index.descriptor(), "annotations": {"org.opencontainers.image.ref.name": "x"}}
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [root]}))
    skopeo("copy", "-aq", f"oci:{layout}:x", f"oci-archive:{file}{reference}")
    shutil.rmtree(layout)
    return file


def skopeo(*arguments: str) -> str:
    if shutil.which("skopeo") is None:
        pytest.skip("skopeo is not installed: run .ci/packages as root")
    options = ["--insecure-policy", "--override-os=linux", f"--override-arch={ARCHITECTURE}"]
    done = subprocess.run(["skopeo", *options, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def done(node: Node, *arguments: str | Path) -> dict[str, object]:
    """Run p2pctl, and return the last document that it prints."""
    answer = node.ctl(*map(str, arguments), "--json")
    assert answer.returncode == 0, answer.stderr
    document: dict[str, object] = json.loads(answer.stdout.splitlines()[-1])
    return document


def failed(node: Node, *arguments: str | Path) -> str:
    answer = node.ctl(*map(str, arguments))
    assert answer.returncode == 1, answer.stdout
    assert "Traceback" not in answer.stderr
    return answer.stderr


@pytest.mark.parametrize("url", ["refused", "http://no-such-host.invalid"])
def test_an_import_on_two_nodes_serves_a_whole_site_without_an_uplink(
    folder: Path, image: Image, archive: Path, nowhere: str, url: str
) -> None:
    with site(folder / "site", nowhere if url == "refused" else url, 5) as nodes:
        result = done(nodes[0], "import", archive)
        assert result["images"] == [f"{IMAGE}@{image.index.digest}"]
        pull_through(nodes[:1], folder / "own", image)
        assert refuses(nodes[1], TAG), "one member alone does not decide what a tag stands for"
        pull_through(nodes[3:4], folder / "digest", image, image.index.digest)
        done(nodes[1], "import", archive)
        archive.unlink()
        pull_through(nodes[1:], folder / "out", image)
        for node in nodes:
            assert node.status()["origin_bytes"] == 0
        rows = json.loads(nodes[2].ctl("tags", "--json").stdout)["tags"]
        assert [(row["source"], set(row["told_by"])) for row in rows] == [
            ("members", {node.name for node in nodes[:2]})
        ]


def test_one_import_is_enough_if_the_site_says_so(folder: Path, image: Image, archive: Path, nowhere: str) -> None:
    with site(folder / "site", nowhere, 4, start=False) as nodes:
        one_witness(nodes)
        done(nodes[0], "import", archive)
        pull_through(nodes, folder / "out", image)


def one_witness(nodes: Sequence[Node], more: str = "") -> None:
    for node in nodes:
        changed = node.config.read_text().replace("[mirror]", f"[mirror]\ntag_witnesses = 1\n{more}")
        node.config.write_text(changed)
    start_all(nodes)


def small_archive(file: Path, layer: bytes, name: str = IMAGE) -> str:
    """Write an archive of one layer. Returns the digest of the image's index."""
    layout = Layout()
    layout.name(layout.index([layout.manifest([layer], ARCHITECTURE)]), name)
    file.write_bytes(layout.pack())
    return str(layout.roots[0]["digest"])


def tag_of(node: Node) -> str:
    """The digest that the mirror gives for the tag, or "" if the mirror does not answer."""
    connection = http.client.HTTPConnection(node.host, node.mirror_port, timeout=60)
    with closing(connection):
        connection.request("HEAD", f"/v2/{REPOSITORY}/manifests/{TAG}")
        response = connection.getresponse()
        return response.getheader("Docker-Content-Digest", "") if response.status == 200 else ""


def test_a_newer_import_replaces_an_older_one(folder: Path, nowhere: str) -> None:
    """On the nodes that import it, and on those that have no answer of their own."""
    with site(folder / "site", nowhere, 4, start=False) as nodes:
        one_witness(nodes, 'tag_ttl = "1ms"')
        for number in range(3):
            digest = small_archive(folder / "image.tar", b"%d" % number)
            done(nodes[0], "import", folder / "image.tar")
            for node in nodes:
                assert tag_of(node) == digest


def test_skopeo_reads_and_another_node_imports_an_exported_archive(
    folder: Path, image: Image, proxy: CountingProxy, nowhere: str
) -> None:
    file = folder / "out.tar"
    with site(folder / "site", proxy.url, 1) as (node,):
        result = done(node, "export", IMAGE, file)
        assert result["images"] == [f"{IMAGE}@{image.index.digest}"]
        assert result["bytes_total"] == image.size
        assert "--force" in failed(node, "export", IMAGE, file)
        assert "no-such" in failed(node, "export", f"{REPOSITORY}:no-such", folder / "other.tar")
        assert sorted(path.name for path in folder.glob("*other.tar*")) == []
    assert json.loads(skopeo("inspect", "--raw", f"oci-archive:{file}")) == json.loads(
        image.path(image.index).read_bytes()
    )
    inspected = json.loads(skopeo("inspect", f"oci-archive:{file}"))
    assert inspected["Layers"] == [layer.digest for layer in image.layers]
    skopeo("copy", f"oci-archive:{file}", f"dir:{folder / 'copied'}")
    verify(folder / "copied", image)
    with site(folder / "cut-off", nowhere, 2) as nodes:
        for node in nodes:
            done(node, "import", file)
        pull_through(nodes, folder / "again", image)


def test_an_archive_without_a_name_is_named_by_hand(folder: Path, image: Image, nowhere: str) -> None:
    file = skopeo_archive(folder / "nameless.tar", image, "")
    with site(folder / "site", nowhere, 1) as (node,):
        error = failed(node, "import", file)
        assert str(file) in error
        assert "index.json" in error
        assert "--name" in error
        assert "registry.test" in failed(node, "import", file, "--name=registry.test/a:1")
        done(node, "import", file, f"--name={IMAGE}")
        pull_through([node], folder / "out", image)


def test_an_archive_that_p2pd_may_not_open_is_imported(folder: Path, image: Image, archive: Path, nowhere: str) -> None:
    """The request carries the open file, and no path that the daemon could open."""
    hidden = folder / "hidden"
    hidden.mkdir()
    os.rename(archive, hidden / "image.tar")
    with site(folder / "site", nowhere, 1) as (node,):
        descriptor = os.open(hidden / "image.tar", os.O_RDONLY)
        os.unlink(hidden / "image.tar")
        os.symlink(f"/proc/{os.getpid()}/fd/{descriptor}", hidden / "open")
        done(node, "import", hidden / "open")
        os.close(descriptor)
        pull_through([node], folder / "out", image)


def rewrite(source: Path, target: Path, change: str, data: bytes) -> None:
    """Copy the archive, with `data` in the entry whose name ends with `change`."""
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for info in old:
            body = old.extractfile(info)
            content = body.read() if body else b""
            if info.name.endswith(change):
                content = data
            info.size = len(content)
            new.addfile(info, io.BytesIO(content))


def test_a_wrong_archive_is_refused_and_nothing_of_it_is_served(
    folder: Path, image: Image, archive: Path, nowhere: str
) -> None:
    layer = image.layers[1]
    wrong, short = folder / "wrong.tar", folder / "short.tar"
    rewrite(archive, wrong, layer.digest.removeprefix("sha256:"), noise(3, layer.size))
    short.write_bytes(archive.read_bytes()[: -(1 << 20)])
    with site(folder / "site", nowhere, 1) as (node,):
        for file in (wrong, short):
            error = failed(node, "import", file)
            assert str(file) in error
            assert "blobs/sha256/" in error or "cut short" in error
        assert failed(node, "import", folder / "none.tar")
        assert node.status()["cache"]["disk"]["bytes"] == 0
        assert refuses(node, TAG)
        assert refuses(node, image.manifest.digest)


def refuses(node: Node, reference: str) -> bool:
    folder = node.folder / f"refused-{hashlib.sha256(os.urandom(8)).hexdigest()[:8]}"
    pull = pull_with_skopeo(node.mirror, REPOSITORY, reference, folder)
    try:
        pull.wait()
    except AssertionError:
        return True
    return False


@pytest.fixture
def large(folder: Path) -> Path:
    """An archive that takes some time to import."""
    layout = Layout()
    layers = [noise(number, 24 << 20) for number in range(6)]
    layout.name(layout.index([layout.manifest(layers, ARCHITECTURE)]), IMAGE)
    file = folder / "large.tar"
    file.write_bytes(layout.pack())
    return file


def root_of(file: Path) -> str:
    with tarfile.open(file) as tar:
        index = tar.extractfile("index.json")
        assert index
        return str(json.load(index)["manifests"][0]["digest"])


def test_killed_in_the_middle_of_an_import_nothing_half_is_served(folder: Path, large: Path, nowhere: str) -> None:
    with site(folder / "site", nowhere, 1) as (node,):
        with ThreadPoolExecutor(1) as pool:
            command = pool.submit(node.ctl, "import", str(large))
            wait_for("some blocks are stored", lambda: stored(node) > 8 << 20, every=0.002)
            node.kill()
        assert command.result().returncode == 3, command.result().stderr
        assert stored(node) < large.stat().st_size - (1 << 20)
        node.start()
        for reference in (TAG, root_of(large)):
            assert refuses(node, reference)
        assert done(node, "pins")["pins"] == []
        done(node, "import", large)
        assert not refuses(node, TAG)


def test_an_import_ends_with_its_p2pctl(folder: Path, large: Path, nowhere: str) -> None:
    with site(folder / "site", nowhere, 1) as (node,):
        command = [*P2PCTL, "--socket", str(node.socket), "import", str(large)]
        with running(command, folder / "log", {**os.environ, "PYTHONPATH": str(ROOT)}):
            wait_for("some blocks are stored", lambda: stored(node) > 8 << 20, every=0.002)
        wait_for("its blocks are released", lambda: node.status()["cache"]["disk"]["pinned_bytes"] == 0)
        assert refuses(node, TAG)
        assert stored(node) < large.stat().st_size - (1 << 20)


def stored(node: Node) -> int:
    return sum(path.stat().st_blocks * 512 for path in (node.data / "cache" / "objects").rglob("*") if path.is_file())


# Pins


def test_pins_outlive_pressure_and_restarts(folder: Path, image: Image, proxy: CountingProxy) -> None:
    with site(folder / "site", proxy.url, 1, start=False) as (node,):
        budget = 2 * image.size
        node.config.write_text(node.config.read_text().replace('disk = "4GiB"', f'disk = "{budget}"'))
        node.start()
        done(node, "pin", IMAGE)
        (row,) = done(node, "pins")["pins"]  # type: ignore[misc]
        assert row["bytes_held"] == row["size"] == image.size
        proxy.cut()
        for number in range(4):
            fill(node, folder, number, image.size // 2)
        disk = node.status()["cache"]["disk"]
        assert disk["pinned_bytes"] >= image.size
        assert disk["bytes"] <= budget
        pull_through([node], folder / "out", image)
        node.kill()
        node.config.write_text(
            node.config.read_text().replace("[mirror]", '[mirror]\ntag_ttl = "1ms"\ntag_max_age = "1ms"')
        )
        (node.data / "names.sqlite").unlink()
        node.start()
        fill(node, folder, 9, image.size // 2)
        pull_through([node], folder / "again", image)
        done(node, "unpin", IMAGE)
        assert "not pinned" in failed(node, "unpin", IMAGE)
        assert node.status()["cache"]["disk"]["pinned_bytes"] == 0
        assert refuses(node, TAG), "the tag is too old now"


def fill(node: Node, folder: Path, number: int, size: int) -> None:
    """Import a new image of `size` bytes."""
    file = folder / "fill.tar"
    small_archive(file, noise(100 + number, size), f"{REPOSITORY}:fill{number}")
    done(node, "import", file)


def test_more_than_the_budget_is_not_pinned(folder: Path, image: Image, proxy: CountingProxy) -> None:
    with site(folder / "site", proxy.url, 1, start=False) as (node,):
        node.config.write_text(node.config.read_text().replace('disk = "4GiB"', 'disk = "8MiB"'))
        node.start()
        error = failed(node, "pin", IMAGE)
        assert "do not fit" in error
        assert "cache.disk" in error
        assert done(node, "pins")["pins"] == []


# Prefetch and gc


def test_prefetch_continues_after_p2pctl_and_a_restart(folder: Path, image: Image, proxy: CountingProxy) -> None:
    names = folder / "images.txt"
    names.write_text(f"# what tomorrow needs\n{IMAGE}  # the app\n\n{REPOSITORY}:no-such\n")
    with site(folder / "site", proxy.url, 1) as (node,):
        done(node, "prefetch", names, "--rate=4MiB")
        wait_for("it runs", lambda: any(0 < row["bytes_done"] < image.size for row in rows(node)))
        node.stop()
        node.start()
        assert [row["state"] for row in rows(node) if row["image"] == IMAGE] != ["done"]
        wait_for("both are over", lambda: {row["state"] for row in rows(node)} == {"done", "failed"})
        assert next(row for row in rows(node) if row["state"] == "failed")["image"].endswith("no-such")
        proxy.cut()
        pull_through([node], folder / "out", image)
        assert rows(node)


def rows(node: Node) -> Sequence[dict[str, object]]:
    return done(node, "prefetch", "--status")["rows"]  # type: ignore[return-value]


def test_a_prefetch_waits_for_its_hours_and_can_be_cancelled(
    folder: Path, image: Image, proxy: CountingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "UTC")
    with site(folder / "site", proxy.url, 1) as (node,):
        hour = int(subprocess.run(["date", "-u", "+%H"], capture_output=True, text=True, check=True).stdout)
        window = f"{(hour + 3) % 24:02d}:00-{(hour + 5) % 24:02d}:00"
        done(node, "prefetch", IMAGE, f"--window={window}")
        wait_for("it waits", lambda: "hours" in str(done(node, "prefetch", "--status")["waits_for"]))
        assert proxy.count.received == 0
        assert failed(node, "prefetch", IMAGE, "--window=25:00-26:00")
        done(node, "prefetch", "--cancel")
        assert [row["state"] for row in rows(node)] == ["cancelled"]


def test_gc_removes_unused_images(folder: Path, image: Image, proxy: CountingProxy) -> None:
    with site(folder / "site", proxy.url, 1) as (node,):
        finish_pulls(start_pulls([node], folder / "out"), image)
        before = node.status()["cache"]["disk"]["bytes"]
        assert done(node, "gc", "--older-than", "1h")["pieces"] == 0
        planned = done(node, "gc", "--to=8MiB", "--dry-run")
        assert node.status()["cache"]["disk"]["bytes"] == before
        freed = done(node, "gc", "--to", "8MiB")
        assert freed["bytes"] == planned["bytes"] == before - node.status()["cache"]["disk"]["bytes"]
        assert freed["held_bytes"] <= 8 << 20  # type: ignore[operator]
        wait_for("some time passes", lambda: done(node, "gc", "--older-than", "1ms")["held_bytes"] == 0)
        assert UPSTREAM in done(node, "pin", IMAGE)["images"][0]  # type: ignore[index]
        assert done(node, "gc", "--to", "0B")["held_bytes"] == node.status()["cache"]["disk"]["pinned_bytes"]
