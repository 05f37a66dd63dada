"""Revocation on the control socket: POST /revoke with a revocation's text as the body. It is signed, so nobody is
revoked by who may open the socket and does not have the authority's key."""

from __future__ import annotations

import trio

from node.control import Routes, document
from node.http_server import Request, Response
from node.membership import Gossiper
from node.revocations import Revocations
from node.status import RevokeReport
from protocol.admission import read_revocation
from protocol.errors import BadInputError, PeerMisbehavedError, UnavailableError


def admission_routes(gossiper: Gossiper, revocations: Revocations) -> Routes:
    async def revoke(request: Request) -> Response:
        await trio.lowlevel.checkpoint()
        revocation = read_revocation(request.body.decode("utf-8", "replace").strip())
        try:
            new = gossiper.revoke((revocation,))
        except PeerMisbehavedError as error:
            raise BadInputError(str(error)) from error
        if revocation.subject not in revocations:
            raise UnavailableError("this cluster has all the revocations that it can hold: it needs a new key")
        return document(RevokeReport(subject=revocation.subject, new=bool(new), total=len(revocations.all)))

    return {"/revoke": ("POST", revoke)}
