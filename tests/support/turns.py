"""Steps of tasks, and turns of trio's loop, that take too long: an instrument, and the file of its findings.

A *step* is the work of one task between two checkpoints. A *turn* is all steps between two waits for I/O. Both are
measured in CPU time of the loop's thread, so that a busy machine makes none of them longer; time in which the thread
waits for a disk or a lock is in `wall_s` only.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Literal

import msgspec
import trio
from trio.abc import Instrument

LIMIT_S = 0.05
FRAMES = 16
"""Innermost frames of a stack that are kept."""
BUSIEST = 5
"""Tasks that are named of a long turn."""


class LongTurn(msgspec.Struct, frozen=True):
    """`at_s` counts from the start of the instrument. For a turn, `task` names its busiest tasks. `stack` is a sample
    of a step's stack, taken when the limit had passed or at the first switch of threads after it; it may be empty."""

    kind: Literal["step", "turn"]
    at_s: float
    cpu_s: float
    wall_s: float
    task: str
    stack: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = f"{self.kind} of {self.cpu_s * 1e3:.0f} ms ({self.wall_s * 1e3:.0f} ms of time) in {self.task}"
        return "\n".join([head, *self.stack])


class Turns(Instrument):
    """Calls `report` for each step and each turn that takes `limit_s` or more. For one run of trio, in the
    thread that makes it."""

    def __init__(self, report: Callable[[LongTurn], None], limit_s: float = LIMIT_S) -> None:
        self._report, self._limit_s = report, limit_s
        self._turn: tuple[float, float] | None = None
        self._step: tuple[float, float] | None = None
        self._tasks: dict[str, float] = {}
        self._stack: tuple[str, ...] = ()
        self._over = threading.Event()
        self._began, self._loop = time.monotonic(), threading.get_ident()
        threading.Thread(target=self._sample, name="turns", daemon=True).start()

    def after_run(self) -> None:
        self._over.set()

    def after_io_wait(self, timeout: float) -> None:
        self._turn, self._tasks = _now(), {}

    def before_io_wait(self, timeout: float) -> None:
        if self._turn is not None:
            busiest = sorted(self._tasks, key=self._tasks.__getitem__, reverse=True)[:BUSIEST]
            self._note("turn", self._turn, ", ".join(busiest))
            self._turn = None

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._stack, self._step = (), _now()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        began, self._step = self._step, None
        if began is not None:
            self._tasks[task.name] = self._tasks.get(task.name, 0.0) + self._note("step", began, task.name)

    def _note(self, kind: Literal["step", "turn"], began: tuple[float, float], task: str) -> float:
        cpu, wall = _now()
        took_s = cpu - began[0]
        if took_s >= self._limit_s:
            stack = self._stack if kind == "step" else ()
            self._report(LongTurn(kind, began[1] - self._began, took_s, wall - began[1], task, stack))
        return took_s

    def _sample(self) -> None:
        """In a thread: keep the stack of a step that is over the limit."""
        while not self._over.wait(self._limit_s / 2):
            step = self._step
            if step is not None and not self._stack and time.monotonic() - step[1] >= self._limit_s:
                self._stack = _frames(sys._current_frames().get(self._loop))  # noqa: SLF001 - documented, for debuggers


def _now() -> tuple[float, float]:
    """CPU time of this thread, and monotonic time."""
    return time.thread_time(), time.monotonic()


def _frames(frame: FrameType | None) -> tuple[str, ...]:
    summary = traceback.extract_stack(frame, FRAMES) if frame is not None else []
    return tuple(f"{entry.filename}:{entry.lineno} {entry.name}" for entry in summary)


def to_file(path: Path) -> Callable[[LongTurn], None]:
    """A `report` that appends a line of JSON to a file."""

    def report(turn: LongTurn) -> None:
        with path.open("ab") as file:
            file.write(msgspec.json.encode(turn) + b"\n")

    return report


def read(path: Path, after: int = 0) -> list[LongTurn]:
    """The findings in a file, without the first `after` ones; none if there is no file."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [msgspec.json.decode(line, type=LongTurn) for line in lines[after:]]
