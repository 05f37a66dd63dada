"""An admitted member that lies: a p2pd whose answers to other members a test changes while it runs.

`python -m tests.support.lying_daemon --config FILE` reads the file `lies.json` beside the configuration at each
request: `{"lies": {REQUEST: LIE}, "image": [digest, size, media type]}`. REQUEST is the name of a message, or `*` for
all but membership. LIE is a name in LIES. Requests without a lie are answered as an honest member answers.

The lies are values that the wire allows. Bytes that it forbids come from tests/support/adversary.py.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node.daemon import main
from node.exchange.contract import Answer
from node.exchange.requests import Dispatcher
from node.identity.identity import Identity, load
from protocol import messages as msg
from protocol.erasure import encode_shard
from protocol.ids import Digest, ObjectRef, PeerId, Shard
from protocol.messages import Failed, Request
from protocol.records import Record, make_record
from protocol.shard_proofs import make_proof

FILE_NAME = "lies.json"
MEMBERSHIP = ("Ping", "PingRequest", "Sync", "Renew")

NOWHERE = "no/such"
"""A repository that no test pushes."""

_honest = Dispatcher.__call__
_GHOSTS = [Identity.of(Ed25519PrivateKey.generate()) for _ in range(16)]
"""Keys without certificates: members that exist in the claims of the liar only."""

Lie = Callable[["Liar", PeerId, Any, Callable[[], Awaitable[Answer]]], Awaitable[Answer]]


class Liar:
    def __init__(self, config: Path) -> None:
        self._path = config.with_name(FILE_NAME)
        self._data = config.with_name("data")
        self._read: tuple[int, dict[str, Any]] = (0, {})
        self._identity: Identity | None = None

    @property
    def identity(self) -> Identity:
        self._identity = self._identity or load(self._data)
        return self._identity

    @property
    def plan(self) -> dict[str, Any]:
        try:
            changed = self._path.stat().st_mtime_ns
        except FileNotFoundError:
            return {}
        if changed != self._read[0]:
            self._read = changed, json.loads(self._path.read_text())
        return self._read[1]

    def lie_about(self, request: Request) -> Lie | None:
        lies, name = self.plan.get("lies", {}), type(request).__name__
        lie = lies.get(name, "" if name in MEMBERSHIP else lies.get("*", ""))
        return LIES[lie] if lie else None


def invented(request: Any) -> bytes:
    """The bytes of a block of an object that exists nowhere: the same for the same block."""
    ref = ObjectRef(Digest.parse(request.digest), request.size)
    length = ref.block_length(request.index)
    seed = sha256(f"{request.digest}#{request.index}".encode()).digest()
    return (seed * (length // len(seed) + 1))[:length]


def _record(request: Any, data: bytes, signer: Identity) -> Record:
    ref = ObjectRef(Digest.parse(request.digest), request.size)
    sha = sha256(data).digest()
    return make_record(ref, request.index, sha, signer=signer.peer_id, sign=signer.sign)


def _answer(request: Any, data: bytes, record: Record, maker: Identity) -> Answer:
    if isinstance(request, msg.GetBlock):
        return Answer(msg.BlockFound(record), data)
    shard = Shard(request.k, request.m, request.want)
    body = bytes(encode_shard(data, shard.k, shard.m, shard.index))
    proof = make_proof(record, shard, body, maker=maker.peer_id, sign=maker.sign) if request.keep else None
    return Answer(msg.ShardFound(shard.k, shard.m, shard.index, record, proof=proof), body)


async def _failed(code: str, liar: Liar, peer: PeerId, request: Request, honest: object) -> Answer:
    return Answer(Failed(code, "so says the liar"))


async def _own_image(liar: Liar, peer: PeerId, request: Any, honest: Callable[[], Awaitable[Answer]]) -> Answer:
    """Say that each tag stands for the liar's own image."""
    if ":" in request.reference:
        return await honest()
    digest, size, media_type = liar.plan["image"]
    return Answer(msg.Resolved(digest, size, media_type, 0.0, 0.0))


async def _wrong_size(liar: Liar, peer: PeerId, request: Any, honest: Callable[[], Awaitable[Answer]]) -> Answer:
    """Say that each object has a size of 2^40 bytes, or of 100 bytes."""
    size = 1 << 40 if sha256(request.reference.encode()).digest()[0] % 2 else 100
    digest = request.reference if ":" in request.reference else "sha256:" + "0" * 64
    return Answer(msg.Resolved(digest, size, "application/octet-stream", 0.0, 0.0))


