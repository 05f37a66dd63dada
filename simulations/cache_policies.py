"""Hit ratios of the tiers' LRU-K and of other policies, for two pools, Zipf, Zipf with scans, and a trace.

Memory and disk evict by LRU-K. The other policies are those of libcachesim: LRU, FIFO, SIEVE (NSDI'24), S3-FIFO
(SOSP'23), ARC (FAST'03), W-TinyLFU, and Belady's optimum, which knows the future. All entries have the same size.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from random import Random

import click
import libcachesim
from rich.console import Console
from rich.table import Table

from cache.lru_k import LRUKCache
from cache.pieces import UNBOUNDED, eviction_policy
from simulations.run import Report, with_progress

SHIPPED, LRU, OPTIMUM = "LRU-K (shipped)", "LRU", "optimum"
SIZES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Cache sizes, in percent of the distinct objects."""

REFERENCES = 100_000
"""References of a generated workload, without the scans."""

SMALLEST = 8
"""Entries of the smallest cache. In a smaller one, parts of libcachesim's policies hold nothing, and it aborts."""

OBJECTS = 10_000
"""Distinct objects of the Zipf workloads."""

SCAN_EVERY, SCAN_LENGTH = 5_000, 1_000
HOT, COLD, WARM_UP = 100, 10_000, 10_000
"""The LRU-K paper's two pools, and the references before hits count."""

NEVER = 1 << 62


@dataclass(frozen=True)
class Workload:
    name: str
    references: Sequence[int]
    sizes: dict[str, int]
    """Entries in a cache, by the name of the size."""
    interval_s: float
    """Seconds between references: decides which of them are correlated."""
    warm_up: int = 0

    @cached_property
    def next_uses(self) -> Sequence[int]:
        """For each reference, the number of the next one to the same object."""
        following: dict[int, int] = {}
        uses = [NEVER] * len(self.references)
        for turn in reversed(range(len(self.references))):
            uses[turn] = following.get(self.references[turn], NEVER)
            following[self.references[turn]] = turn
        return uses


Policy = Callable[[Workload, int], Iterator[bool]]
"""Yields for each reference whether a cache with this number of entries holds its object."""


def shipped(workload: Workload, size: int) -> Iterator[bool]:
    """LRU-K as cache/memory.py and cache/disk.py use it."""
    now = 0.0
    held: LRUKCache[int, None] = eviction_policy(lambda _: 1, lambda: now)
    for turn, key in enumerate(workload.references):
        now = turn * workload.interval_s
        hit = key in held
        if hit:
            held[key]
        else:
            for victim in held.victims(1 + UNBOUNDED - size):
                del held[victim]
            held[key] = None
        yield hit


def library(cache_class: type[libcachesim.CacheBase], least: int = 0, **shares: float) -> Policy:
    """A policy of libcachesim. `shares` are the shares of its parts, each of which has at least `least` entries."""

    def hits(workload: Workload, size: int) -> Iterator[bool]:
        parts = {name: max(share, (least + 0.5) / size) for name, share in shares.items()}
        cache = cache_class(size, hashpower=16, **parts)
        request = libcachesim.Request()
        request.obj_size = 1
        for turn, (key, next_use) in enumerate(zip(workload.references, workload.next_uses, strict=True)):
            request.obj_id, request.clock_time, request.next_access_vtime = key, turn, next_use
            yield cache.get(request)

    return hits


POLICIES: dict[str, Policy] = {
    SHIPPED: shipped,
    LRU: library(libcachesim.LRU),
    "FIFO": library(libcachesim.FIFO),
    "SIEVE": library(libcachesim.Sieve),
    "S3-FIFO": library(libcachesim.S3FIFO, least=2, small_size_ratio=0.1),
    "ARC": library(libcachesim.ARC),
    "W-TinyLFU": library(libcachesim.WTinyLFU, least=1, window_size=0.01),
    OPTIMUM: library(libcachesim.Belady),
}


def hit_ratio(policy: Policy, workload: Workload, size: int) -> float:
    return sum(islice(policy(workload, size), workload.warm_up, None)) / (len(workload.references) - workload.warm_up)


def two_pools(rng: Random) -> list[int]:
    return [rng.randrange(HOT) if turn % 2 else HOT + rng.randrange(COLD) for turn in range(REFERENCES)]


def zipf(rng: Random) -> list[int]:
    weights = list(accumulate(1 / rank for rank in range(1, OBJECTS + 1)))
    return rng.choices(range(OBJECTS), cum_weights=weights, k=REFERENCES)


def with_scans(references: Sequence[int]) -> list[int]:
    """After each SCAN_EVERY references, SCAN_LENGTH objects that are never used again, such as a nightly build's."""
    mixed: list[int] = []
    for start in range(0, len(references), SCAN_EVERY):
        mixed += references[start : start + SCAN_EVERY]
        fresh = OBJECTS + start // SCAN_EVERY * SCAN_LENGTH
        mixed += range(fresh, fresh + SCAN_LENGTH)
    return mixed


def sized(objects: int, percents: Iterable[float]) -> dict[str, int]:
    return {f"{percent:g} %": max(SMALLEST, round(objects * percent / 100)) for percent in percents}


