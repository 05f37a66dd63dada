"""Verification of peers' certificates, the same for every channel, and the certificate that this node shows.

A certificate is good if this cluster's authority issued it, it did not expire more than `LEEWAY_S` ago, and its peer
id is not revoked. docs/PROTOCOL.md, "Identity and certificates".
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container
from dataclasses import replace

import trio
from cachetools import LRUCache

from node.identity.certificates import Credentials, Subject, issued_by, peer_of, subject_of, validity_of
from protocol.admission import date
from protocol.errors import NotAdmittedError
from protocol.ids import PeerId
from protocol.members import MAX_MEMBERS

log = logging.getLogger(__name__)

LEEWAY_S = 24 * 3600
"""A certificate is accepted for this time after its end: clocks of edge nodes may be wrong by hours (time zones)."""
LOOK_EVERY_S = 60.0
REVOKED = "certificate revoked"
"""The reason that a refusal gives for a revoked certificate."""


class Verifier:
    """`now` returns Unix time in seconds."""

    def __init__(
        self, credentials: Credentials, revoked: Container[str] = (), now: Callable[[], float] = time.time
    ) -> None:
        self.credentials = credentials
        self._revoked, self._now = revoked, now
        self.server_context = credentials.server_context()
        self.client_context = credentials.client_context()
        self._ends: LRUCache[PeerId, int] = LRUCache(MAX_MEMBERS)
        """By peer, the end of the certificate that it showed, if that certificate has an end."""

    def is_revoked(self, peer: PeerId) -> bool:
        return peer in self._revoked

    def verify(self, certificate: bytes) -> PeerId:
        """The member that a certificate (DER) names, for a certificate that TLS has not verified.

        Raises NotAdmittedError, and PeerMisbehavedError for a malformed certificate.
        """
        issued_by(certificate, self.credentials.authority)
        return self.peer_of(certificate)

    def peer_of(self, certificate: bytes) -> PeerId:
        """The member that a certificate (DER) names, for one that TLS has verified. Raises as `verify`."""
        peer = peer_of(certificate)
        reason, end = self.refusal(certificate), validity_of(certificate).end
        if reason:
            raise NotAdmittedError(reason, peer)
        if end is not None:
            self._ends[peer] = end
        else:
            self._ends.pop(peer, None)
        return peer

    def subject_of(self, certificate: bytes) -> Subject:
        """The subject of a certificate (DER) of this cluster, whether it counts now or not. Raises as `verify`."""
        issued_by(certificate, self.credentials.authority)
        return subject_of(certificate)

    def refusal(self, certificate: bytes) -> str:
        """Why a certificate (DER) of this cluster does not count here and now; "" if it does."""
        if self.is_revoked(peer_of(certificate)):
            return REVOKED
        end = validity_of(certificate).end
        return f"certificate expired at {date(end)}" if end is not None and self._is_over(end) else ""

    def renew(self, certificate: bytes) -> None:
        """Show this certificate from now on. Open connections keep the earlier one."""
        self.credentials = replace(self.credentials, certificate=certificate)
        for context in (self.server_context, self.client_context):
            self.credentials.show_in(context)

    def _is_over(self, end: int) -> bool:
        return self._now() > end + LEEWAY_S

    async def watch(
        self, disconnect: Callable[[PeerId], None], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Call `disconnect` for peers whose certificate expired after they connected."""
        task_status.started()
        while True:
            await trio.sleep(LOOK_EVERY_S)
            for peer in [peer for peer, end in self._ends.items() if self._is_over(end)]:
                del self._ends[peer]
                disconnect(peer)
