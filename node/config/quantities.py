"""Quantities of the configuration and of p2pctl's options, parsed once: when their text is decoded.

A quantity is a string, the text as the user wrote it; its attributes are the parsed values. The error of `parse` does
not name the key; `read` adds the key to it. msgspec encodes a quantity only with `enc_hook=str`.
"""

from __future__ import annotations

import re
from datetime import datetime
from ipaddress import ip_address
from typing import Self

from protocol.errors import BadInputError

_MEASURE = re.compile(r"(\d{1,15}(?:\.\d+)?)(\s*[A-Za-z]*)", re.ASCII)
_BYTES = {"": 1} | {unit: 1000**power for power, unit in enumerate(("B", "KB", "MB", "GB", "TB"))}
_BYTES |= {unit: 1024**power for power, unit in enumerate(("KiB", "MiB", "GiB", "TiB"), 1)}
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DAY_S = 24 * 3600
_HOURS = re.compile(r"(\d{1,2}):([0-5]\d)\s*-\s*(\d{1,2}):([0-5]\d)", re.ASCII)
_PORT = re.compile(r"\d{1,5}", re.ASCII)


class Quantity(str):
    @classmethod
    def parse(cls, text: str) -> Self:
        return cls(text)

    @classmethod
    def read(cls, key: str, text: str) -> Self:
        """`parse`, with the key in the error: `cache.disk = "much": not a size`."""
        try:
            return cls.parse(text)
        except BadInputError as error:
            raise BadInputError(f"{key} = {error}") from error


class Size(Quantity):
    """`64MiB`, `10 GB`, `1000`."""

    bytes: int

    def __init__(self, text: str) -> None:
        match = _MEASURE.fullmatch(text.strip())
        if not match or match[2].strip() not in _BYTES:
            raise BadInputError(f'"{text}": not a size; write for example "64MiB" or "10GiB"')
        self.bytes = int(float(match[1]) * _BYTES[match[2].strip()])


class OptionalSize(Size):
    """A size, or "" for none: then `bytes` is 0."""

    def __init__(self, text: str = "") -> None:
        super().__init__(text or "0")


class Duration(Quantity):
    """`500ms`, `60s`, `7d`."""

    seconds: float

    def __init__(self, text: str) -> None:
        match = _MEASURE.fullmatch(text.strip())
        if not match or match[2] not in _SECONDS:
            raise BadInputError(f'"{text}": not a duration; write for example "60s", "5m" or "7d"')
        self.seconds = float(match[1]) * _SECONDS[match[2]]


class OptionalDuration(Duration):
    """A duration, or "" for none: then `seconds` is 0."""

    def __init__(self, text: str = "") -> None:
        super().__init__(text or "0s")


class Window(Quantity):
    """`22:00-06:00`: hours of the local day, at most `00:00-24:00`; over midnight if the end is before the start."""

    def __init__(self, text: str) -> None:
        match = _HOURS.fullmatch(text.strip())
        start, stop = (int(match[i]) * 3600 + int(match[i + 1]) * 60 for i in (1, 3)) if match else (0, 0)
        if start == stop or start >= _DAY_S or stop > _DAY_S:
            raise BadInputError(f'"{text[:40]}": not hours of the day; write for example "22:00-06:00"')
        self._start, self._length = start, (stop - start) % _DAY_S or _DAY_S

    def opens_in(self, when: datetime) -> int:
        """Seconds until the window begins; 0 within it."""
        second = when.hour * 3600 + when.minute * 60 + when.second
        inside = (second - self._start) % _DAY_S < self._length
        return 0 if inside else (self._start - second) % _DAY_S


def local_time() -> datetime:
    """The time by which hours and days of the configuration are counted."""
    return datetime.now().astimezone()


class Floor(Quantity):
    """`5%` or `1GiB`: a share of a file system, or bytes, to keep free. The attribute that is not given is 0."""

    share: float = 0.0
    bytes: int = 0

    def __init__(self, text: str) -> None:
        if not text.strip().endswith("%"):
            self.bytes = Size(text).bytes
            return
        try:
            self.share = float(text.strip()[:-1]) / 100
        except ValueError:
            self.share = -1.0
        if not 0 <= self.share < 1:
            raise BadInputError(f'"{text}": not a percentage from 0% to 99%')

    def of(self, total_bytes: int) -> int:
        """Bytes to keep free of a file system with `total_bytes`."""
        return max(int(total_bytes * self.share), self.bytes)


class HostPort(Quantity):
    """`127.0.0.1:5050`, `[::1]:5050`."""

    host: str
    port: int

    def __new__(cls, host: str, port: int) -> Self:
        self = super().__new__(cls, f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        self.host, self.port = host, port
        return self

    @classmethod
    def parse(cls, text: str) -> Self:
        host, colon, port = text.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        if not colon or not host or not _PORT.fullmatch(port) or int(port) > 65535:
            raise BadInputError(f'"{text}": not an address; write for example "127.0.0.1:5050"')
        return cls(host, int(port))

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it; the only name that counts as loopback is `localhost`."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class OptionalHostPort(Quantity):
    """An address, or "" for none."""

    address: HostPort | None

    def __init__(self, text: str = "") -> None:
        self.address = HostPort.parse(text) if text else None
