"""Where a registry may lead this node: the hosts and addresses of redirects and token services.

A registry names other hosts, for blobs, for tokens. A hostile one could name the node's own loopback, or a machine of
its site that answers without a password, and the answer would go to clients. So an address that is not public is only
connected to if the registry's own host was reached at an address of the same class, or if `redirects` allows it. The
address counts, not the name, because the names of a host that the registry controls lead where it likes: it is checked
before each connection, and on the connection (node/registry/transport.py). Through a proxy, which resolves names
itself, only addresses that are written as such are checked. A redirect never leads from https to http.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from urllib.parse import urlsplit

import httpx

from node.config.schema import UpstreamPart

_SHARED = ip_network("100.64.0.0/10")
"""RFC 6598. Cloud providers and overlay networks have services there."""
_TRANSLATED = ip_network("64:ff9b::/96")
"""RFC 6052: the last 32 bits are an IPv4 address."""


class UnreachableHostError(httpx.RequestError):
    """A registry leads to where it must not. The text names the host, and never the URL."""


def class_of(address: IPv4Address | IPv6Address) -> str:
    """`public`, or the part of the network to which the address belongs."""
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _TRANSLATED:
            inner = IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return class_of(inner)
        if address.is_site_local:
            return "private"
    if address.is_unspecified or address.is_loopback:
        return "loopback"  # to connect to 0.0.0.0 or :: is to connect to this machine
    if address.is_link_local:
        return "link-local"
    if address.is_multicast:
        return "multicast"
    if address.is_private or (address.version == 4 and address in _SHARED):
        return "private"
    return "public" if address.is_global else "reserved"


class Reach:
    """The rule for one `[[upstream]]`."""

    def __init__(self, part: UpstreamPart) -> None:
        self._own = {(urlsplit(url).hostname or "").lower() for url in part.urls}
        self._patterns = [entry.lower() for entry in part.redirects if "/" not in entry]
        self._networks = [ip_network(entry) for entry in part.redirects if "/" in entry]
        self._own_classes: set[str] = set()
        self._setting = f'redirects of [[upstream]] "{part.name}"'

    def is_free(self, host: str) -> bool:
        """Whether the host may be at any address: the registry itself, or an allowed name."""
        host = host.lower()
        return host in self._own or any(
            host == pattern or (pattern.startswith("*.") and host.endswith(pattern[1:])) for pattern in self._patterns
        )

    def connected(self, host: str, address: str) -> None:
        """Note where the registry's own host was reached, or check where another was. Raises UnreachableHostError."""
        if host.lower() in self._own:
            self._own_classes.add(class_of(_parsed(address)))
        else:
            self.check(host, [address])

    def check(self, host: str, addresses: Sequence[str]) -> None:
        """Raises UnreachableHostError unless the registry may lead to each of `addresses`, which are of `host`."""
        if self.is_free(host):
            return
        for address in map(_parsed, addresses):
            kind = class_of(address)
            allowed = any(address in network for network in self._networks)
            if kind != "public" and kind not in self._own_classes and not allowed:
                raise UnreachableHostError(
                    f"leads to {host[:255]} at the {kind} address {address}; {self._setting} does not allow it"
                )

    def check_redirect(self, old: httpx.URL, new: httpx.URL) -> None:
        """Raises UnreachableHostError. Behind a proxy this is all that is checked."""
        if new.scheme != "https" and old.scheme == "https":
            raise UnreachableHostError(f"leads from https to {new.scheme[:16]}, at {new.host[:255]}")
        self.check_literal(new)

    def check_literal(self, url: httpx.URL) -> None:
        """Check a host that is written as an address."""
        try:
            ip_address(url.host)
        except ValueError:
            return
        self.check(url.host, [url.host])


def _parsed(address: str) -> IPv4Address | IPv6Address:
    return ip_address(address.partition("%")[0])
