"""Range requests (RFC 9110, section 14): parse the Range header to spans of bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_RANGES = 1024
"""The most ranges that a pull of a zstd:chunked layer requests at once. For more, the whole object is sent."""
_SPEC = re.compile(r"[ \t]*(\d{0,15})-(\d{0,15})[ \t]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Span:
    """The bytes [start, stop) of an object."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    def content_range(self, size: int) -> str:
        return f"bytes {self.start}-{self.stop - 1}/{size}"


def parse_range(header: str, size: int) -> tuple[Span, ...] | None:
    """The spans of an object of `size` bytes that a Range header requests; None: ignore the header; empty: answer 416.

    Ignored, as 14.2 allows: other units, malformed headers, sets of ranges larger than the whole object, and ranges of
    an empty object, since some clients send a range with every request. A range that ends before it begins gets 416
    (15.5.17), as the conformance suite demands. The server bounds the header's length.
    """
    unit, _, rest = header.partition("=")
    specs = rest.split(",", MAX_RANGES)
    if not size or unit.strip().lower() != "bytes" or len(specs) > MAX_RANGES:
        return None
    spans = []
    for spec in specs:
        match = _SPEC.fullmatch(spec)
        if not match or match[1] == match[2] == "":
            return None
        if match[1] and match[2] and int(match[1]) > int(match[2]):
            return ()
        if (span := _span(match[1], match[2], size)).length > 0:
            spans.append(span)
    return tuple(spans) if len(spans) < 2 or sum(span.length for span in spans) <= size else None


def _span(first: str, last: str, size: int) -> Span:
    if not first:
        return Span(max(0, size - int(last)), size)
    return Span(int(first), min(int(last) + 1, size) if last else size)
