"""Fuzzing of the decoders, guided by coverage: `python -m tests.fuzz [--seconds N] [--keep] [TARGET...]`.

Needs atheris, which `make fuzz` installs separately. Inputs that reached new branches are saved in
build/fuzz/TARGET; with --keep the shortest are added to tests/fuzz/corpus. A finding ends its target: its bytes are in
build/fuzz/TARGET-crash-..., and the exit status is 1. Added to the corpus, they are its regression test.
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
"""Bytes of corpus for one target; the whole corpus stays below 100 kB."""


def fuzz_one(target: str, arguments: list[str]) -> None:
    """Fuzz in this process; never returns."""
    import atheris  # type: ignore[import-not-found, unused-ignore] # installed for fuzzing only

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
    from tests.fuzz.seeds import seeds  # not in the instrumented process

    folder = BUILD / f"{target}-seeds"
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds(target)):
        (folder / str(number)).write_bytes(data)
    return folder


def keep(target: str, folder: Path) -> int:
    """Add new inputs to the corpus, the shortest first, up to MAX_KEPT. Returns the number of files added."""
    from tests.fuzz.seeds import seeds

    present, corpus = set(seeds(target)), Path("tests/fuzz/corpus", target)
    corpus.mkdir(parents=True, exist_ok=True)
    room = MAX_KEPT - sum(path.stat().st_size for path in corpus.iterdir())
    kept = 0
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_size):
        data = path.read_bytes()
        room -= 0 if data in present else len(data)
        if room < 0:
            break
        if data not in present:
            (corpus / path.name[:16]).write_bytes(data)
            kept += 1
    return kept


@click.command()
@click.option("--seconds", default=300.0, help="For all targets together.")
@click.option("--keep", "keeping", is_flag=True, help="Add inputs that reached new branches to the corpus.")
@click.option("--one", "single", hidden=True)
@click.argument("names", nargs=-1)
def main(seconds: float, keeping: bool, single: str | None, names: tuple[str, ...]) -> None:
    if single:
        fuzz_one(single, list(names))
    from tests.fuzz.targets import TARGETS

    chosen = names or tuple(TARGETS)
    columns = ("target", "runs", "per second", "branches", "kept", "")
    table = Table(*columns, box=None)
    failed = False
    for target in chosen:
        folder, seeds = BUILD / target, seed(target)
        folder.mkdir(parents=True, exist_ok=True)
        limits = [f"-max_total_time={max(1, int(seconds / len(chosen)))}", f"-max_len={MAX_LENGTH}", "-timeout=60"]
        output = ["-rss_limit_mb=2048", "-print_final_stats=1", f"-artifact_prefix={BUILD}/{target}-"]
        status, text = run_one(target, [*limits, *output, str(folder), str(seeds)])
        failed |= status != 0
        kept = keep(target, folder) if keeping and not status else 0
        numbers = dict(line.removeprefix("stat::").split(":", 1) for line in text.splitlines() if line[:6] == "stat::")
        covered = [
            word for line in text.splitlines() if " cov: " in line for word in [line.split(" cov: ")[1].split()[0]]
        ]
        runs, rate = (numbers.get(f"number_of_executed_units{end}", "").strip() for end in ("", "_per_sec"))
        rate = numbers.get("average_exec_per_sec", rate).strip()
        cells = (target, runs, rate, covered[-1] if covered else "", str(kept), "FAILED" if status else "")
        table.add_row(*cells)
        if status:
            sys.stderr.write("\n".join(text.splitlines()[-40:]) + "\n")
    Console(width=100).print(table)
    sys.exit(failed)


if __name__ == "__main__":
    main()
