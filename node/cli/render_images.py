"""The documents of node/api/image_documents.py as tables for a person."""

from __future__ import annotations

import time

from rich.console import Console

from node.api.image_documents import GcReport, PinsReport, PrefetchReport, WorkResult
from node.cli.render import SHORT_DIGEST, duration, plain, show, show_table, size


@show.register
def _result(result: WorkResult, out: Console) -> None:
    for image in result.images:
        out.print(plain(image))
    out.print(f"{result.objects} objects, {size(result.bytes_total)} in {duration(result.seconds)}")


@show.register
def _pins(report: PinsReport, out: Console) -> None:
    if report.pins:
        rows = [
            {
                "image": pin.image,
                "digest": pin.digest[:SHORT_DIGEST],
                ">size": size(pin.size),
                ">on disk": size(pin.bytes_held),
                ">for": duration(max(0.0, time.time() - pin.since)),
            }
            for pin in report.pins
        ]
        show_table(out, rows)
        out.print()
    out.print(f"{size(report.bytes)} pinned of {size(report.most_bytes)} allowed")


@show.register
def _prefetched(report: PrefetchReport, out: Console) -> None:
    if not report.rows:
        out.print("nothing was ordered since p2pd started")
        return
    rows = [
        {
            "image": row.image,
            "state": row.state,
            ">done": size(row.bytes_done),
            ">of": size(row.bytes_total) if row.bytes_total else "-",
            ">rate": f"{size(row.rate)}/s" if row.rate else "-",
            "hours": row.window or "-",
            "error": row.error,
        }
        for row in report.rows
    ]
    show_table(out, rows)
    if report.waits_for:
        out.print(f"\nwaits for {plain(report.waits_for)}")


@show.register
def _gc(report: GcReport, out: Console) -> None:
    verb = "would be removed" if report.dry_run else "removed"
    out.print(f"{size(report.bytes)} in {report.pieces} pieces {verb}")
    out.print(f"{size(report.held_bytes)} left, of which {size(report.pinned_bytes)} pinned")
