"""Discovery on the LAN by multicast DNS and DNS-SD (RFC 6762, RFC 6763): service `_shoal-p2p._udp.local.`.

zeroconf runs in threads of its own, and calls into the trio loop through a TrioToken. The node also works without mDNS:
a failure here only logs a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from ipaddress import ip_address
from threading import BoundedSemaphore

import trio
import zeroconf

from node.membership.addresses import Target
from protocol.errors import BadInputError
from protocol.ids import PeerId
from protocol.members import MAX_ADDRESSES
from protocol.records import public_key_of

OnFound = Callable[[tuple[Target, ...]], None]

log = logging.getLogger(__name__)

SERVICE = "_shoal-p2p._udp.local."
_LOOKUP_MS = 2000
_LOOKUPS, _MAX_WAITING_LOOKUPS = 8, 64
"""Look-ups at a time, and waiting ones; further peers are found when they announce themselves again. Nodes announce
all records at once, so that only others' announcements, or lost packets, need one."""
_CLOSE_S = 2.0
"""Longest time that a stop waits for the goodbye to be sent."""


@dataclass(frozen=True, slots=True)
class Announcement:
    """A node as it announces itself. `cluster` keeps nodes of several clusters on one LAN from dialling each other."""

    peer: PeerId
    cluster: str
    hosts: tuple[str, ...]
    port: int


def cluster_tag(authority: bytes) -> str:
    """A cluster's name, derived from its CA certificate (DER). Anyone can announce it, so it proves nothing."""
    return sha256(authority).hexdigest()[:16]


async def run(mine: Announcement, on_found: OnFound, on_lost: Callable[[PeerId], None]) -> None:
    """Announce this node on the interfaces of its hosts, and report other nodes of its cluster, until cancelled.

    Returns early, after one warning, if multicast does not work. `on_found` is called again when addresses change.
    """
    listener = _Listener(mine, on_found, on_lost, trio.lowlevel.current_trio_token())
    try:
        responder = await trio.to_thread.run_sync(partial(_start, mine, listener))
    except (OSError, zeroconf.Error, RuntimeError) as error:
        log.warning("mDNS does not work here; peers are found by bootstrap only: %s", error or type(error).__name__)
        return
    try:
        await trio.sleep_forever()
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLOSE_S):
            listener.lookups.shutdown(wait=False, cancel_futures=True)
            await trio.to_thread.run_sync(_stop, responder, abandon_on_cancel=True)


def _start(mine: Announcement, listener: _Listener) -> zeroconf.Zeroconf:
    service = zeroconf.ServiceInfo(
        SERVICE,
        f"{mine.peer}.{SERVICE}",
        port=mine.port,
        properties={"txtvers": "1", "cluster": mine.cluster},
        server=f"{mine.peer}.local.",
        parsed_addresses=list(mine.hosts),
    )
    responder = zeroconf.Zeroconf(interfaces=_interfaces(mine.hosts))
    try:
        responder.register_service(service, cooperating_responders=True)
        responder.add_service_listener(SERVICE, listener)
    except BaseException:
        responder.close()
        raise
    return responder


def _interfaces(hosts: Sequence[str]) -> list[str]:
    """IPv4 if there is any: one family is enough, because the announcement carries the addresses of both."""
    four = [host for host in hosts if ":" not in host]
    usable = four or [host for host in hosts if not ip_address(host).is_loopback]
    if not usable:
        raise OSError("the IPv6 loopback interface carries no multicast")
    return usable


def _stop(responder: zeroconf.Zeroconf) -> None:
    try:
        responder.close()
    except (OSError, zeroconf.Error, RuntimeError) as error:
        log.warning("mDNS did not stop cleanly: %s", error or type(error).__name__)


@dataclass(eq=False)
class _Listener(zeroconf.ServiceListener):
    """zeroconf calls these methods in its browser thread, one at a time, so none may block: announcements that lack an
    address would delay the others."""

    mine: Announcement
    on_found: OnFound
    on_lost: Callable[[PeerId], None]
    loop: trio.lowlevel.TrioToken
    lookups: ThreadPoolExecutor = field(default_factory=partial(ThreadPoolExecutor, _LOOKUPS, "mdns-lookup"))
    waiting: BoundedSemaphore = field(default_factory=partial(BoundedSemaphore, _MAX_WAITING_LOOKUPS))

    def add_service(self, zc: zeroconf.Zeroconf, type_: str, name: str) -> None:
        peer = self._other(name)
        if peer is None:
            return
        info = zeroconf.ServiceInfo(type_, name)
        if info.load_from_cache(zc):
            self._found(peer, info)
        elif self.waiting.acquire(blocking=False):
            self.lookups.submit(self._look_up, zc, peer, info)
        else:
            log.debug("too many mDNS look-ups wait: %s is not looked up", peer)

    def _look_up(self, zc: zeroconf.Zeroconf, peer: PeerId, info: zeroconf.ServiceInfo) -> None:
        try:
            if info.request(zc, _LOOKUP_MS):
                self._found(peer, info)
        except (OSError, zeroconf.Error, RuntimeError) as error:
            log.debug("mDNS look-up of %s failed: %s", peer, error)
        finally:
            self.waiting.release()

    def _found(self, peer: PeerId, info: zeroconf.ServiceInfo) -> None:
        ways = self._ways(peer, info)
        if ways:
            self._in_loop(partial(self.on_found, ways))

    def update_service(self, zc: zeroconf.Zeroconf, type_: str, name: str) -> None:
        self.add_service(zc, type_, name)

    def remove_service(self, zc: zeroconf.Zeroconf, type_: str, name: str) -> None:
        peer = self._other(name)
        if peer:
            self._in_loop(partial(self.on_lost, peer))

    def _other(self, name: str) -> PeerId | None:
        peer = PeerId(name.removesuffix(f".{SERVICE}"))
        try:
            public_key_of(peer)
        except BadInputError:
            return None
        return None if peer == self.mine.peer else peer

    def _ways(self, peer: PeerId, info: zeroconf.ServiceInfo) -> tuple[Target, ...]:
        if info.properties.get(b"cluster") != self.mine.cluster.encode() or not info.port:
            return ()
        # A peer's loopback address is usable only by a node that listens on loopback itself.
        on_loopback = any(ip_address(own).is_loopback for own in self.mine.hosts)
        hosts = [host for host in info.parsed_addresses() if on_loopback or not ip_address(host).is_loopback]
        return tuple(Target(peer, host, info.port) for host in hosts[:MAX_ADDRESSES])

    def _in_loop(self, call: Callable[[], None]) -> None:
        try:
            self.loop.run_sync_soon(call)
        except trio.RunFinishedError:
            log.debug("mDNS reported a peer after the end")
