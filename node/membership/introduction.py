"""Introductions: two nodes prove to each other that they belong to one cluster, and name the members that they know.

A new node needs an introduction before it uses the bulk channel. `exchange_members` is the conversation over one
stream, independent of the transport. docs/PROTOCOL.md, "Introduction".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from node.identity.registrar import Line
from node.identity.verifier import Verifier
from protocol.errors import PeerMisbehavedError
from protocol.ids import PeerId
from protocol.introduction import MAX_HELLO, MAX_MEMBERS_BYTES, decode_hello, decode_members, encode_hello
from protocol.members import Member, Statement, Vouched

Introduced = Callable[[Sequence[Vouched], str], None]
"""Called with the statements that a member showed, its own first, and the host from which it connected."""
Current = Callable[[], tuple[Member, ...]]
"""The members of the site, this node first."""

CHANNEL = "introduction"
"""The channel's name in log lines about refusals."""


async def exchange_members(
    line: Line, verifier: Verifier, members: Callable[[], bytes], *, dialled: bool
) -> tuple[Statement, ...]:
    """The statements that the peer shows, its own first, not verified. `members` returns this node's encoded list.

    Certificates are exchanged first, the dialling side's before the other's. Raises PeerMisbehavedError (for a peer of
    another cluster its subclass NotAdmittedError) before this node names any member.
    """
    if dialled:
        await line.send(encode_hello(verifier.credentials.certificate))
        _verify(verifier, line.peer, await line.receive(MAX_HELLO))
        await line.send(members())
        return decode_members(await line.receive(MAX_MEMBERS_BYTES), line.peer)
    hello = await line.receive(MAX_HELLO)
    await line.send(encode_hello(verifier.credentials.certificate))
    _verify(verifier, line.peer, hello)
    theirs = decode_members(await line.receive(MAX_MEMBERS_BYTES), line.peer)
    await line.send(members())
    return theirs


def _verify(verifier: Verifier, peer: PeerId, hello: bytes) -> None:
    subject = verifier.verify(decode_hello(hello, peer))
    if subject != peer:
        raise PeerMisbehavedError(f"shows the certificate of {subject}")
