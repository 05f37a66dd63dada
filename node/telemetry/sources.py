"""Where the bytes of a block came from."""

from __future__ import annotations

from enum import StrEnum


class Source(StrEnum):
    """Where bytes came from: the label of every metric, and of `bytes_served` in the status."""

    MEMORY = "memory"
    DISK = "disk"
    CONTAINERD = "containerd"
    PEER = "peer"
    ORIGIN = "origin"
