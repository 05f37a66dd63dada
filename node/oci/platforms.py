"""Platforms as an image index names them (OCI image specification 1.1, "Image Index")."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from protocol.errors import BadInputError

MAX_PLATFORMS = 16
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}


@dataclass(frozen=True, slots=True)
class Platform:
    """A platform with the fields of an index. Without a variant it fits every variant."""

    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Parse `linux/arm64` or `linux/arm/v7`."""
        parts = text.split("/")
        if not 2 <= len(parts) <= 3 or not all(part.isascii() and part.isalnum() for part in parts):
            raise BadInputError(f"not a platform: {text[:80]!r}; write for example linux/arm64 or linux/arm/v7")
        return cls(*parts)

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))

    def fits(self, entry: Mapping[str, object]) -> bool:
        """Whether an index's `platform` entry is for this platform."""
        return (
            entry.get("os", "linux") == self.os
            and entry.get("architecture") == self.architecture
            and self.variant in ("", entry.get("variant", ""))
        )


def own_platform() -> Platform:
    machine = platform.machine()
    return Platform("linux", _MACHINES.get(machine, machine))


def parse_platforms(texts: Sequence[str]) -> tuple[Platform, ...]:
    if len(texts) > MAX_PLATFORMS:
        raise BadInputError(f"{len(texts)} platforms; name at most {MAX_PLATFORMS}, or use --all-platforms")
    return tuple(map(Platform.parse, texts))
