"""POST /revoke accepts only revocations that the authority signed."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import trio

from node.control.routes import cluster_routes
from node.exchange.memory import MemoryExchange, MemoryNetwork
from node.identity.certificates import open_authority
from node.identity.revocations import Revocations
from node.membership.gossip import Gossiper
from node.membership.membership import Membership
from node.web.server import Request, Response
from protocol.admission import make_revocation, revocation_text
from protocol.errors import BadInputError
from protocol.members import Member
from protocol.records import peer_id_of
from tests.support.passports import passports_of

AUTHORITY = open_authority()
OWN, GONE = peer_id_of(bytes(32)), peer_id_of(b"g" * 32)


def test_a_revocation_is_accepted_once_and_a_forged_one_never(tmp_path: Path) -> None:
    async def main() -> None:
        own = Member(OWN, "n", "s", ())
        membership = Membership(own, 1, Random(1), passports_of(own))
        exchange = MemoryExchange(MemoryNetwork(0.0), OWN, refused=membership.is_refused, handler=None)  # type: ignore[arg-type]
        revocations = Revocations(tmp_path / "revocations", AUTHORITY.der)
        (route,) = cluster_routes(Gossiper(membership, exchange, revocations), revocations)
        assert (route.method, route.path) == ("POST", "/revoke")

        async def post(body: str) -> bytes:
            response: Response = await route.handler(Request("POST", "/revoke", {}, {}, body=body.encode()))
            assert isinstance(response.body, bytes)
            return response.body

        text = revocation_text(make_revocation(AUTHORITY.cluster, GONE, 5, AUTHORITY.key.sign))
        assert b'"new":true,"total":1' in await post(text + "\n")
        assert b'"new":false,"total":1' in await post(text)
        assert membership.is_refused(GONE)
        forged = revocation_text(make_revocation(AUTHORITY.cluster, OWN, 5, lambda data: bytes(64)))
        for wrong in (forged, "", "nonsense", "\u00e9"):
            with pytest.raises(BadInputError):
                await post(wrong)
        assert len(revocations.all) == 1

    trio.run(main)
