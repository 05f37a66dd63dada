"""A run that is ended by a signal leaves no namespace, no mount, no process and no folder behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import wait_for

ROOT = Path(__file__).parents[2]
RUN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
import subprocess
from tests.support.lab import Rates, lab
from tests.support.mounts import small_disk
from tests.support.processes import running, scratch

with scratch() as folder, lab(1, Rates(1e9, 1e9)) as made, small_disk(folder / "disk", 1 << 20) as disk:
    with running([*made.nodes[0].prefix, "sleep", "600"], folder / "log") as process:
        print(folder, made.nodes[0].name, process.pid, flush=True)
        process.wait()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_leaves_nothing_behind(number: signal.Signals) -> None:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root: run this as root")
    with subprocess.Popen([sys.executable, "-c", RUN], cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        folder, namespace, pid = run.stdout.readline().split()
        left = [Path(folder), Path("/run/netns") / namespace, Path("/proc") / pid]
        assert all(path.exists() for path in left)
        assert f" {folder}/disk " in Path("/proc/mounts").read_text()
        run.send_signal(number)
        run.wait()
    wait_for(f"{left} are gone", lambda: not any(path.exists() for path in left))
    assert f" {folder}/disk " not in Path("/proc/mounts").read_text()
