"""The control socket: its file, its routes, its errors, and the client of p2pctl against a real server."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import trio

from node.api.documents import (
    NOT_READ,
    CacheReport,
    DoctorReport,
    ImagesReport,
    PeersReport,
    PullEvent,
    PullProgress,
    PullResult,
    Status,
    TagsReport,
    WhyReport,
)
from node.cli.client import ControlClient, DaemonRefusedError, DaemonUnreachableError, explain
from node.control.routes import metrics_handler
from node.control.socket import control_socket
from node.telemetry.metrics import Metrics
from node.web.server import Request
from protocol.errors import BadInputError
from tests.support.fake_control import FakeControl, served


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "p2pd.sock"


@pytest.fixture
def client(path: Path) -> Iterator[ControlClient]:
    with served(FakeControl(), path):
        yield ControlClient(path)


def is_there(path: Path) -> bool:
    return path.exists()


# The socket's file


def test_the_socket_file_exists_while_served_and_only_the_group_may_use_it(path: Path) -> None:
    async def main() -> None:
        with control_socket(path):
            mode = path.stat().st_mode  # noqa: ASYNC240
            assert stat.S_ISSOCK(mode)
            assert stat.S_IMODE(mode) == 0o660

    trio.run(main)
    assert not is_there(path)


def test_a_stale_socket_is_replaced(path: Path) -> None:
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with served(FakeControl(), path):
        assert ControlClient(path).get("/status")


def test_a_socket_in_use_is_refused_and_kept(path: Path, client: ControlClient) -> None:
    with pytest.raises(BadInputError, match="another daemon answers"), control_socket(path):
        pass
    assert client.get("/status"), "the first daemon still answers"


def test_another_kind_of_file_is_refused_and_kept(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("mine")
    with pytest.raises(BadInputError, match="is not a socket"), control_socket(path):
        pass
    assert path.read_text() == "mine"


def test_a_path_too_long_for_a_socket_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="107 bytes"), control_socket(tmp_path / ("x" * 120)):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInputError, match="cannot listen on"), control_socket(tmp_path / "file" / "s"):
        pass


def test_the_file_of_a_successor_is_not_removed(path: Path) -> None:
    async def main() -> None:
        with control_socket(path):
            path.unlink()  # noqa: ASYNC240
            with control_socket(path):
                os.link(path, path.with_name("kept"))
            os.rename(path.with_name("kept"), path)

    trio.run(main)
    assert is_there(path)


# Documents


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("/status", Status),
        ("/peers", PeersReport),
        ("/images", ImagesReport),
        ("/cache", CacheReport),
        ("/tags?match=docker.io/*", TagsReport),
        ("/doctor", DoctorReport),
    ],
)
def test_documents(client: ControlClient, target: str, kind: type[msgspec.Struct]) -> None:
    data = client.get(target)
    assert msgspec.json.encode(msgspec.json.decode(data, type=kind)) + b"\n" == data


def test_status_has_the_promised_fields(client: ControlClient) -> None:
    document = json.loads(client.get("/status"))
    promised = "name site peer_id addresses uptime_s peers_alive bytes_served requests cache origin_bytes rss_bytes"
    assert set(promised.split()) <= document.keys()
    assert set(document["bytes_served"]) == {"memory", "disk", "containerd", "peer", "origin"}
    assert set(document["cache"]["memory"]) == {"bytes", "budget_bytes", "entries", "pinned_bytes", "probation_bytes"}


def test_why_lists_every_block_once(client: ControlClient) -> None:
    report = msgspec.json.decode(client.get("/why", image="alpine"), type=WhyReport)
    (listing,) = report.objects
    assert [block.index for block in listing.blocks] == list(range(41))
    assert sum(block.length for block in listing.blocks) == listing.size
    assert listing.blocks[40].length == 7
    assert {source: total.blocks for source, total in report.totals.items()} == {"peer": 30, "origin": 1, NOT_READ: 10}
    assert sum(total.bytes for total in report.totals.values()) == listing.size


def test_a_pull_streams_its_events(client: ControlClient) -> None:
    events = [msgspec.json.decode(line, type=PullEvent) for line in client.stream("/pull", image="alpine")]
    assert [type(event) for event in events] == [PullProgress, PullProgress, PullResult]
    assert events[-1].ok  # type: ignore[union-attr]


def test_all_platforms_is_passed_on(path: Path) -> None:
    api = FakeControl()
    with served(api, path):
        list(ControlClient(path).stream("/pull", image="alpine", all_platforms="1"))
        list(ControlClient(path).stream("/pull", image="alpine", all_platforms="0"))
    assert api.pulls == [("docker.io/library/alpine:latest", True), ("docker.io/library/alpine:latest", False)]


@pytest.mark.parametrize(("image", "progress"), [("missing", 1), ("failing", 2)])
def test_a_failed_pull_reports_its_error_in_the_last_line(client: ControlClient, image: str, progress: int) -> None:
    events = [msgspec.json.decode(line, type=PullEvent) for line in client.stream("/pull", image=image)]
    assert len(events) == progress + 1
    assert isinstance(events[-1], PullResult)
    assert not events[-1].ok
    assert events[-1].error


# Errors


@pytest.mark.parametrize(
    ("target", "query", "text"),
    [
        ("/nothing", {}, "no such path"),
        ("/why", {}, "which image"),
        ("/why", {"image": "UPPER"}, "not a repository name"),
        ("/why", {"image": "missing"}, "was not asked for"),
        ("/pull", {"image": "alpine"}, "/pull needs POST"),
    ],
)
def test_errors_are_reported(client: ControlClient, target: str, query: dict[str, str], text: str) -> None:
    with pytest.raises(DaemonRefusedError, match=text):
        client.get(target, **query)


def test_documents_are_not_posted_to(client: ControlClient) -> None:
    with pytest.raises(DaemonRefusedError, match="/status needs GET"):
        list(client.stream("/status"))


def test_curl(client: ControlClient) -> None:
    def curl(*arguments: str) -> tuple[int, object]:
        command = ["curl", "-s", "-w", "\n%{http_code}", "--unix-socket", str(client.path), *arguments]
        body, _, code = subprocess.run(command, capture_output=True, check=True, text=True).stdout.rpartition("\n")
        return int(code), [json.loads(line) for line in body.splitlines()]

    assert curl("http://p2pd/status")[0] == 200
    assert curl("http://p2pd/why?image=missing") == (
        404,
        [{"error": "docker.io/library/missing:latest was not asked for here"}],
    )
    code, lines = curl("-X", "POST", "http://p2pd/pull?image=alpine")
    assert code == 200
    assert [line["event"] for line in lines] == ["progress", "progress", "result"]  # type: ignore[attr-defined]


# The client, without a daemon


def test_the_reason_why_no_daemon_answers(path: Path) -> None:
    with pytest.raises(DaemonUnreachableError, match=r"no control socket at .*systemctl status p2pd"):
        ControlClient(path).get("/status")
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        with pytest.raises(DaemonUnreachableError, match=r"no process listens on .*systemctl status p2pd"):
            ControlClient(path).get("/status")
        path.chmod(0o660)
        assert "(mode 0660, group " in explain(path, PermissionError())


def test_a_daemon_that_dies_while_it_answers(path: Path) -> None:
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        client = ControlClient(path)
        lines = client.stream("/pull", image="alpine")

        def hang_up() -> None:
            connection, _ = listener.accept()
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        with pytest.raises(DaemonUnreachableError, match="closed the connection"):
            next(lines)
        thread.join()


# Metrics


def test_metrics_are_read_at_their_path_only() -> None:
    async def main() -> None:
        handle = metrics_handler(Metrics())
        answer = await handle(Request("GET", "/metrics", {}, {}))
        assert answer.status == 200
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert (await handle(Request("GET", "/", {}, {}))).status == 404
        assert (await handle(Request("POST", "/metrics", {}, {}))).status == 405

    trio.run(main)
