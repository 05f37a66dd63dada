"""Runs a simulation: trio in virtual time, where nothing but the seed decides what happens.

Three sources of chance are closed: the order in which trio runs tasks, the hashes of strings, and the clock.
"""

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
    """Restart this program with string hashes that are the same in every run."""
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONHASHSEED": "0"})


def play(seed: int, main: Callable[[], Awaitable[T]]) -> T:
    """Run `main` in virtual time. trio draws the order of ready tasks at random; here the seed decides it."""
    from trio._core import _run

    # Hypothesis sets the same two attributes.
    _run._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc] # noqa: SLF001 - no public switch
    _run._r.seed(seed)  # noqa: SLF001 - as above
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 1000)  # few objects are in cycles; the search for them took a quarter of the time
    return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def with_progress(name: str, run: Callable[[Report], T]) -> T:
    """Show the progress of `run` on standard error, if that is a terminal."""
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
