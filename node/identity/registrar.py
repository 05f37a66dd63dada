"""Both sides of a join, and the renewal of the certificate that a join issued. docs/PROTOCOL.md, "Joining".

`Registrar` runs on every node. If the node does not hold the authority's key, it refuses. `apply` is the new node's
side, run by `p2pctl join`. Both are independent of the transport of the messages: see `Line`.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Container
from pathlib import Path
from typing import Literal, Protocol

import msgspec
import trio
from cachetools import TTLCache
from cryptography.exceptions import InvalidSignature

from node.exchange.contract import Answer
from node.identity import certificates
from node.identity.certificates import Authority, Subject, Validity
from node.runtime import secret_files
from node.runtime.refusals import Refusals
from protocol import join
from protocol.admission import MAX_USES, Token, check_token, cluster_id, read_token
from protocol.errors import UNDECODABLE, BadInputError, DeniedError, NotAdmittedError, PeerMisbehavedError
from protocol.ids import PeerId
from protocol.messages import Failed, Renew, Renewed

log = logging.getLogger(__name__)

CHANNEL = "join"
NO_KEY = (
    "this member does not hold the cluster's key and cannot admit any node: give the address of a member whose"
    " configuration names it as [cluster] key"
)
MOST_WRONG, WRONG_S = 8, 60.0
"""After MOST_WRONG wrong tokens, a host is refused before it shows another, until WRONG_S seconds after the last."""
_HOSTS = 1024
MAX_TOKENS = 256
"""Tokens with a limited number of uses; each is remembered until it expires."""
MAX_FILE = MAX_TOKENS * (MAX_USES + 1) * 64
FILE_NAME = "tokens.msgpack"


class Line(Protocol):
    """A stream of messages with a peer that has proved that it holds the key of its peer id.

    Its methods raise PeerUnavailableError. `receive` raises PeerMisbehavedError for a message above `most` bytes.
    """

    peer: PeerId

    async def send(self, message: bytes) -> None: ...

    async def receive(self, most: int) -> bytes: ...


class _Used(msgspec.Struct, frozen=True, array_like=True):
    expires: int
    peers: tuple[PeerId, ...]


class _File(msgspec.Struct, frozen=True, array_like=True):
    version: Literal[1]
    tokens: dict[str, _Used]


class Uses:
    """The peers that this node admitted by tokens with a limited number of uses. Kept in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._used = self._load()

    def take(self, token: Token, peer: PeerId, now: float) -> None:
        """Record on disk that the token admitted `peer`. A peer counts once.

        Raises NotAdmittedError if the token has no uses left, BadInputError if the file cannot be written.
        """
        if not token.uses:
            return
        self._used = {subject: used for subject, used in self._used.items() if used.expires >= now}
        used = self._used.get(token.subject) or _Used(token.expires, ())
        if peer in used.peers:
            return
        if len(used.peers) >= token.uses:
            raise NotAdmittedError(f"the join token has admitted {token.uses} nodes, its maximum")
        if token.subject not in self._used and len(self._used) >= MAX_TOKENS:
            raise NotAdmittedError("too many join tokens with a limited number of uses are valid now")
        all_used = {**self._used, token.subject: _Used(used.expires, (*used.peers, peer))}
        secret_files.replace(self._path, msgspec.msgpack.encode(_File(1, all_used)))
        self._used = all_used

    def _load(self) -> dict[str, _Used]:
        try:
            return msgspec.msgpack.decode(secret_files.read(self._path, MAX_FILE), type=_File).tokens
        except FileNotFoundError:
            return {}
        except UNDECODABLE as error:
            raise BadInputError(f"{self._path} is damaged: remove it; used tokens then count as new") from error


