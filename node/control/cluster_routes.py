"""Revocation on the control socket: POST /revoke with a revocation's text as the body.

The authority signs each revocation: access to the socket alone, without the authority's key, revokes no member.
"""

from __future__ import annotations

from collections.abc import Iterable

import trio

from node.api.documents import ClusterRow, RevokeReport
from node.control.routes import Route, document_of
from node.identity.certificates import validity_of
from node.identity.credentials import Enrollment
from node.identity.revocations import Revocations
from node.identity.verifier import Verifier
from node.membership.gossip import Gossiper
from node.web.server import Request
from protocol.admission import cluster_id, read_revocation
from protocol.errors import BadInputError, PeerMisbehavedError, UnavailableError


def cluster_row(admission: Verifier, revocations: Revocations, place: Enrollment) -> ClusterRow:
    return ClusterRow(
        id=cluster_id(admission.credentials.authority).hex(),
        admits=place.authority is not None,
        certificate_ends=validity_of(admission.credentials.certificate).end,
        revocations=len(revocations.all),
    )


def cluster_routes(gossiper: Gossiper, revocations: Revocations) -> Iterable[Route]:
    async def revoke(request: Request) -> RevokeReport:
        await trio.lowlevel.checkpoint()
        revocation = read_revocation(request.body.decode("utf-8", "replace").strip())
        try:
            new = gossiper.revoke((revocation,))
        except PeerMisbehavedError as error:
            raise BadInputError(str(error)) from error
        if revocation.subject not in revocations:
            raise UnavailableError("this cluster holds as many revocations as it can: it needs a new key")
        return RevokeReport(subject=revocation.subject, new=bool(new), total=len(revocations.all))

    return (Route("POST", "/revoke", document_of(revoke)),)
