"""Names of registries, repositories and images. Each is parsed to a value once, so no unparsed text reaches a URL.

Grammar: OCI distribution specification 1.1, "Pulling manifests" (name and reference).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Literal

from protocol.errors import BadInputError
from protocol.ids import Digest

Kind = Literal["manifests", "blobs"]

_NAME = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*", re.ASCII)
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}", re.ASCII)
_UPSTREAM = re.compile(r"[a-zA-Z0-9](?:[a-zA-Z0-9.-]{0,252}[a-zA-Z0-9])?(?::[0-9]{1,5})?", re.ASCII)
MAX_NAME = 255


def check_upstream(name: str) -> str:
    """Check a registry's name as in clients' image names: a host, with or without a port."""
    if not _UPSTREAM.fullmatch(name):
        raise BadInputError(f"not a registry name (host or host:port): {name[:160]!r}")
    return name


def check_reference(reference: str) -> str:
    """Check a tag or a digest, the specification's `<reference>`."""
    if ":" in reference:
        Digest.parse(reference)
    elif not _TAG.fullmatch(reference):
        raise BadInputError(f"not a tag or digest: {reference[:160]!r}")
    return reference


def is_digest(reference: str) -> bool:
    return ":" in reference


@dataclass(frozen=True, slots=True)
class Grant:
    """A client's Authorization header that the registry accepts for a repository. It goes to that registry only."""

    authorization: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Locator:
    """Where objects are read: upstream, repository, and manifests or blobs.

    Block requests carry its text (`docker.io/library/alpine#blobs`) as an opaque hint for a node that reads the
    upstream. `grant`, which is not in the text, is set if the registry requires a client's authorization.
    """

    upstream: str
    repository: str
    kind: Kind
    grant: Grant | None = None

    def __post_init__(self) -> None:
        check_upstream(self.upstream)
        if len(self.repository) > MAX_NAME or not _NAME.fullmatch(self.repository):
            raise BadInputError(f"not a repository name: {self.repository[:300]!r}")
        if self.kind not in ("manifests", "blobs"):
            raise BadInputError(f"not a kind of object: {self.kind!r}")

    @classmethod
    def parse(cls, text: str) -> Locator:
        """The inverse of `str`. Raises BadInputError for any other text."""
        path, _, kind = text.partition("#")
        upstream, _, repository = path.partition("/")
        return cls(upstream, repository, kind)  # type: ignore[arg-type] # checked in __post_init__

    def __str__(self) -> str:
        return f"{self.upstream}/{self.repository}#{self.kind}"

    def of_kind(self, kind: Kind) -> Locator:
        return replace(self, kind=kind)


@dataclass(frozen=True, slots=True)
class ImageName:
    """An image's name as users type it: `alpine`, `ghcr.io/org/app:1.2`, `10.0.0.1:5000/app@sha256:...`."""

    upstream: str
    repository: str
    reference: str

    @classmethod
    def parse(cls, text: str) -> ImageName:
        """Parse with Docker's defaults: docker.io, library/, latest. Registries get one name. Raises BadInputError."""
        rest, at, digest = text.partition("@")
        first, slash, remainder = rest.partition("/")
        if slash and ("." in first or ":" in first or first == "localhost"):
            upstream, path = canonical(first), remainder
        else:
            upstream, path = "docker.io", rest
        name, colon, tag = path.partition(":")
        if upstream == "docker.io" and "/" not in name:
            name = f"library/{name}"
        if (at and not digest) or (colon and not _TAG.fullmatch(tag)):
            raise BadInputError(f"not an image name: {text[:300]!r}")
        reference = digest or tag or "latest"
        Locator(upstream, name, "manifests")
        if digest:
            Digest.parse(digest)
        return cls(upstream, name, check_reference(reference))

    @property
    def manifests(self) -> Locator:
        return Locator(self.upstream, self.repository, "manifests")

    def __str__(self) -> str:
        separator = "@" if is_digest(self.reference) else ":"
        return f"{self.upstream}/{self.repository}{separator}{self.reference}"


_DOCKER_HUB = ("docker.io", "index.docker.io", "registry-1.docker.io")


def canonical(registry: str) -> str:
    """One name for each registry: Docker Hub has three."""
    lower = registry.lower()
    return "docker.io" if lower in _DOCKER_HUB else lower
