"""Other commits of this project, whose daemons run beside those of this tree."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.support.site import ROOT


@dataclass(frozen=True, slots=True)
class Version:
    """`code`: the folder of its packages."""

    name: str
    code: Path


HERE = Version("here", ROOT)


def checked_out(commit: str, scratch: Path) -> Version:
    """The files of a commit, in a new folder below `scratch`. Raises CalledProcessError if there is no such commit."""
    name = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "--short=7", f"{commit}^{{commit}}"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    folder = scratch / f"code-{name}"
    folder.mkdir(parents=True)
    packed = subprocess.run(["git", "-C", ROOT, "archive", name], check=True, capture_output=True)
    subprocess.run(["tar", "-x", "-C", folder], check=True, input=packed.stdout)
    return Version(name, folder)


def versions(against: str | None, commit: str | None, scratch: Path) -> list[Version]:
    """The commit to compare with, if any, and then the commit that is measured, without one the files of this tree."""
    measured = checked_out(commit, scratch) if commit else HERE
    return [checked_out(against, scratch), measured] if against else [measured]
