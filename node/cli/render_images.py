"""The documents of node/api/image_documents.py as a person reads them."""

from __future__ import annotations

import time

from rich.console import Console

from node.api.image_documents import GcReport, PinsReport, PrefetchReport, WorkResult
from node.cli.render import SHORT_DIGEST, duration, new_row, new_table, plain, show, size


@show.register
def _result(result: WorkResult, out: Console) -> None:
    for image in result.images:
        out.print(plain(image))
    each = f"{result.objects} objects, {size(result.bytes_total)}"
    out.print(f"{each} in {duration(result.seconds)}")


@show.register
def _pins(report: PinsReport, out: Console) -> None:
    if report.pins:
        table = new_table("image", "digest", ">size", ">on disk", ">for")
        for pin in report.pins:
            age = duration(max(0.0, time.time() - pin.since))
            new_row(table, pin.image, pin.digest[:SHORT_DIGEST], size(pin.size), size(pin.bytes_held), age)
        out.print(table)
        out.print()
    out.print(f"{size(report.bytes)} pinned of {size(report.most_bytes)} that may be")


@show.register
def _prefetched(report: PrefetchReport, out: Console) -> None:
    if not report.rows:
        out.print("nothing was ordered since p2pd started")
        return
    table = new_table("image", "state", ">done", ">of", ">rate", "hours", "error")
    for row in report.rows:
        rate = f"{size(row.rate)}/s" if row.rate else "-"
        total = size(row.bytes_total) if row.bytes_total else "-"
        new_row(table, row.image, row.state, size(row.bytes_done), total, rate, row.window or "-", row.error)
    out.print(table)
    if report.waits_for:
        out.print(f"\nwaits for {plain(report.waits_for)}")


@show.register
def _gc(report: GcReport, out: Console) -> None:
    verb = "would be removed" if report.dry_run else "removed"
    out.print(f"{size(report.bytes)} in {report.pieces} pieces {verb}")
    out.print(f"{size(report.held_bytes)} left, of which {size(report.pinned_bytes)} pinned")
