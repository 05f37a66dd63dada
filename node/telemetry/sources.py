"""The sources of a block's bytes."""

from __future__ import annotations

from enum import StrEnum


class Source(StrEnum):
    """Labels of metrics, and keys of `bytes_served` in the status."""

    MEMORY = "memory"
    DISK = "disk"
    CONTAINERD = "containerd"
    PEER = "peer"
    ORIGIN = "origin"
