"""A certificate that ends is renewed before it does, by any member that holds the authority's key.

docs/PROTOCOL.md, "Joining". Nobody is told who those members are: they are asked, who issued it first.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from random import Random

import trio

from node.exchange.contract import Exchange, Lane
from node.identity.certificates import Validity, issued_by, validity_of
from node.identity.credentials import Joined
from node.identity.verifier import Admission
from node.membership.addresses import parse_target
from node.membership.view import View
from protocol.admission import date
from protocol.errors import BadInputError, PeerMisbehavedError, PeerUnavailableError
from protocol.ids import PeerId
from protocol.messages import Renew, Renewed

log = logging.getLogger(__name__)

LAST_PART = 3
"""In this part of its lifetime a certificate is renewed: the last third of 24 h at least, and 24 h of leeway after it,
are more than a clock is wrong by or an outage of the members with the key usually takes."""
LOOK_EVERY_S = 600.0
"""The clock may be set at any time, so nothing waits for longer."""
RETRY_S = 5.0
"""After a first failure, doubled after each: at the start of the node nobody is known yet."""
MOST_ASKED = 32
ANSWER_S = 2.0


def due_at(validity: Validity) -> float:
    """The Unix time from which on it is renewed."""
    return math.inf if validity.end is None else validity.end - validity.lifetime_s / LAST_PART


class Renewal:
    """Only for a node that joined. `save` writes the new certificate; `now` is Unix time."""

    def __init__(
        self,
        admission: Admission,
        joined: Joined,
        view: View,
        exchange: Exchange,
        save: Callable[[Joined], None],
        rng: Random,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._admission = admission
        self._joined = joined
        self._view = view
        self._exchange = exchange
        self._save = save
        self._rng = rng
        self._now = now

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until it is cancelled; at once over for a certificate without end."""
        task_status.started()
        pause = RETRY_S
        while (end := validity_of(self._admission.certificate).end) is not None:
            if not self._is_due() or await self._renew():
                pause = RETRY_S
                await trio.sleep(LOOK_EVERY_S)
                continue
            log.warning("no member renewed the certificate", extra={"ends": date(end), "again_s": pause})
            await trio.sleep(pause * self._rng.uniform(0.75, 1.25))
            pause = min(2 * pause, LOOK_EVERY_S)

    def _is_due(self) -> bool:
        return self._now() >= due_at(validity_of(self._admission.certificate))

    async def _renew(self) -> bool:
        for peer in self._candidates():
            certificate = await self._ask(peer)
            if certificate is not None:
                self._joined = Joined(
                    certificate=certificate, authority=self._joined.authority, bootstrap=self._joined.bootstrap
                )
                self._save(self._joined)
                self._admission.renew(certificate)
                log.info("certificate renewed", extra={"by": peer})
                return True
        return False

    def _candidates(self) -> Sequence[PeerId]:
        own = self._admission.identity.peer_id
        issuers = [parse_target(address).peer for address in self._joined.bootstrap]
        others = [member.peer_id for member in self._view.site if member.peer_id not in (own, *issuers)]
        self._rng.shuffle(others)
        return [*issuers, *others][:MOST_ASKED]

    async def _ask(self, peer: PeerId) -> bytes | None:
        question = Renew(self._admission.certificate)
        try:
            answer = await self._exchange.request(peer, question, lane=Lane.CONTROL, silence_s=ANSWER_S)
            if not isinstance(answer.message, Renewed):
                return None
            certificate = answer.message.certificate
            self._check(certificate)
        except (PeerUnavailableError, PeerMisbehavedError, BadInputError) as error:
            log.debug("not renewed", extra={"peer": peer, "reason": error})
            return None
        return certificate

    def _check(self, certificate: bytes) -> None:
        """Raises PeerMisbehavedError unless it is this node's and ends later than the one that it has."""
        admission = self._admission
        if issued_by(certificate, admission.authority) != admission.identity.peer_id:
            raise PeerMisbehavedError("gave a certificate for another node")
        new, old = validity_of(certificate).end, validity_of(admission.certificate).end
        if new is not None and old is not None and new <= old:
            raise PeerMisbehavedError("gave a certificate that ends no later")