def read_trace(path: Path) -> list[int]:
    """Read a trace, which may be compressed by zstd: an object's number on each line. Raises ClickException."""
    try:
        if path.suffix == ".zst":
            raw = subprocess.run(["zstd", "-dc", path], check=True, capture_output=True).stdout
        else:
            raw = path.read_bytes()
        return [int(line) for line in raw.split()]
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise click.ClickException(f"{path.name} cannot be read as a trace: {error}") from error


def workloads(seed: int, percents: Sequence[float], interval_s: float, trace: Path | None) -> list[Workload]:
    pools, skewed = two_pools(Random(f"two pools {seed}")), zipf(Random(f"zipf {seed}"))
    sizes = sized(len(set(skewed)), percents)  # also with scans: scanned objects are not worth keeping
    made = [
        Workload("two pools", pools, {f"{HOT} entries": HOT}, interval_s, warm_up=WARM_UP),
        Workload("Zipf", skewed, sizes, interval_s),
        Workload("Zipf with scans", with_scans(skewed), sizes, interval_s),
    ]
    if trace is not None:
        read = read_trace(trace)
        made.append(Workload("trace", read, sized(len(set(read)), percents), interval_s))
    return made


@dataclass(frozen=True, slots=True)
class Result:
    workload: str
    sizes: dict[str, int]
    percent: dict[str, list[float]]
    """Hits in percent, by policy and size."""

    def ahead(self) -> list[float]:
        """Points by which the shipped policy beats the best other policy that does not know the future."""
        others = [row for name, row in self.percent.items() if name not in (SHIPPED, OPTIMUM)]
        return [ours - max(row) for ours, *row in zip(self.percent[SHIPPED], *others, strict=True)]


def run(those: Sequence[Workload], report: Report) -> list[Result]:
    total = sum(len(workload.references) * len(workload.sizes) for workload in those) * len(POLICIES)
    done = 0

    def measured(policy: Policy, workload: Workload, size: int) -> float:
        nonlocal done
        ratio = hit_ratio(policy, workload, size)
        done += len(workload.references)
        report(done / total)
        return 100 * ratio

    return [
        Result(
            workload.name,
            workload.sizes,
            {
                name: [measured(policy, workload, size) for size in workload.sizes.values()]
                for name, policy in POLICIES.items()
            },
        )
        for workload in those
    ]


def table_of(result: Result) -> Table:
    table = Table("hits in %", title=result.workload)
    for name, size in result.sizes.items():
        table.add_column(f"{name}\n{size}", justify="right")
    for policy, row in result.percent.items():
        table.add_row(policy, *(f"{value:.2f}" for value in row), end_section=policy == OPTIMUM)
    table.add_row("shipped before the best other", *(f"{value:+.2f}" for value in result.ahead()))
    return table


def plot(results: Sequence[Result], path: Path) -> None:
    """Plot the difference to LRU: the differences are small beside the ratios themselves."""
    import matplotlib
    from matplotlib.figure import Figure

    shown = results[1:]  # the two pools have one size only
    figure = Figure(figsize=(3.5 * len(shown) + 1.5, 3.5), layout="constrained")
    for axes, result in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for policy, row in result.percent.items():
            above = [value - base for value, base in zip(row, result.percent[LRU], strict=True)]
            if policy != OPTIMUM:
                axes.plot(list(result.sizes), above, "k--" if policy == SHIPPED else "-", label=policy)
        axes.set(title=result.workload, xlabel="size of the cache", ylabel="points above LRU")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    with matplotlib.rc_context({"svg.hashsalt": "", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def percents(_context: click.Context, _parameter: click.Parameter, value: str) -> tuple[float, ...]:
    try:
        parsed = tuple(float(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value} is not a list of percentages") from error
    if not all(0 < part <= 100 for part in parsed):
        raise click.BadParameter("sizes are above 0 and at most 100 percent")
    return parsed


@click.command("cache")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option(
    "--trace", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="One number a line, maybe .zst."
)
@click.option(
    "--sizes",
    callback=percents,
    default=",".join(f"{size:g}" for size in SIZES),
    show_default=True,
    help="Percent of the distinct objects.",
)
@click.option(
    "--interval", type=click.FloatRange(0), default=60.0, show_default=True, help="Seconds from reference to reference."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path), help="Write an SVG or PNG.")
def cache(
    seed: int, trace: Path | None, sizes: tuple[float, ...], interval: float, as_json: bool, plot_path: Path | None
) -> None:
    """Compare the hit ratios of the tiers' LRU-K with other policies and the optimum."""
    those = workloads(seed, sizes, interval, trace)
    results = with_progress("cache", lambda report: run(those, report))
    if plot_path is not None:
        plot(results, plot_path)
    if as_json:
        setup = {"seed": seed, "sizes": sizes, "interval_s": interval, "trace": trace.name if trace else None}
        shown = [{**asdict(result), "ahead": result.ahead()} for result in results]
        click.echo(json.dumps({"what": setup, "results": shown}, indent=2))
        return
    console = Console(width=100)
    for result in results:
        console.print(table_of(result))
    if trace is None:
        console.print("These workloads are all generated: pass --trace FILE for real requests.")
