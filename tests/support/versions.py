"""Other commits of this project, whose daemons run beside those of this tree, and tables of what both did."""

from __future__ import annotations

import statistics
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from tests.support.site import ROOT


@dataclass(frozen=True, slots=True)
class Version:
    """`code`: the folder of its packages."""

    name: str
    code: Path


HERE = Version("here", ROOT)
Figures = dict[str, float]
"""The results of one run, by name."""


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


@dataclass(slots=True)
class Comparison:
    """The figures of each version's runs."""

    by_version: dict[Version, list[Figures]] = field(default_factory=dict)

    def add(self, version: Version, figures: Figures) -> None:
        self.by_version.setdefault(version, []).append(figures)

    def table(self, title: str) -> Table:
        table = Table("median", title=title, title_justify="left")
        medians = [
            {name: statistics.median(run[name] for run in runs) for name in runs[0]}
            for runs in self.by_version.values()
        ]
        for version in self.by_version:
            table.add_column(version.name, justify="right")
        if len(medians) > 1:
            table.add_column("ratio", justify="right")
        for name in medians[-1]:
            values = [figures.get(name) for figures in medians]
            row = ["" if value is None else f"{value:.3g}" for value in values]
            if len(values) > 1:
                first, last = values[0], values[-1]
                row.append(f"{last / first:.2f}" if first and last is not None else "")
            table.add_row(name, *row)
        return table
