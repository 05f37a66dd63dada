"""Values of the registry client: a request below /v2/, and the results that other packages see. No I/O."""

from __future__ import annotations

from dataclasses import dataclass

import httpx

from node.oci.references import Grant, Locator, is_digest

ACCEPT = (
    "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, "
    "application/vnd.oci.artifact.manifest.v1+json, application/vnd.docker.distribution.manifest.list.v2+json, "
    "application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.v1+prettyjws, "
    "application/json, */*;q=0.1"
)
Headers = dict[str, str]


@dataclass(frozen=True, slots=True)
class Call:
    """A request below /v2/. `subject` names its object in errors and logs."""

    repository: str
    tail: str
    subject: str
    query: tuple[tuple[str, str], ...] = ()
    grant: Grant | None = None

    @classmethod
    def of(cls, locator: Locator, reference: str) -> Call:
        separator = "@" if is_digest(reference) else ":"
        subject = f"{locator.kind[:-1]} {locator.repository}{separator}{reference}"
        return cls(locator.repository, f"{locator.kind}/{reference}", subject, grant=locator.grant)

    @classmethod
    def tags(cls, locator: Locator) -> Call:
        """Request the shortest list of tags: the answer shows whether the caller may read the repository."""
        subject = f"tags of {locator.repository}"
        return cls(locator.repository, "tags/list", subject, query=(("n", "1"),), grant=locator.grant)

    @property
    def reference(self) -> str:
        return self.tail.partition("/")[2]

    @property
    def names_manifest(self) -> bool:
        return self.tail.startswith("manifests/")

    def url(self, registry: httpx.URL) -> httpx.URL:
        path = f"{registry.path.rstrip('/')}/v2/{self.repository}/{self.tail}"
        url = registry.copy_with(raw_path=path.encode("ascii"))
        return url.copy_merge_params(dict(self.query)) if self.query else url


@dataclass(frozen=True, slots=True)
class Passed:
    """A list as the registry sent it. `link` and `filters` are the headers `Link` and `OCI-Filters-Applied`, or ""."""

    body: bytes
    media_type: str
    link: str = ""
    filters: str = ""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """State of a registry or mirror. `problem` is "" if its last answer was good; `received` counts bytes of bodies."""

    url: str
    problem: str
    retry_in_s: float
    received: int
