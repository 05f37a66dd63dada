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
from node.exchange.contract import Answer, Sender, Server
from node.exchange.requests import Dispatcher
from node.identity.identity import Identity, load
from protocol import messages as msg
from protocol.erasure import encode_shard
from protocol.errors import BadInputError, DeniedError, NotFoundError, ShoalError, UnavailableError
from protocol.ids import Buffer, Digest, ObjectRef, PeerId, Shard
from protocol.messages import Failed, GetShards, Request, ShardFound
from protocol.records import make_record
from protocol.shard_proofs import make_proof

FILE_NAME = "lies.json"
MEMBERSHIP = ("Ping", "PingRequest", "Sync", "Renew")

NOWHERE = "no/such"
"""A repository that no test pushes."""

_honest, _honest_stream, _honest_serve = Dispatcher.__call__, Dispatcher.stream, Dispatcher.serve
_GHOSTS = [Identity.of(Ed25519PrivateKey.generate()) for _ in range(16)]
"""Keys without certificates: members that exist in the claims of the liar only."""

Lie = Callable[["Liar", PeerId, Any, Callable[[], Awaitable[Answer]]], Awaitable[Answer]]
ShardLie = Callable[["Liar", GetShards, Sender, Callable[[Sender], Awaitable[None]]], Awaitable[None]]


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

    def lie_about(self, request: Request) -> str:
        """The name of the lie for this request; "" for none."""
        lies, name = self.plan.get("lies", {}), type(request).__name__
        return str(lies.get(name, "" if name in MEMBERSHIP else lies.get("*", "")))


def invented(digest: str, size: int, index: int) -> bytes:
    """The bytes of a block of an object that exists nowhere: the same for the same block."""
    length = ObjectRef(Digest.parse(digest), size).block_length(index)
    seed = sha256(f"{digest}#{index}".encode()).digest()
    return (seed * (length // len(seed) + 1))[:length]


def _send_invented(request: GetShards, sender: Sender, signer_of: Callable[[int], Identity]) -> None:
    ref, shard = ObjectRef(Digest.parse(request.digest), request.size), Shard(request.k, request.m, request.want)
    for index in (request.first + bit for bit in range(request.wanted.bit_length()) if request.wanted >> bit & 1):
        data, signer = invented(request.digest, request.size, index), signer_of(index)
        record = make_record(ref, index, sha256(data).digest(), signer=signer.peer_id, sign=signer.sign)
        body = bytes(encode_shard(data, shard.k, shard.m, shard.index))
        proof = make_proof(record, shard, body, maker=signer.peer_id, sign=signer.sign) if request.keep else None
        sender.send(msg.ShardFound(shard.k, shard.m, shard.index, record, proof=proof), body)


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


async def _fails(error: ShoalError, liar: Liar, request: GetShards, sender: Sender, honest: object) -> None:
    raise error


async def _fabricated(liar: Liar, request: GetShards, sender: Sender, honest: object) -> None:
    """Serve any block of any object, with a record of the liar."""
    _send_invented(request, sender, lambda index: liar.identity)


async def _made_up(liar: Liar, request: GetShards, sender: Sender, honest: Callable[[Sender], Awaitable[None]]) -> None:
    """Serve any block of the repository NOWHERE, which no registry has. Be honest about all others."""
    if NOWHERE not in request.source:
        return await honest(sender)
    return await _fabricated(liar, request, sender, honest)


async def _by_ghosts(liar: Liar, request: GetShards, sender: Sender, honest: object) -> None:
    """Serve wrong bytes with records of signers that are no members."""
    _send_invented(request, sender, lambda index: _GHOSTS[index % len(_GHOSTS)])


async def _wrong_bytes(
    liar: Liar, request: GetShards, sender: Sender, honest: Callable[[Sender], Awaitable[None]]
) -> None:
    """Change a bit of each shard and block, under the true record. Shards that others will keep are signed, so that
    they pass them on."""
    await honest(_Altering(liar, sender))


class _Altering:
    def __init__(self, liar: Liar, sender: Sender) -> None:
        self._liar, self._sender = liar, sender

    def send(self, message: ShardFound, data: Buffer) -> None:
        body = bytearray(data)
        body[len(body) // 2] ^= 1
        if message.proof is not None:
            shard, me = Shard(message.k, message.m, message.index), self._liar.identity
            proof = make_proof(message.record, shard, body, maker=me.peer_id, sign=me.sign)
            message = msgspec.structs.replace(message, proof=proof)
        self._sender.send(message, body)

    async def room(self) -> None:
        await self._sender.room()

    def coming(self) -> None:
        self._sender.coming()

    def end(self, error: ShoalError) -> None:
        self._sender.end(error)


async def _never_sends(liar: Liar, request: GetShards, sender: Sender, honest: object) -> None:
    await trio.sleep_forever()


async def _of_another_code(liar: Liar, request: GetShards, sender: Sender, honest: object) -> None:
    """Send shards of the widest code, for which nobody asked."""
    _send_invented(msgspec.structs.replace(request, k=32, m=8, want=39), sender, lambda index: liar.identity)


LIES: dict[str, Lie] = {
    **{code: partial(_failed, code) for code in msg.FAILURES},
    "own image": _own_image,
    "wrong size": _wrong_size,
    "holds all": _holds_all,
    "never": _never,
    "bomb": _bomb,
}
SHARD_LIES: dict[str, ShardLie] = {
    **{code: partial(_fails, UnavailableError(code)) for code in msg.FAILURES},
    "not-found": partial(_fails, NotFoundError("so says the liar")),
    "denied": partial(_fails, DeniedError("so says the liar")),
    "bad-request": partial(_fails, BadInputError("so says the liar")),
    "fabricated": _fabricated,
    "made up": _made_up,
    "by ghosts": _by_ghosts,
    "wrong bytes": _wrong_bytes,
    "never": _never_sends,
    "bomb": _of_another_code,
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
        if not lie:
            return await _honest(self, peer, request)
        return await LIES[lie](LIAR, peer, request, lambda: _honest(self, peer, request))

    async def _lie_of_shards(self: Dispatcher, peer: PeerId, request: GetShards, sender: Sender) -> None:
        lie = LIAR.lie_about(request)
        if not lie:
            return await _honest_stream(self, peer, request, sender)
        return await SHARD_LIES[lie](LIAR, request, sender, partial(_honest_stream, self, peer, request))

    def _never_at_once(self: Dispatcher, server: Server, at_once: object = None) -> None:
        _honest_serve(self, server)

    Dispatcher.__call__ = _lie  # type: ignore[method-assign]
    Dispatcher.stream = _lie_of_shards  # type: ignore[method-assign]
    Dispatcher.serve = _never_at_once  # type: ignore[method-assign]
    main()
