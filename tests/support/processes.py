"""What every test that starts programs needs: free ports, bounded waits, and processes that are ended by their id."""

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
STOP_S = 10.0
"""How long a process may take to end after SIGTERM before it is killed."""


class TimeoutExceededError(AssertionError):
    """Something that a test waited for did not come about in time."""


def free_ports(host: str, count: int) -> list[int]:
    """Ports nobody listens on now; all are held until the last is known, so they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, 0))
        return [sock.getsockname()[1] for sock in sockets]


def wait_for(what: str, probe: Callable[[], T | None], *, seconds: float = 15.0, every: float = POLL_S) -> T:
    """Ask `probe` until it answers something true; raises TimeoutExceededError naming `what`."""
    deadline = time.monotonic() + seconds
    while True:
        answer = probe()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise TimeoutExceededError(f"not within {seconds:g} s: {what}")
        time.sleep(every)


@contextlib.contextmanager
def scratch(prefix: str = "shoal-", parent: Path | None = None) -> Iterator[Path]:
    """A new folder with a path short enough for unix sockets, removed with all that it holds."""
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    with undone_by("rm", "-rf", str(folder)):
        yield folder


def tail(path: Path, lines: int = 30) -> str:
    return "\n".join(path.read_text("utf-8", "replace").splitlines()[-lines:]) if path.exists() else "(no log)"


def terminate(process: subprocess.Popen[bytes]) -> int:
    """SIGTERM, a bounded wait, then SIGKILL; the exit status."""
    if process.poll() is None:
        process.terminate()
    try:
        return process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


@contextlib.contextmanager
def running(
    command: Sequence[str | Path], log: Path, env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process with its output in `log`, ended when the context is left."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env)
    ended_with_the_run(process)
    try:
        yield process
    finally:
        terminate(process)
