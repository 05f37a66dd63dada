"""How busy the processor is for the loop: the share of time in which its thread ran, or could have run.

The wait for a processor counts too, since a machine may be full although this process has only a small part of it
(proc(5), /proc/PID/schedstat: nanoseconds on a processor, and nanoseconds of waiting for one).
"""

from __future__ import annotations

import time
from pathlib import Path

SAMPLE_S = 0.25
BUSY, IDLE = 0.7, 0.5
"""It becomes busy above the first share and is no longer busy below the second."""
_GAIN = 0.5
"""Weight of the latest sample."""


class ProcessorLoad:
    """Of the main thread, in which the loop runs."""

    def __init__(self, schedstat: Path = Path("/proc/self/schedstat")) -> None:
        self._schedstat = schedstat
        self._at, self._ran = time.monotonic(), self._ran_s()
        self._share = 0.0
        self._busy = False

    def is_busy(self) -> bool:
        now = time.monotonic()
        if now - self._at >= SAMPLE_S:
            ran = self._ran_s()
            # After a long time without a question only the latest sample counts.
            gain = max(_GAIN, min(1.0, (now - self._at) / (4 * SAMPLE_S)))
            self._share += gain * ((ran - self._ran) / (now - self._at) - self._share)
            self._at, self._ran = now, ran
            self._busy = self._share > (IDLE if self._busy else BUSY)
        return self._busy

    def _ran_s(self) -> float:
        try:
            running, waiting, *_ = self._schedstat.read_text().split()
            return (int(running) + int(waiting)) / 1e9
        except (OSError, ValueError):  # a kernel without it
            return time.thread_time()
