"""Notifications to systemd about the daemon's state (sd_notify(3)); outside systemd they do nothing.

The watchdog's signs of life come from the daemon's own event loop, so that systemd restarts a daemon whose loop hangs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

import sdnotify
import trio

_MICROSECONDS = 1_000_000


def watchdog_interval(environment: Mapping[str, str], pid: int) -> float | None:
    """Seconds between signs of life, half of systemd's timeout (sd_watchdog_enabled(3)); None: no watchdog is set."""
    timeout = environment.get("WATCHDOG_USEC", "")
    watched = environment.get("WATCHDOG_PID", str(pid))
    if not timeout.isascii() or not timeout.isdigit() or int(timeout) == 0 or watched != str(pid):
        return None
    return int(timeout) / 2 / _MICROSECONDS


class Notifier:
    """Reads the environment once, when it is constructed."""

    def __init__(self) -> None:
        self._systemd = sdnotify.SystemdNotifier()
        self._interval = watchdog_interval(os.environ, os.getpid())

    def ready(self, status: str = "") -> None:
        self._systemd.notify(f"READY=1\nSTATUS={status}" if status else "READY=1")

    def reloading(self) -> None:
        """`ready` ends the reload. Type=notify-reload requires the time; systemd 252 ignores it."""
        self._systemd.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        self._systemd.notify("STOPPING=1")

    async def watchdog(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Send signs of life until cancelled; returns at once if no watchdog is set."""
        task_status.started()
        while self._interval is not None:
            self._systemd.notify("WATCHDOG=1")
            await trio.sleep(self._interval)
