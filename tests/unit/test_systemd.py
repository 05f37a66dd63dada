"""Notifications to systemd, over a real notification socket."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from node.runtime.systemd import Notifier, watchdog_interval


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.delenv("WATCHDOG_PID", raising=False)
        yield sock


def test_ready_and_stopping(systemd: socket.socket) -> None:
    notifier = Notifier()
    notifier.ready("serving on 127.0.0.1:5050")
    assert systemd.recv(200) == b"READY=1\nSTATUS=serving on 127.0.0.1:5050"
    notifier.stopping()
    assert systemd.recv(200) == b"STOPPING=1"


def test_signs_of_life_are_sent_twice_in_each_interval(systemd: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")

    async def main() -> int:
        with trio.move_on_after(59):
            await Notifier().watchdog()
        count = 0
        while count < 100:
            try:
                assert systemd.recv(200) == b"WATCHDOG=1"
            except BlockingIOError:
                return count
            count += 1
        return count

    assert trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0)) == 4


def test_without_systemd_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    notifier = Notifier()
    notifier.ready()
    notifier.stopping()

    async def main() -> float:
        with trio.fail_after(1):
            await notifier.watchdog()
        return trio.current_time()

    assert trio.run(main, clock=trio.testing.MockClock()) == 0.0


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "20000000"}, 10.0),
        ({"WATCHDOG_USEC": "20000000", "WATCHDOG_PID": "7"}, 10.0),
        ({"WATCHDOG_USEC": "20000000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_interval(environment: dict[str, str], seconds: float | None) -> None:
    assert watchdog_interval(environment, 7) == seconds
