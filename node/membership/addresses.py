"""Addresses: what the configuration says, what others can connect to, and what was seen of a peer."""

from __future__ import annotations

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

_VIRTUAL = (
    "docker",
    "br-",
    "veth",
    "virbr",
    "cni",
    "flannel",
    "cali",
    "vxlan",
    "kube",
    "nodelocaldns",
    "lxc",
    "podman",
)
"""Interfaces of container and VM bridges: the same 172.17.0.1 on every host, so their addresses come last."""


_HOSTS = ("ip4", "ip6", "dns", "dns4", "dns6")


@dataclass(frozen=True, slots=True)
class Target:
    """Where a certain peer is to be reached over libp2p's TCP transport. `host`: an IP address or a DNS name."""

    peer: PeerId
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.peer} at {HostPort(self.host, self.port)}"


def parse_target(text: str) -> Target:
    """`/ip4/10.0.0.5/tcp/4501/p2p/12D3KooW...`; the host may be ip4, ip6, dns, dns4 or dns6. Raises BadInputError."""
    parts = _parts(text)
    if len(parts) != 3 or parts[0][0] not in _HOSTS or parts[2][0] != "p2p":
        raise BadInputError(f'"{text}": write for example "/ip4/10.0.0.5/tcp/4501/p2p/12D3KooW..."')
    peer = PeerId(parts[2][1])
    try:
        public_key_of(peer)
    except BadInputError as error:
        raise BadInputError(f'"{text}": {error}') from error
    return Target(peer, parts[0][1], _tcp_port(text, parts))


@dataclass(frozen=True, slots=True)
class JoinTarget:
    """A member by its address; `peer` None where whoever is there will do."""

    host: str
    port: int
    peer: PeerId | None = None


def parse_join_target(text: str) -> JoinTarget:
    """`10.0.0.5:4501`, `[fd00::5]:4501`, or a multiaddr with or without `/p2p/...`. Raises BadInputError."""
    if not text.startswith("/"):
        where = HostPort.read("ADDRESS", text)
        return JoinTarget(where.host, where.port)
    if "/p2p/" in text:
        target = parse_target(text)
        return JoinTarget(target.host, target.port, target.peer)
    parts = _parts(text)
    if len(parts) != 2 or parts[0][0] not in _HOSTS:
        raise BadInputError(f'"{text}": write for example "/ip4/10.0.0.5/tcp/4501"')
    return JoinTarget(parts[0][1], _tcp_port(text, parts))


def parse_listen(text: str) -> HostPort:
    """`/ip4/0.0.0.0/tcp/4501` or `/ip6/::/tcp/4501`. Raises BadInputError."""
    parts = _parts(text)
    if len(parts) != 2 or parts[0][0] not in ("ip4", "ip6"):
        raise BadInputError(f'"{text}": write for example "/ip4/0.0.0.0/tcp/4501"')
    return HostPort(parts[0][1], _tcp_port(text, parts))


def to_multiaddr(host: str, port: int, peer: PeerId) -> str:
    try:
        kind = f"ip{ip_address(host).version}"
    except ValueError:
        kind = "dns"
    return f"/{kind}/{host}/tcp/{port}/p2p/{peer}"


def bulk_addresses(listen: HostPort) -> tuple[str, ...]:
    """What a node that listens there tells others: `0.0.0.0:4502` to (`10.0.0.5:4502`, ...), at most MAX_ADDRESSES."""
    return tuple(str(HostPort(host, listen.port)) for host in concrete_hosts(listen.host))


def concrete_hosts(host: str) -> tuple[str, ...]:
    """The addresses behind `host`: itself, unless it is the unspecified one. Likeliest first, at most MAX_ADDRESSES.

    Loopback is among them only where there is nothing else; link-local ones never are (they need a zone).
    """
    try:
        given = ip_address(host)
    except ValueError:
        return (host,)
    if not given.is_unspecified:
        return (host,)
    found = sorted((_preference(name, ip), str(ip)) for name, ip in _interfaces() if ip.version == given.version)
    outside = [text for _, text in found if not ip_address(text).is_loopback]
    return tuple(outside or [text for _, text in found])[:MAX_ADDRESSES]


def with_observed(member: Member, host: str) -> Member:
    """The member with the address in front that it was seen at, where it is not among those it claims.

    What was seen says which way routes. Loopback is left out: it means another node wherever else it is told.
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


def _parts(text: str) -> list[tuple[str, str]]:
    try:
        return [(protocol.name, value or "") for protocol, value in Multiaddr(text).items()]
    except (MultiaddrError, ValueError) as error:
        raise BadInputError(f'"{text}" is not a multiaddr: {error}') from error


def _tcp_port(text: str, parts: list[tuple[str, str]]) -> int:
    if parts[1][0] != "tcp":
        raise BadInputError(f'"{text}": only the tcp transport is supported')
    return int(parts[1][1])


def _interfaces() -> list[tuple[str, IPv4Address | IPv6Address]]:
    found = []
    for adapter in ifaddr.get_adapters():
        for entry in adapter.ips:
            ip = ip_address(entry.ip if isinstance(entry.ip, str) else entry.ip[0])
            if not ip.is_link_local:
                found.append((adapter.name, ip))
    return found


def _preference(interface: str, ip: IPv4Address | IPv6Address) -> tuple[bool, bool]:
    return ip.is_loopback, interface.startswith(_VIRTUAL)
