"""The messages of the bulk channel. The bytes, and what each side owes the other: docs/PROTOCOL.md.

Requests are answered by number, in any order. Every value is checked against these types when it is decoded, and the
bounds that types do not say are checked by `protocol.wire`.
"""

from __future__ import annotations

import msgspec

from protocol.admission import Revocation
from protocol.evidence import Evidence
from protocol.ids import PeerId
from protocol.members import Update
from protocol.records import Record


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    pass


class GetShard(_Message, frozen=True, tag=1):
    """Shard `want` of the code (k, m) of a block; another shard of that code will do unless `exact`.

    `reach` is how far the receiver may go for it: 3 and more ask keepers nearer to the block's home, 2 ask the home,
    1 ask the origin, 0 only what it holds.
    `source` is an opaque hint for the origin. `reader` is a peer id where the origin asks who reads: that member
    reads the block for whoever lacks it. It is "" where the origin gives it to everybody. `background`: nobody waits
    for it, and it makes way on the uplink.
    """

    digest: str
    index: int
    size: int
    k: int
    m: int
    want: int
    reach: int
    source: str
    exact: bool = False
    reader: str = ""
    background: bool = False


class GetBlock(_Message, frozen=True, tag=2):
    """A whole block, from what the receiver holds."""

    digest: str
    index: int
    size: int


class GetHoldings(_Message, frozen=True, tag=3):
    """Which blocks and shards of an object the receiver holds."""

    digest: str


class FindHolders(_Message, frozen=True, tag=4):
    """To a member of an object's directory: which members announced that they hold some of it?"""

    digest: str


class Announce(_Message, frozen=True, tag=5):
    """To a member of these objects' directories: the sender holds some of each."""

    digests: tuple[str, ...]


class Resolve(_Message, frozen=True, tag=6):
    """What does this reference stand for? `reach` 1: the receiver may ask the origin; 0: only what it knows."""

    source: str
    reference: str
    reach: int


class Ping(_Message, frozen=True, tag=7):
    """SWIM probe; `updates` piggyback. `revocations`: those that the sender holds, while one of them is news."""

    updates: tuple[Update, ...]
    revocations: tuple[Revocation, ...] = ()


class PingRequest(_Message, frozen=True, tag=8):
    """SWIM indirect probe: ping `target` for me. Answered by Pong or Failed."""

    target: PeerId
    updates: tuple[Update, ...]


class Sync(_Message, frozen=True, tag=9):
    """The sender's whole view, and all revocations that it holds; answered by the receiver's."""

    updates: tuple[Update, ...]
    revocations: tuple[Revocation, ...] = ()


class Renew(_Message, frozen=True, tag=10):
    """To a member that has the authority's key: the sender's certificate (DER), for one that ends later."""

    certificate: bytes


class Accuse(_Message, frozen=True, tag=11):
    """Evidence that the sender keeps, with the seconds since it was found; answered by the receiver's."""

    told: tuple[tuple[Evidence, float], ...]


Request = (
    GetShard | GetBlock | GetHoldings | FindHolders | Announce | Resolve | Ping | PingRequest | Sync | Renew | Accuse
)


class ShardFound(_Message, frozen=True, tag=32):
    """The body that follows is shard `index` of the code (k, m) of the record's block."""

    k: int
    m: int
    index: int
    record: Record


class BlockFound(_Message, frozen=True, tag=33):
    """The body that follows is the record's block."""

    record: Record


class HoldingsFound(_Message, frozen=True, tag=34):
    """Bitmaps, bit i for block i, least significant bit first; shards as (k, m, index, bitmap)."""

    blocks: bytes
    shards: tuple[tuple[int, int, int, bytes], ...]


class Holders(_Message, frozen=True, tag=35):
    peers: tuple[PeerId, ...]


class Done(_Message, frozen=True, tag=36):
    pass


class Resolved(_Message, frozen=True, tag=37):
    """`age_s` and `public_age_s` are the times since the registry confirmed it, and since it was seen to let anybody
    read the repository; -1 where that is not known."""

    digest: str
    size: int
    media_type: str
    age_s: float
    public_age_s: float = -1.0


class Pong(_Message, frozen=True, tag=38):
    updates: tuple[Update, ...]


class SyncReply(_Message, frozen=True, tag=39):
    updates: tuple[Update, ...]
    revocations: tuple[Revocation, ...] = ()


class Waiting(_Message, frozen=True, tag=40):
    """Interim: the request is being worked on and its work makes progress. Repeated until the answer.

    `ready`: the answer is there, and only waits for its turn on the connection.
    """

    ready: bool = False


class Failed(_Message, frozen=True, tag=41):
    """`code` is one of `FAILURES`; `text` is for the log."""

    code: str
    text: str


class Renewed(_Message, frozen=True, tag=42):
    certificate: bytes


class Accusations(_Message, frozen=True, tag=43):
    told: tuple[tuple[Evidence, float], ...]


Reply = (
    ShardFound | BlockFound | HoldingsFound | Holders | Done | Resolved | Pong | SyncReply | Waiting | Failed
    | Renewed | Accusations
)  # fmt: skip

FAILURES = ("not-held", "not-found", "denied", "unavailable", "busy", "bad-request")