class Registrar:
    """Issues certificates for join tokens, and renews members' certificates. With `authority` None, refuses both."""

    def __init__(
        self, authority: Authority | None, revoked: Container[str], uses: Uses, now: Callable[[], float] = time.time
    ) -> None:
        self._authority, self._revoked, self._uses, self._now = authority, revoked, uses, now
        self._refusals = Refusals()
        self._wrong: TTLCache[str, int] = TTLCache(_HOSTS, WRONG_S, timer=trio.current_time)

    async def serve(self, line: Line, host: str, own: PeerId) -> None:
        """Serve one join. Refusals are sent and logged. Raises PeerUnavailableError and PeerMisbehavedError."""
        knock = join.decode_as(join.Knock, await line.receive(join.MAX_MESSAGE))
        refusal = self._refusal(host)
        if self._authority is None or refusal:
            self._refusals.tell(CHANNEL, line.peer, host, refusal)
            await line.send(join.encode(join.Offer(join.VERSION, b"", b"", refusal)))
            return
        proof = self._authority.key.sign(join.proven(knock.nonce, line.peer, own))
        await line.send(join.encode(join.Offer(join.VERSION, self._authority.der, proof)))
        application = join.decode_as(join.Application, await line.receive(join.MAX_MESSAGE))
        try:
            certificate = self._admit(self._authority, line.peer, application)
        except NotAdmittedError as error:
            self._wrong[host] = self._wrong.get(host, 0) + 1
            self._refusals.tell(CHANNEL, line.peer, host, error)
            await line.send(join.encode(join.Admittance(b"", str(error)[: join.MAX_REFUSAL])))
        except BadInputError as error:
            log.error("a use of a join token cannot be stored", extra={"reason": error})  # noqa: TRY400 # says it all
            refusal = "its disk cannot be written: try another member with the key"
            await line.send(join.encode(join.Admittance(b"", refusal)))
        else:
            await line.send(join.encode(join.Admittance(certificate)))

    def _refusal(self, host: str) -> str:
        """The reason to refuse every peer at `host`; empty if there is none."""
        if self._authority is None:
            return NO_KEY
        return "too many wrong tokens; wait a minute" if self._wrong.get(host, 0) >= MOST_WRONG else ""

    def _admit(self, authority: Authority, peer: PeerId, application: join.Application) -> bytes:
        now = self._now()
        token = check_token(application.token, authority.key.public_key(), authority.cluster, now)
        if peer in self._revoked:
            raise NotAdmittedError("this node's peer id is revoked: it needs a new identity")
        if token.subject in self._revoked:
            raise NotAdmittedError("the join token is revoked")
        self._uses.take(token, peer, now)
        log.info("admitted", extra={"peer": peer, "node": application.name, "site": token.site, "by": token.subject})
        # A clock that is behind must not shorten the lifetime that the operator chose.
        validity = Validity.lasting(max(now, token.made), token.lifetime)
        return certificates.issue(authority, Subject(peer, application.name, token.site), validity)

    async def handle(self, peer: PeerId, request: Renew) -> Answer:
        """Renew a member's certificate. Raises DeniedError if it is not the certificate of `peer`."""
        await trio.lowlevel.checkpoint()
        if self._authority is None:
            return Answer(Failed("not-held", NO_KEY))
        if certificates.issued_by(request.certificate, self._authority.der) != peer:
            raise DeniedError("the certificate of another node")
        old = certificates.validity_of(request.certificate)
        validity = Validity.lasting(max(self._now(), old.start), old.lifetime_s)
        subject = certificates.subject_of(request.certificate)
        return Answer(Renewed(certificates.issue(self._authority, subject, validity)))


async def apply(line: Line, own: PeerId, text: str, name: str) -> tuple[bytes, bytes]:
    """Join with the token `text`. Returns this node's certificate and the CA certificate.

    Raises NotAdmittedError with the other side's reason, or if that side is not of the token's cluster: then the token
    is not sent. Raises BadInputError for a malformed token, PeerMisbehavedError and PeerUnavailableError.
    """
    token = read_token(text)
    nonce = secrets.token_bytes(join.NONCE)
    await line.send(join.encode(join.Knock(join.VERSION, nonce)))
    offer = join.decode_as(join.Offer, await line.receive(join.MAX_MESSAGE))
    if offer.refusal:
        raise NotAdmittedError(offer.refusal)
    _check_offer(offer, token, join.proven(nonce, own, line.peer))
    await line.send(join.encode(join.Application(text, name)))
    admittance = join.decode_as(join.Admittance, await line.receive(join.MAX_MESSAGE))
    if admittance.refusal:
        raise NotAdmittedError(admittance.refusal)
    if certificates.issued_by(admittance.certificate, offer.authority) != own:
        raise PeerMisbehavedError("sent a certificate for another node")
    return admittance.certificate, offer.authority


def _check_offer(offer: join.Offer, token: Token, proven: bytes) -> None:
    cluster = cluster_id(offer.authority)
    if cluster != token.cluster:
        text = f"it is of the cluster {cluster.hex()[:16]}, but the token is of {token.cluster.hex()[:16]}"
        raise NotAdmittedError(text)
    try:
        certificates.key_of_authority(offer.authority).verify(offer.proof, proven)
    except InvalidSignature as error:
        raise NotAdmittedError("it does not hold the cluster's key: does another program relay the join?") from error
