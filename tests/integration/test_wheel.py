"""The wheel installs three packages, and no tests."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from tests.support.site import ROOT


def test_the_wheel_holds_exactly_the_three_packages(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    top = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"node", "protocol", "cache"}
