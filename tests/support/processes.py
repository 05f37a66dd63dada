"""Helpers for tests that start programs: free ports, bounded waits, and processes that end with their context.

No test measures time by these waits: their bounds only end a hang, also on a busy machine.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from tests.support.leftovers import ended_with_the_run, undone_by

T = TypeVar("T")

POLL_S = 0.01
PATIENCE_S = 60.0
"""Bounds every wait. An event that comes later counts as a hang."""


class TimeoutExceededError(AssertionError):
    """An event that a test waited for did not happen within the bound."""


def free_ports(host: str, count: int) -> list[int]:
    """Ports on which no process listens now. All are bound until the last is chosen, so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, 0))
        return [sock.getsockname()[1] for sock in sockets]


def wait_for(event: str, probe: Callable[[], T | None], *, seconds: float = PATIENCE_S, every: float = POLL_S) -> T:
    """Call `probe` until it returns a true value, and return that. Raises TimeoutExceededError that names `event`."""
    deadline = time.monotonic() + seconds
    while True:
        answer = probe()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise TimeoutExceededError(f"not within {seconds:g} s: {event}")
        time.sleep(every)


@contextlib.contextmanager
def scratch(prefix: str = "shoal-", parent: Path | None = None) -> Iterator[Path]:
    """A new folder with a path short enough for unix sockets. It is removed with its content."""
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    with undone_by("rm", "-rf", str(folder)):
        yield folder


def tail(path: Path, lines: int = 30) -> str:
    return "\n".join(path.read_text("utf-8", "replace").splitlines()[-lines:]) if path.exists() else "(no log)"


def terminate(process: subprocess.Popen[bytes]) -> int:
    """SIGTERM, a bounded wait, then SIGKILL. Returns the exit status."""
    if process.poll() is None:
        process.terminate()
    try:
        return process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


@contextlib.contextmanager
def running(
    command: Sequence[str | Path], log: Path, env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that writes its output to `log`. It ends with the context."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env)
    ended_with_the_run(process)
    try:
        yield process
    finally:
        terminate(process)
