"""Pulls of the test image through several nodes at once, by skopeo; every byte that arrives is hashed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.support.image import Image
from tests.support.pull import Pull, pull_with_skopeo, verify, wait_all
from tests.support.site import UPSTREAM, Node

REPOSITORY = f"{UPSTREAM}/demo/app"
TAG = "v1"


def start_pulls(nodes: Sequence[Node], folder: Path, reference: str = TAG) -> list[Pull]:
    """Start a skopeo for each node, all at once. `folder` must not exist yet."""
    folder.mkdir(parents=True)
    return [pull_with_skopeo(node.mirror, REPOSITORY, reference, folder / node.name) for node in nodes]


def finish_pulls(pulls: Sequence[Pull], image: Image) -> list[float]:
    """Wait for all, and verify every byte. Returns the seconds that each pull took."""
    seconds = wait_all(list(pulls))
    for pull in pulls:
        verify(pull.folder, image)
    return seconds


def pull_through(nodes: Sequence[Node], folder: Path, image: Image, reference: str = TAG) -> list[float]:
    return finish_pulls(start_pulls(nodes, folder, reference), image)
