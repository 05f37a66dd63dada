"""Fuzzing of the decoders, guided by coverage: `python -m tests.fuzz [--seconds N] [--keep] [TARGET...]`.

Needs atheris, which `make fuzz` installs beside the environment. What reached farther is in build/fuzz/TARGET; with
--keep the shortest of it is added to tests/fuzz/corpus. A finding ends its target: the bytes are in
build/fuzz/TARGET-crash-..., and the exit status is 1. A corpus file of such bytes is its test from then on.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

BUILD = Path("build/fuzz")
MAX_LENGTH = 4096
MAX_KEPT = 4 << 10
"""Bytes of corpus for one target: all of it is below 100 kB."""


def fuzz_one(target: str, arguments: list[str]) -> None:
    """In a process of its own; never returns."""
    import atheris  # type: ignore[import-not-found, unused-ignore] # only here is it needed

    with atheris.instrument_imports(include=["node", "protocol", "cache"], enable_loader_override=False):
        from tests.fuzz.targets import TARGETS  # instrumented
    logging.disable(logging.WARNING)
    atheris.Setup([target, *arguments], TARGETS[target])
    atheris.Fuzz()


def run_one(target: str, arguments: list[str]) -> tuple[int, str]:
    command = [sys.executable, "-m", "tests.fuzz", "--one", target, "--", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    return done.returncode, done.stderr


def seed(target: str) -> Path:
    from tests.fuzz.seeds import seeds  # not in the process that instruments

    folder = BUILD / f"{target}-seeds"
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds(target)):
        (folder / str(number)).write_bytes(data)
    return folder


def keep(target: str, found: Path) -> int:
    """Adds what was found to the corpus, the shortest first, as far as there is room; the number of files."""
    from tests.fuzz.seeds import seeds

    known, corpus = set(seeds(target)), Path("tests/fuzz/corpus", target)
    corpus.mkdir(parents=True, exist_ok=True)
    room = MAX_KEPT - sum(path.stat().st_size for path in corpus.iterdir())
    kept = 0
    for path in sorted(found.iterdir(), key=lambda path: path.stat().st_size):
        data = path.read_bytes()
        room -= 0 if data in known else len(data)
        if room < 0:
            break
        if data not in known:
            (corpus / path.name[:16]).write_bytes(data)
            kept += 1
    return kept


@click.command()
@click.option("--seconds", default=300.0, help="For all targets together.")
@click.option("--keep", "keeping", is_flag=True, help="Add of what reached farther to the corpus.")
@click.option("--one", hidden=True)
@click.argument("names", nargs=-1)
def main(seconds: float, keeping: bool, one: str | None, names: tuple[str, ...]) -> None:
    if one:
        fuzz_one(one, list(names))
    from tests.fuzz.targets import TARGETS

    chosen = names or tuple(TARGETS)
    table = Table("target", "runs", "per second", "branches", "kept", "", box=None)
    failed = False
    for target in chosen:
        found, seeds = BUILD / target, seed(target)
        found.mkdir(parents=True, exist_ok=True)
        limits = [f"-max_total_time={max(1, int(seconds / len(chosen)))}", f"-max_len={MAX_LENGTH}", "-timeout=20"]
        status, text = run_one(
            target,
            [*limits, "-rss_limit_mb=2048", "-print_final_stats=1", f"-artifact_prefix={BUILD}/{target}-",
             str(found), str(seeds)],
        )  # fmt: skip
        failed |= status != 0
        kept = keep(target, found) if keeping and not status else 0
        numbers = dict(line.removeprefix("stat::").split(":", 1) for line in text.splitlines() if line[:6] == "stat::")
        covered = [
            word for line in text.splitlines() if " cov: " in line for word in [line.split(" cov: ")[1].split()[0]]
        ]
        runs, rate = (numbers.get(f"number_of_executed_units{end}", "").strip() for end in ("", "_per_sec"))
        rate = numbers.get("average_exec_per_sec", rate).strip()
        table.add_row(target, runs, rate, covered[-1] if covered else "", str(kept), "FAILED" if status else "")
        if status:
            sys.stderr.write("\n".join(text.splitlines()[-40:]) + "\n")
    Console(width=100).print(table)
    sys.exit(failed)


if __name__ == "__main__":
    main()
