"""Removes the namespaces, mounts and processes of a test run, however the run ends.

The context managers of tests/support remove what they made when they exit. They do not exit in a run that is ended by
SIGKILL, or by a second Ctrl-C while it cleans up. Therefore the first resource starts a guard: this file as a process
in a session of its own. It reads from a pipe which resources were made and which were removed. The pipe ends with the
run. The guard then ends the processes and runs the commands that are still on its list, the newest first.

SIGTERM is turned into SIGINT, so that Python exits its context managers as it does after Ctrl-C.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

TERM_S = 5.0
"""Time for a process to end after SIGTERM before the guard kills it."""
COMMAND_S = 30.0
POLL_S = 0.02

Forget = Callable[[], None]
"""A function to call after the resource was removed."""


def taken_away_by(*command: str) -> Forget:
    """Have the guard run `command` if this run ends before it calls the returned function."""
    return _Guard.started().note({"command": list(command)})


def ended_with_the_run(process: subprocess.Popen[Any]) -> Forget:
    """Have the guard end this child if this run ends before it calls the returned function."""
    return _Guard.started().note({"pid": process.pid, "since": _started_at(process.pid)})


@contextlib.contextmanager
def undone_by(*command: str) -> Iterator[None]:
    """Run `command` when the context exits. If the context never exits, the guard runs it."""
    forget = taken_away_by(*command)
    try:
        yield
    finally:
        subprocess.run(command, capture_output=True, check=False)
        forget()


class _Guard:
    """The pipe to the guard process."""

    def __init__(self) -> None:
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        self._numbers = itertools.count()

    @staticmethod
    @functools.cache
    def started() -> _Guard:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
        return _Guard()

    def note(self, thing: dict[str, object]) -> Forget:
        number = next(self._numbers)
        self._write({"number": number, **thing})
        return functools.partial(self._write, {"number": number})

    def _write(self, line: dict[str, object]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(line).encode() + b"\n")
        self._process.stdin.flush()


def _started_at(pid: int) -> int:
    """Clock ticks from boot to the start of the process (proc(5), stat, field 22), or 0 if the process does not exist.

    The kernel reuses a pid, but not the pair of pid and start time.
    """
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError):
        return 0


def _end(processes: dict[int, int]) -> None:
    """End these processes, given as pid and start, all at the same time."""
    for numbers in ((signal.SIGCONT, signal.SIGTERM), (signal.SIGKILL,)):
        deadline = time.monotonic() + TERM_S
        for pid, number in itertools.product(_alive(processes), numbers):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        while _alive(processes) and time.monotonic() < deadline:
            time.sleep(POLL_S)


def _alive(processes: dict[int, int]) -> list[int]:
    return [pid for pid, since in processes.items() if since and _started_at(pid) == since]


def _guard(made: BinaryIO) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    things: dict[int, dict[str, Any]] = {}
    for line in made:
        thing = json.loads(line)
        if len(thing) > 1:
            things[thing["number"]] = thing
        else:
            things.pop(thing["number"], None)
    left = list(reversed(things.values()))
    _end({thing["pid"]: thing["since"] for thing in left if "pid" in thing})
    for thing in left:
        if "command" in thing:
            with contextlib.suppress(subprocess.TimeoutExpired, OSError):
                subprocess.run(thing["command"], capture_output=True, timeout=COMMAND_S, check=False)


if __name__ == "__main__":
    _guard(sys.stdin.buffer)
