"""The image commands from p2pctl to the API behind the control socket, including open files."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import AsyncGenerator, Iterator, Sequence
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner, Result

from node.api.documents import (
    GcReport,
    PinRow,
    PinsReport,
    PrefetchOrder,
    PrefetchReport,
    PrefetchRow,
    WorkEvent,
    WorkProgress,
    WorkResult,
)
from node.cli.client import ControlClient, DaemonRefusedError
from node.cli.main import main
from node.control.routes import image_routes
from node.oci.platforms import Platform, own_platform
from node.oci.references import ImageName
from protocol.errors import BadInputError, NotFoundError
from tests.support.fake_control import DIGEST, FakeControl, served

IMAGE = "docker.io/library/alpine:3"
RESULT = WorkResult(ok=True, seconds=1.0, images=(f"{IMAGE}@{DIGEST}",), objects=3, bytes_total=5 << 20)


class FakeOffline:
    """Records its requests. An import reads its file, and an export writes one."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []
        self.orders: list[PrefetchOrder] = []

    async def export_image(
        self, image: ImageName, platforms: Sequence[Platform], descriptor: int
    ) -> AsyncGenerator[WorkEvent, None]:
        self.asked.append(("export", str(image), tuple(map(str, platforms))))
        yield WorkProgress(phase="writing", bytes_done=1, bytes_total=2)
        os.write(descriptor, b"an archive")
        if image.reference == "missing":
            raise NotFoundError("no such image")
        yield RESULT

    async def import_archive(
        self, descriptor: int, name: ImageName | None, *, pin: bool
    ) -> AsyncGenerator[WorkEvent, None]:
        data = os.read(descriptor, 100)
        self.asked.append(("import", data, str(name) if name else None, pin))
        if data == b"bad":
            raise BadInputError("blobs/x: wrong")
        yield RESULT

    async def pin(self, image: ImageName, platforms: Sequence[Platform]) -> AsyncGenerator[WorkEvent, None]:
        self.asked.append(("pin", str(image), tuple(map(str, platforms))))
        yield RESULT

    async def unpin(self, image: ImageName) -> PinsReport:
        self.asked.append(("unpin", str(image)))
        return await self.pins()

    async def pins(self) -> PinsReport:
        await trio.lowlevel.checkpoint()
        row = PinRow(image=IMAGE, digest=str(DIGEST), size=5 << 20, bytes_held=5 << 20, since=0.0)
        return PinsReport(pins=(row,), bytes=5 << 20, most_bytes=9 << 30)

    async def prefetch(self, order: PrefetchOrder) -> PrefetchReport:
        self.orders.append(order)
        return await self.prefetch_status()

    async def prefetch_status(self) -> PrefetchReport:
        await trio.lowlevel.checkpoint()
        rows = (PrefetchRow(image=image, state="waiting") for order in self.orders for image in order.images)
        return PrefetchReport(rows=tuple(rows), waits_for="its rate")

    async def prefetch_cancel(self) -> PrefetchReport:
        self.orders.clear()
        return await self.prefetch_status()

    async def gc(self, *, older_than_s: float | None, to_bytes: int | None, dry_run: bool) -> GcReport:
        await trio.lowlevel.checkpoint()
        self.asked.append(("gc", older_than_s, to_bytes, dry_run))
        return GcReport(dry_run=dry_run, pieces=2, bytes=1 << 20, held_bytes=4 << 20, pinned_bytes=1 << 20)


@pytest.fixture
def api() -> FakeOffline:
    return FakeOffline()


@pytest.fixture
def path(tmp_path: Path, api: FakeOffline) -> Iterator[Path]:
    with served(FakeControl(), tmp_path / "p2pd.sock", image_routes(api)):
        yield tmp_path / "p2pd.sock"


def run(path: Path, *arguments: object, status: int = 0) -> Result:
    result = CliRunner().invoke(main, ["--socket", str(path), *" ".join(map(str, arguments)).split(" ")])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == status, result.output
    return result


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


# Archives


def test_a_complete_export_replaces_the_file(path: Path, tmp_path: Path, api: FakeOffline) -> None:
    file = tmp_path / "image.tar"
    assert "3 objects, 5.0 MiB" in run(path, "export", "alpine:3", file).stdout
    assert file.read_bytes() == b"an archive"
    assert "--force" in run(path, "export", "alpine:3", file, status=1).stderr
    file.write_bytes(b"older")
    assert "no such image" in run(path, f"export alpine:missing {file} --force", status=1).stderr
    assert file.read_bytes() == b"older"
    run(path, f"export alpine:3 {file} --force --platform linux/arm64 --platform linux/arm/v7")
    assert file.read_bytes() == b"an archive"
    assert sorted(os.listdir(tmp_path)) == ["image.tar", "p2pd.sock"]
    assert api.asked[-1] == ("export", IMAGE, ("linux/arm64", "linux/arm/v7"))


