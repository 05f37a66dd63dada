"""The library of a node in a test, with a verifier and accounts of its own."""

from __future__ import annotations

from typing import cast

from node.blocks.fetcher import Fetcher
from node.blocks.grants import Grants
from node.blocks.home import Home
from node.blocks.values import Site
from node.content.library import SiteLibrary
from node.content.resolver import Resolver
from node.content.verification import ObjectVerifier
from node.telemetry.metrics import Metrics
from node.telemetry.provenance import Provenance


def site_library(
    site: Site, home: Home, grants: Grants, *, fetcher: Fetcher, resolver: Resolver | None = None
) -> tuple[SiteLibrary, ObjectVerifier]:
    """Without a resolver the library only reads objects."""
    verifier = ObjectVerifier(site, home, fetcher, lambda ref: None)
    library = SiteLibrary(
        site=site,
        resolver=cast(Resolver, resolver),
        grants=grants,
        fetcher=fetcher,
        verifier=verifier,
        ledger=Provenance(),
        metrics=Metrics(),
    )
    return library, verifier
