"""Telling systemd how the daemon fares (sd_notify(3)); outside systemd all of it does nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

import sdnotify
import trio

_MICROSECONDS = 1_000_000


def watchdog_interval(environment: Mapping[str, str], pid: int) -> float | None:
    """Seconds between two signs of life, half of what systemd waits (sd_watchdog_enabled(3)); None: not asked for."""
    asked = environment.get("WATCHDOG_USEC", "")
    meant = environment.get("WATCHDOG_PID", str(pid))
    if not asked.isascii() or not asked.isdigit() or int(asked) == 0 or meant != str(pid):
        return None
    return int(asked) / 2 / _MICROSECONDS


class Notifier:
    """Reads the environment once, when it is made. The signs of life come from the daemon's own loop, so that a loop
    that hangs is restarted."""

    def __init__(self) -> None:
        self._systemd = sdnotify.SystemdNotifier()
        self._interval = watchdog_interval(os.environ, os.getpid())

    def ready(self, status: str = "") -> None:
        self._systemd.notify(f"READY=1\nSTATUS={status}" if status else "READY=1")

    def reloading(self) -> None:
        """`ready` ends it. The time is what Type=notify-reload asks for; systemd 252 passes it over."""
        self._systemd.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        self._systemd.notify("STOPPING=1")

    async def watchdog(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Signs of life until cancelled; returns at once where none were asked for."""
        task_status.started()
        while self._interval is not None:
            self._systemd.notify("WATCHDOG=1")
            await trio.sleep(self._interval)
