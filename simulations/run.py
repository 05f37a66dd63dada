"""One run: trio in virtual time, with nothing in it that chance outside of the seed could decide."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio
import trio.testing
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

T = TypeVar("T")
Report = Callable[[float], None]
"""Called with the share of the run that is done, from 0 to 1."""


def silent(share: float) -> None:
    """A `Report` that shows nothing."""


def fix_hashes() -> None:
    """Run this program anew with hashes of strings that do not differ from run to run."""
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONHASHSEED": "0"})


def play(seed: int, main: Callable[[], Awaitable[T]]) -> T:
    """Run in virtual time. trio runs the tasks that are ready in an order drawn at random: here by the seed."""
    from trio._core import _run  # it has no other switch for this; Hypothesis sets the same two

    _run._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]
    _run._r.seed(seed)
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 1000)  # little of it is cycles, and looking for them takes a quarter of the time
    return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def with_progress(name: str, run: Callable[[Report], T]) -> T:
    """On standard error, where that is a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(name, total=1.0)
        return run(lambda share: progress.update(task, completed=share))
