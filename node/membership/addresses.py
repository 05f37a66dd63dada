"""Addresses: parse those in the configuration, list this node's own, and order those of a peer.

A configured address may be unspecified (0.0.0.0). Other nodes need concrete addresses, the likeliest first. A peer's
connection shows an address that is routed here, so that address is placed before those that the peer claims.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

import ifaddr
import msgspec
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from node.config.quantities import HostPort
from protocol.errors import BadInputError
from protocol.ids import PeerId
from protocol.members import MAX_ADDRESSES, Member
from protocol.records import public_key_of

_VIRTUAL = re.compile("docker|br-|veth|virbr|cni|flannel|cali|vxlan|kube|nodelocaldns|lxc|podman")
"""Interfaces of container and VM bridges. They have the same 172.17.0.1 on every host, so they are listed last."""
_HOSTS = ("ip4", "ip6", "dns", "dns4", "dns6")


@dataclass(frozen=True, slots=True)
class Target:
    """A peer and one of its addresses on libp2p's TCP transport. `host`: an IP address or a DNS name."""

    peer: PeerId
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.peer} at {HostPort(self.host, self.port)}"


def parse_target(text: str) -> Target:
    """`/ip4/10.0.0.5/tcp/4501/p2p/12D3KooW...`; the host may be ip4, ip6, dns, dns4 or dns6. Raises BadInputError."""
    host, port, peer = _parts(text, _HOSTS, "/ip4/10.0.0.5/tcp/4501/p2p/12D3KooW...")
    try:
        public_key_of(peer)
    except BadInputError as error:
        raise BadInputError(f'"{text}": {error}') from error
    return Target(peer, host, port)


def parse_join(text: str) -> tuple[HostPort, PeerId | None]:
    """`10.0.0.5:4501`, `[fd00::5]:4501`, or a multiaddr. Without `/p2p/...`: any peer. Raises BadInputError."""
    if not text.startswith("/"):
        return HostPort.read("ADDRESS", text), None
    if "/p2p/" in text:
        target = parse_target(text)
        return HostPort(target.host, target.port), target.peer
    host, port, _ = _parts(text, _HOSTS, "/ip4/10.0.0.5/tcp/4501")
    return HostPort(host, port), None


def parse_listen(text: str) -> HostPort:
    """`/ip4/0.0.0.0/tcp/4501` or `/ip6/::/tcp/4501`. Raises BadInputError."""
    host, port, _ = _parts(text, ("ip4", "ip6"), "/ip4/0.0.0.0/tcp/4501")
    return HostPort(host, port)


def to_multiaddr(host: str, port: int, peer: PeerId) -> str:
    try:
        kind = f"ip{ip_address(host).version}"
    except ValueError:
        kind = "dns"
    return f"/{kind}/{host}/tcp/{port}/p2p/{peer}"


def bulk_addresses(listen: HostPort) -> tuple[str, ...]:
    """The addresses to announce for `listen`, at most MAX_ADDRESSES: (`10.0.0.5:4502`, ...) for `0.0.0.0:4502`."""
    return tuple(str(HostPort(host, listen.port)) for host in concrete_hosts(listen.host))


def concrete_hosts(host: str) -> tuple[str, ...]:
    """`host` itself. For the unspecified address, the interfaces' addresses: likeliest first, at most MAX_ADDRESSES.

    Loopback is included only if there is no other address, link-local addresses never (they need a zone).
    """
    try:
        given = ip_address(host)
    except ValueError:
        return (host,)
    if not given.is_unspecified:
        return (host,)
    own = [(name, ip) for name, ip in _interfaces() if ip.version == given.version]
    outside = [(name, ip) for name, ip in own if not ip.is_loopback] or own
    likeliest_first = sorted((bool(_VIRTUAL.match(name)), str(ip)) for name, ip in outside)
    return tuple(text for _, text in likeliest_first)[:MAX_ADDRESSES]


def with_observed(member: Member, host: str) -> Member:
    """Put the observed address `host` first in the member's addresses, unless the member claims it already.

    An observed address is surely routed. Loopback is left out: on any other host it means another node.
    """
    seen = ip_address(host)
    if isinstance(seen, IPv6Address):
        seen = seen.ipv4_mapped or seen
    if not member.addresses or seen.is_loopback or seen.is_link_local:
        return member
    try:
        port = HostPort.parse(member.addresses[0]).port
    except BadInputError:
        return member
    address = str(HostPort(str(seen), port))
    if address in member.addresses:
        return member
    return msgspec.structs.replace(member, addresses=(address, *member.addresses)[:MAX_ADDRESSES])


def _parts(text: str, hosts: tuple[str, ...], example: str) -> tuple[str, int, PeerId]:
    """Host, port and peer id of a multiaddr with the same parts as `example`; the peer id is empty if it has none."""
    try:
        parts = [(protocol.name, value or "") for protocol, value in Multiaddr(text).items()]
    except (MultiaddrError, ValueError) as error:
        raise BadInputError(f'"{text}" is not a multiaddr: {error}') from error
    count = 3 if "/p2p/" in example else 2
    if len(parts) != count or parts[0][0] not in hosts or (count == 3 and parts[2][0] != "p2p"):
        raise BadInputError(f'"{text}": write for example "{example}"')
    if parts[1][0] != "tcp":
        raise BadInputError(f'"{text}": only the tcp transport is supported')
    return parts[0][1], int(parts[1][1]), PeerId(parts[2][1] if count == 3 else "")


def _interfaces() -> list[tuple[str, IPv4Address | IPv6Address]]:
    interfaces = []
    for adapter in ifaddr.get_adapters():
        for entry in adapter.ips:
            ip = ip_address(entry.ip if isinstance(entry.ip, str) else entry.ip[0])
            if not ip.is_link_local:
                interfaces.append((adapter.name, ip))
    return interfaces
