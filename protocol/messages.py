"""The messages of the bulk channel. Bytes and duties of both sides: docs/PROTOCOL.md.

Answers carry their request's number, in any order. Every value is checked against these types when it is decoded;
`protocol.wire` checks the bounds that types do not express. On the wire fields have positions, no names. The tags 2 and
33 belonged to messages of earlier versions.
"""

from __future__ import annotations

import msgspec

from protocol.admission import Revocation
from protocol.evidence import Evidence
from protocol.ids import PeerId
from protocol.members import NO_NEWS, News, Statement
from protocol.records import Record
from protocol.shard_proofs import ShardProof


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    pass


class GetShards(_Message, frozen=True, tag=1):
    """Shard `want` of the code (k, m) of each of some blocks: bit i of `wanted` asks for that of block `first` + i.

    The answer is a stream: a ShardFound for each wanted block, in any order, or Failed at any point.

    `hops` bounds the sources that the receiver may use: 0 only its own stores, 1 also the upstream, 2 also the stripe's
    home, 3 and more also keepers nearer to the home. `source` says where the upstream has the object. `reader` is a
    peer id if the upstream restricts access: that member reads the blocks if no member holds them. It is "" if access
    is public. A `background` request has no waiting client and yields on the uplink. `asker` is the peer id of the
    member on whose behalf the sender asks; "" if it asks for its own client. `keep`: the sender will keep the shards
    and pass them on, so it needs the maker's proofs. `reached`: the upstream answered the sender lately.
    """

    digest: str
    first: int
    wanted: int
    size: int
    k: int
    m: int
    want: int
    hops: int
    source: str
    reader: str = ""
    background: bool = False
    asker: str = ""
    keep: bool = False
    reached: bool = False


class GetHoldings(_Message, frozen=True, tag=3):
    digest: str


class FindHolders(_Message, frozen=True, tag=4):
    """To a member of an object's directory: which members announced that they hold a part of it?"""

    digest: str


class Announce(_Message, frozen=True, tag=5):
    """To a member of these objects' directories: the sender holds a part of each."""

    digests: tuple[str, ...]


class Resolve(_Message, frozen=True, tag=6):
    """The descriptor of a reference, as the upstream told it to the receiver, or as its operator imported it."""

    source: str
    reference: str


class Ping(_Message, frozen=True, tag=7):
    """SWIM probe. `nonce`: the receiver proves in its answer that it is alive, for another member that asked the sender
    to ping it. `revocations`: all that the sender holds, while one of them is new."""

    news: News = NO_NEWS
    nonce: bytes = b""
    revocations: tuple[Revocation, ...] = ()


class PingRequest(_Message, frozen=True, tag=8):
    """SWIM indirect probe: ping `target` for the sender, with this nonce. Answered by Pong or Failed."""

    target: PeerId
    nonce: bytes
    news: News = NO_NEWS


class Sync(_Message, frozen=True, tag=9):
    """The sender's own statement, a summary of its view (protocol/summary.py), and all revocations that it holds."""

    own: Statement
    summary: bytes
    revocations: tuple[Revocation, ...] = ()


class Renew(_Message, frozen=True, tag=10):
    """To a member that has the authority's key: the sender's certificate (DER), to be replaced by a later one."""

    certificate: bytes


class Accuse(_Message, frozen=True, tag=11):
    """Evidence that the sender keeps, each with its age in seconds; answered by the receiver's."""

    told: tuple[tuple[Evidence, float], ...]


Request = GetShards | GetHoldings | FindHolders | Announce | Resolve | Ping | PingRequest | Sync | Renew | Accuse


class ShardFound(_Message, frozen=True, tag=32):
    """The body that follows is shard `index` of the code (k, m) of the record's block. `origin`: docs/PROTOCOL.md,
    "Private blocks". Without `proof`, the sender made the shard."""

    k: int
    m: int
    index: int
    record: Record
    origin: bytes = b""
    proof: ShardProof | None = None


class HoldingsFound(_Message, frozen=True, tag=34):
    """Bitmaps, bit i for block i, least significant bit first; shards as (k, m, index, bitmap)."""

    blocks: bytes
    shards: tuple[tuple[int, int, int, bytes], ...]


class Holders(_Message, frozen=True, tag=35):
    peers: tuple[PeerId, ...]


class Done(_Message, frozen=True, tag=36):
    pass


class Resolved(_Message, frozen=True, tag=37):
    """`age_s` is the time since the upstream confirmed it, `public_age_s` since the repository was seen to be public,
    or -1 if it never was."""

    digest: str
    size: int
    media_type: str
    age_s: float
    public_age_s: float = -1.0


class Pong(_Message, frozen=True, tag=38):
    """`liveness`: the signature of the member that was pinged with a nonce, as that member or its helper sends it."""

    news: News = NO_NEWS
    liveness: bytes = b""


class SyncReply(_Message, frozen=True, tag=39):
    """What the asker lacks; the keys of members that the sender cannot reach, and of those whose statements it wants;
    whether there is `more` of them; and all revocations that the sender holds."""

    statements: tuple[Statement, ...]
    doubts: bytes = b""
    wanted: bytes = b""
    more: bool = False
    revocations: tuple[Revocation, ...] = ()


class Waiting(_Message, frozen=True, tag=40):
    """The sender works on all these requests of the connection, as (number, state). It has no request's number but 0.
    State 0: nothing of the answer is at the sender yet; 1: bytes of it arrive there; 2: it waits for its turn on the
    connection."""

    requests: tuple[tuple[int, int], ...]


class Failed(_Message, frozen=True, tag=41):
    """`code` is one of `FAILURES`; `text` is for the log."""

    code: str
    text: str


class Renewed(_Message, frozen=True, tag=42):
    certificate: bytes


class Accusations(_Message, frozen=True, tag=43):
    told: tuple[tuple[Evidence, float], ...]


_MembershipReply = Pong | SyncReply | Renewed | Accusations
Reply = ShardFound | HoldingsFound | Holders | Done | Resolved | Waiting | Failed | _MembershipReply

FAILURES = ("not-held", "not-found", "denied", "unavailable", "busy", "bad-request")