def test_an_import_hands_over_the_open_file(path: Path, tmp_path: Path, api: FakeOffline) -> None:
    file = tmp_path / "image.tar"
    file.write_bytes(b"good")
    before = open_files()
    for _ in range(3):
        run(path, "import", file)
    run(path, f"import {file} --name ghcr.io/a/b:1 --pin")
    assert api.asked[-2:] == [("import", b"good", None, False), ("import", b"good", "ghcr.io/a/b:1", True)]
    file.write_bytes(b"bad")
    assert f"{file}: blobs/x: wrong" in run(path, "import", file, status=1).stderr
    assert "none.tar" in run(path, "import", tmp_path / "none.tar", status=1).stderr
    assert open_files() <= before + 2, "descriptors are closed with their request"


def test_without_an_open_file_nothing_is_done(path: Path, api: FakeOffline) -> None:
    client = ControlClient(path)
    for target in ("/import", "/export?image=alpine"):
        with pytest.raises(DaemonRefusedError, match="the request needs an open file"):
            client.post(target)
    assert api.asked == []


def test_surplus_descriptors_are_closed(path: Path, tmp_path: Path, api: FakeOffline) -> None:
    (tmp_path / "file").write_bytes(b"good")
    request = b"POST /import HTTP/1.1\r\nHost: p2pd\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    counts = []
    for _ in range(10):
        with (tmp_path / "file").open("rb") as file, socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            socket.send_fds(sock, [request], [file.fileno()] * 5)
            while sock.recv(4096):
                pass
        counts.append(open_files())
    assert max(counts) <= counts[0] + 2, counts
    assert [asked[0] for asked in api.asked] == ["import"] * 10


# The others


def test_pins(path: Path, api: FakeOffline) -> None:
    run(path, "pin", "alpine:3")
    run(path, "pin", "alpine:3", "--all-platforms")
    assert [asked[2] for asked in api.asked] == [(str(own_platform()),), ()]
    assert "either" in run(path, "pin alpine:3 --all-platforms --platform linux/arm64", status=2).stderr
    assert "linux/arm64" in run(path, "pin alpine:3 --platform arm64", status=1).stderr
    assert "5.0 MiB pinned of 9.0 GiB" in run(path, "pins").stdout
    assert json.loads(run(path, "unpin", "alpine:3", "--json").stdout)["pins"][0]["image"] == IMAGE
    assert api.asked[-1] == ("unpin", IMAGE)


def test_prefetch(path: Path, tmp_path: Path, api: FakeOffline) -> None:
    names = tmp_path / "names.txt"
    names.write_text("# for tomorrow\nalpine:3\n\n  ghcr.io/a/b:1 # b\n")
    options = ("--rate", "2MiB/s", "--window", "22:00-06:00", "--platform", "linux/arm64")
    assert "waits for its rate" in run(path, f"prefetch {names} busybox", *options).stdout
    (order,) = api.orders
    assert order == PrefetchOrder(
        images=("alpine:3", "ghcr.io/a/b:1", "busybox"), platforms=("linux/arm64",), rate=2 << 20, window="22:00-06:00"
    )
    assert "ghcr.io/a/b:1" in run(path, "prefetch", "--status").stdout
    assert "nothing was ordered" in run(path, "prefetch", "--cancel").stdout
    run(path, "prefetch", status=2)
    run(path, "prefetch", "alpine", "--status", status=2)
    with pytest.raises(DaemonRefusedError, match="PrefetchOrder"):
        ControlClient(path).post("/prefetch", body=b'{"images": 3}')


def test_gc(path: Path, api: FakeOffline) -> None:
    assert "1.0 MiB in 2 pieces would be removed" in run(path, "gc --older-than 7d --dry-run").stdout
    run(path, "gc", "--to", "5GiB")
    assert api.asked == [("gc", 7 * 86400.0, None, True), ("gc", None, 5 << 30, False)]
    run(path, "gc", status=2)
    run(path, "gc --to 1GiB --older-than 1d", status=2)
    assert "--to" in run(path, "gc", "--to", "much", status=1).stderr


def test_methods_are_kept_apart(path: Path) -> None:
    client = ControlClient(path)
    with pytest.raises(DaemonRefusedError, match="/gc needs POST"):
        client.get("/gc")
    with pytest.raises(DaemonRefusedError, match="/pins needs GET"):
        client.post("/pins")