async def _fabricated(liar: Liar, peer: PeerId, request: Any, honest: object) -> Answer:
    """Serve any block of any object, with a record of the liar."""
    data = invented(request)
    return _answer(request, data, _record(request, data, liar.identity), liar.identity)


async def _made_up(liar: Liar, peer: PeerId, request: Any, honest: Callable[[], Awaitable[Answer]]) -> Answer:
    """Serve any block of the repository NOWHERE, which no registry has. Be honest about all others."""
    if isinstance(request, msg.GetShard) and NOWHERE in request.source:
        return await _fabricated(liar, peer, request, honest)
    return await honest()


async def _by_ghosts(liar: Liar, peer: PeerId, request: Any, honest: object) -> Answer:
    """Serve wrong bytes with records of signers that are no members."""
    data = invented(request)
    ghost = _GHOSTS[request.index % len(_GHOSTS)]
    return _answer(request, data, _record(request, data, ghost), ghost)


async def _wrong_bytes(liar: Liar, peer: PeerId, request: Any, honest: Callable[[], Awaitable[Answer]]) -> Answer:
    """Change a bit of each shard and block, under the true record. Shards that others will keep are signed, so that
    they pass them on."""
    answer = await honest()
    if answer.body is None:
        return answer
    body, message = bytearray(answer.body), answer.message
    body[len(body) // 2] ^= 1
    if isinstance(message, msg.ShardFound) and message.proof is not None:
        shard, me = Shard(message.k, message.m, message.index), liar.identity
        message = msgspec.structs.replace(
            message, proof=make_proof(message.record, shard, body, maker=me.peer_id, sign=me.sign)
        )
    return Answer(message, body)


async def _holds_all(liar: Liar, peer: PeerId, request: Any, honest: object) -> Answer:
    """Claim to hold every block and every shard of everything, or that ghosts hold it."""
    if isinstance(request, msg.FindHolders):
        return Answer(msg.Holders(tuple(ghost.peer_id for ghost in _GHOSTS)))
    every = b"\xff" * 131_072
    return Answer(msg.HoldingsFound(every, tuple((4, 1, index, every) for index in range(5))))


async def _never(liar: Liar, peer: PeerId, request: Request, honest: object) -> Answer:
    """Work for ever: the connection says Waiting meanwhile."""
    await trio.sleep_forever()
    raise AssertionError


async def _bomb(liar: Liar, peer: PeerId, request: Request, honest: object) -> Answer:
    """Answer with a message of another kind, or one that claims the largest values."""
    match request:
        case msg.GetHoldings():
            every = b"\xff" * 131_072
            return Answer(msg.HoldingsFound(every, tuple((32, 8, index % 40, every) for index in range(24))))
        case msg.Resolve():
            return Answer(msg.Resolved("sha256:" + "f" * 64, 1 << 40, "x/" + "y" * 250, 0.0, 0.0))
        case _:
            return Answer(msg.Done())


LIES: dict[str, Lie] = {
    **{code: partial(_failed, code) for code in msg.FAILURES},
    "own image": _own_image,
    "wrong size": _wrong_size,
    "fabricated": _fabricated,
    "made up": _made_up,
    "by ghosts": _by_ghosts,
    "wrong bytes": _wrong_bytes,
    "holds all": _holds_all,
    "never": _never,
    "bomb": _bomb,
}


def tell_lies(folder: Path, **plan: object) -> None:
    """Replace the plan of the liar whose configuration is in `folder`. Without arguments it is honest."""
    temporary = folder / f"{FILE_NAME}.new"
    temporary.write_bytes(msgspec.json.encode(plan))
    os.replace(temporary, folder / FILE_NAME)


if __name__ == "__main__":
    LIAR = Liar(Path(sys.argv[sys.argv.index("--config") + 1]))

    async def _lie(self: Dispatcher, peer: PeerId, request: Request) -> Answer:
        lie = LIAR.lie_about(request)
        if lie is None:
            return await _honest(self, peer, request)
        return await lie(LIAR, peer, request, lambda: _honest(self, peer, request))

    Dispatcher.__call__ = _lie  # type: ignore[method-assign]
    main()
