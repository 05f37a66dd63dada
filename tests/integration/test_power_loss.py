"""A power cut at any moment causes no wrong byte and no error. Safe data still exists, and the store works."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Awaitable, Callable
from functools import cache
from pathlib import Path

import pytest
import trio

from cache.disk import DiskStore
from tests.support.file_trace import Mark, Operation, Sync, Write, traced
from tests.support.power_loss import Crash, Crashes
from tests.support.power_loss_work import BUDGET, OTHERS, PIECES, PINNED, blob_of, put
from tests.support.remembered import Remembered

ROOT = Path(__file__).parents[2]
SEEDS = (1,)
Trace = tuple[str, list[Operation]]
"""The folder in which a program worked, and its operations there."""
Traces = Callable[[str], Trace]
Check = Callable[[Path, Crash], Awaitable[None]]


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Traces:
    return cache(lambda work: trace(work, tmp_path_factory.mktemp(work)))


def trace(work: str, tmp_path: Path) -> Trace:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed: run .ci/packages as root")
    folder = tmp_path / "work"
    command = [sys.executable, "-m", "tests.support.power_loss_work", work, str(folder)]
    return str(folder), traced(command, folder, tmp_path / "log", ROOT)


def check_all(trace: Trace, quick: Path, check: Check) -> int:
    """Check each state that a power cut may leave. Returns their number."""
    crashes, seen = Crashes(trace[1]), set[int]()
    for count in range(len(crashes)):
        for crash in crashes.at(count, SEEDS):
            if (state := crash.fingerprint()) not in seen:
                seen.add(state)
                check_one(trace, crash, quick, check)
    return len(seen)


def check_one(trace: Trace, crash: Crash, quick: Path, check: Check) -> None:
    folder, operations = trace
    target = quick / "state"
    target.mkdir()
    crash.store(folder, target)
    try:
        trio.run(check, target, crash)
    except BaseException as error:
        last = repr(operations[crash.count - 1 : crash.count])[:300]
        error.add_note(f"{crash.how}, behind {crash.count} of {len(operations)} operations: {last}")
        raise
    shutil.rmtree(target)


async def check_store(folder: Path, crash: Crash) -> None:
    """A disk without ordered names promises nothing about pieces whose file names were not synced."""
    kept = crash.said("kept")[-1:] if crash.ordered else []
    async with DiskStore.open(folder, BUDGET, pinned=PINNED) as store:
        for number, piece in enumerate(PIECES):
            blob = blob_of(piece)
            held = await store.get(piece)
            assert held is None or (bytes(held.data), held.record) == (blob.bytes_of(piece), blob.record(piece))
            assert held or not any(number in numbers for numbers in kept), f"lost: {piece}"  # type: ignore[operator]
        await store.flush()
        assert allocated(folder) <= store.statistics().bytes <= BUDGET
        await put(store, *OTHERS[-1].pieces)
    async with DiskStore.open(folder, BUDGET, pinned=PINNED) as store:
        assert await store.get(OTHERS[-1].pieces[0])


def allocated(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in (folder / "objects").rglob("*") if path.is_file())


async def check_data(folder: Path, crash: Crash) -> None:
    await Remembered(folder).check({word: crash.said(word) for word in ("identity", "pinned")})


@pytest.mark.parametrize(("work", "check"), [("store", check_store), ("data", check_data)])
def test_a_power_cut_after_any_operation(traces: Traces, quick: Path, work: str, check: Check) -> None:
    trace = traces(work)
    operations = trace[1]
    written = {type(operation).__name__ for operation in operations}
    assert written >= {"Write", "Sync", "Name", "Unname", "Rename", "Resize", "Mark"}
    assert work != "store" or "Punch" in written
    states = check_all(trace, quick, check)
    writes = sum(isinstance(operation, Write) for operation in operations)
    print(f"{states} states of {len(operations)} operations, {writes} writes")


def test_a_store_that_does_not_sync_is_detected(traces: Traces, quick: Path) -> None:
    """Test the check itself."""
    folder, operations = traces("store")
    lazy = [
        Mark("", "") if isinstance(operation, Sync) and "/objects/" in operation.folder else operation
        for operation in operations
    ]
    (nothing_kept, *_) = Crashes(lazy).at(len(lazy), ())
    with pytest.raises(ExceptionGroup) as caught:
        check_one((folder, lazy), nothing_kept, quick, check_store)
    assert caught.group_contains(AssertionError, match="lost")
