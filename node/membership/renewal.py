"""Renewal: before its certificate ends, a node asks a member that holds the authority's key for a new certificate.

No list says which members hold the key. The node asks the member that issued its certificate first, then others in
random order. docs/PROTOCOL.md, "Joining".
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import msgspec
import trio

from node.exchange.contract import Exchange, Lane
from node.identity.certificates import Validity, issued_by, validity_of
from node.identity.credentials import Joined
from node.identity.verifier import Verifier
from node.membership.addresses import parse_target
from node.membership.membership import View
from protocol.admission import date
from protocol.errors import BadInputError, PeerMisbehavedError, PeerUnavailableError
from protocol.ids import PeerId
from protocol.messages import Renew, Renewed

log = logging.getLogger(__name__)

LAST_PART = 3
"""A certificate is renewed in the last third of its lifetime. That third is at least 8 h, followed by 24 h of leeway:
longer than the usual error of a clock, and longer than the usual outage of the members with the key."""
LOOK_EVERY_S = 600.0
"""Longest pause between two checks, because the clock may be set at any time."""
RETRY_S = 5.0
"""Pause after the first failure, doubled after each: a node that starts does not know any member yet."""
MOST_ASKED = 32
ANSWER_S = 2.0


def due_at(validity: Validity) -> float:
    """The Unix time at which renewal begins."""
    return math.inf if validity.end is None else validity.end - validity.lifetime_s / LAST_PART


@dataclass(slots=True)
class Renewal:
    """For a node that joined. `save` writes the new certificate to disk; `renewed` is called once it is in use. `now`
    is Unix time."""

    verifier: Verifier
    joined: Joined
    view: View
    exchange: Exchange
    save: Callable[[Joined], None]
    renewed: Callable[[], None]
    rng: Random
    now: Callable[[], float] = time.time

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until cancelled. Returns at once if the certificate has no end."""
        task_status.started()
        pause = RETRY_S
        while (end := validity_of(self.verifier.credentials.certificate).end) is not None:
            if self.now() < due_at(validity_of(self.verifier.credentials.certificate)) or await self._renew():
                pause = RETRY_S
                await trio.sleep(LOOK_EVERY_S)
                continue
            log.warning("no member renewed the certificate", extra={"ends": date(end), "again_s": pause})
            await trio.sleep(pause * self.rng.uniform(0.75, 1.25))
            pause = min(2 * pause, LOOK_EVERY_S)

    async def _renew(self) -> bool:
        for peer in self._candidates():
            certificate = await self._ask(peer)
            if certificate is not None:
                self.joined = msgspec.structs.replace(self.joined, certificate=certificate)
                self.save(self.joined)
                self.verifier.renew(certificate)
                self.renewed()
                log.info("certificate renewed", extra={"by": peer})
                return True
        return False

    def _candidates(self) -> Sequence[PeerId]:
        own = self.verifier.credentials.identity.peer_id
        issuers = [parse_target(address).peer for address in self.joined.bootstrap]
        others = [member.peer_id for member in self.view.site if member.peer_id not in (own, *issuers)]
        self.rng.shuffle(others)
        return [*issuers, *others][:MOST_ASKED]

    async def _ask(self, peer: PeerId) -> bytes | None:
        question = Renew(self.verifier.credentials.certificate)
        try:
            answer = await self.exchange.request(peer, question, lane=Lane.CONTROL, silence_s=ANSWER_S)
            if not isinstance(answer.message, Renewed):
                return None
            certificate = answer.message.certificate
            self._check(certificate)
        except (PeerUnavailableError, PeerMisbehavedError, BadInputError) as error:
            log.debug("not renewed", extra={"peer": peer, "reason": error})
            return None
        return certificate

    def _check(self, certificate: bytes) -> None:
        """Raises PeerMisbehavedError unless it is for this node and ends later than the current certificate."""
        verifier = self.verifier
        if issued_by(certificate, verifier.credentials.authority) != verifier.credentials.identity.peer_id:
            raise PeerMisbehavedError("sent a certificate for another node")
        new, old = validity_of(certificate).end, validity_of(verifier.credentials.certificate).end
        if new is not None and old is not None and new <= old:
            raise PeerMisbehavedError("sent a certificate that does not end later")
