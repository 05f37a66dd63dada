"""Bytes that this process wrote to disks, because writes wear flash memory."""

from __future__ import annotations

from pathlib import Path


def written_bytes() -> int:
    """Bytes of file pages made dirty, less those discarded before they were written.

    The kernel counts them (proc(5), "/proc/pid/io"), without the file systems' own records. 0 if it has no count.
    """
    try:
        lines = Path("/proc/self/io").read_text("ascii").splitlines()
    except OSError:
        return 0
    counts = {name: int(value) for name, _, value in (line.partition(": ") for line in lines)}
    return max(0, counts.get("write_bytes", 0) - counts.get("cancelled_write_bytes", 0))
