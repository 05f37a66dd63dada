"""The network's part of `p2pctl join`: ask a member at an address for a certificate."""

from __future__ import annotations

from node.identity.credentials import Joined
from node.identity.identity import Identity
from node.identity.registrar import apply
from node.membership.addresses import JoinTarget, parse_join_target, to_multiaddr
from node.membership.libp2p import join_line
from protocol.errors import NotAdmittedError, PeerMisbehavedError, PeerUnavailableError, UnavailableError


async def join(identity: Identity, token: str, address: str, name: str) -> Joined:
    """Raises BadInputError for a malformed token or address, UnavailableError if it fails."""
    target = parse_join_target(address)
    try:
        return await _ask(identity, token, target, name)
    except PeerUnavailableError as error:
        text = f"no answer from {address}: {error}; is p2pd up there, and is this its peers.listen?"
        raise UnavailableError(text) from error
    except NotAdmittedError as error:
        raise UnavailableError(f"refused at {address}: {error}") from error
    except PeerMisbehavedError as error:
        raise UnavailableError(f"the answer from {address} is not understood: {error}") from error


async def _ask(identity: Identity, token: str, target: JoinTarget, name: str) -> Joined:
    async with join_line(identity, target.host, target.port, target.peer) as line:
        certificate, authority = await apply(line, identity.peer_id, token, name)
        back = to_multiaddr(target.host, target.port, line.peer)
    return Joined(certificate=certificate, authority=authority, bootstrap=(back,))
