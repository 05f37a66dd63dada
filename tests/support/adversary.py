"""An attacker inside or outside the cluster, that speaks to real daemons in the bytes of docs/PROTOCOL.md.

`Line` is a connection of the bulk channel on blocking sockets: a test sends it any frame. `introduce` has an
introduction over libp2p, with messages of the test's choice. `Attacker` is an admitted member: it has the key of the
liar of a site (tests/support/lying_daemon.py), or a new key with a certificate that the authority's file issued.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node.identity.certificates import Authority, Credentials, load_authority, open_authority
from node.identity.identity import Identity, load
from node.membership.addresses import parse_target
from node.membership.libp2p import secured_line, upgrader_of
from protocol import wire
from protocol.errors import ShoalError
from protocol.ids import PeerId
from protocol.introduction import PREFIX
from tests.support.site import Node

MAGIC = b"shoal-bulk"
VERSION = wire.VERSION
PATIENCE_S = 30.0
"""Bounds each wait for an answer. Only a daemon that stands still takes so long."""
WAITING = 40
FRAME = struct.Struct(">II")


class ClosedError(Exception):
    """The daemon closed the connection: it refused the peer, or found a message wrong."""


def frame(header: object, body: bytes = b"", *, claimed: int | None = None) -> bytes:
    """A frame with any header, also a wrong one. `claimed`: the length of the body that its prefix states."""
    data = header if isinstance(header, bytes) else msgspec.msgpack.encode(header)
    return FRAME.pack(len(data), len(body) if claimed is None else claimed) + data + body


class Line:
    """A connection of the bulk channel that has exchanged hellos. Raises ClosedError if the daemon closes it."""

    def __init__(self, node: Node, credentials: Credentials, lane: str = "control", *, hello: object = None) -> None:
        self._sock = self._connect(node, credentials)
        self._numbers = iter(range(1, 1 << 32))
        hello = [MAGIC, VERSION, lane] if hello is None else hello
        self.write(frame(hello))
        self.hello = self._frame()[0]

    @staticmethod
    def _connect(node: Node, credentials: Credentials) -> ssl.SSLSocket:
        plain = socket.create_connection((node.host, node.bulk_port), timeout=PATIENCE_S)
        try:
            return credentials.client_context().wrap_socket(plain)
        except OSError as error:
            plain.close()
            raise ClosedError(str(error)) from error

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # also ends a write of another thread
        self._sock.close()

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, data: bytes) -> None:
        try:
            self._sock.sendall(data)
        except OSError as error:
            raise ClosedError(str(error)) from error

    def send(self, message: object) -> int:
        """Send a request: a message, or any value in its place. Returns its number."""
        number = next(self._numbers)
        self.write(frame((number, message)))
        return number

    def receive(self) -> tuple[int, list[Any], bytes]:
        """The next answer that is no Waiting: its number, the tag and the fields, and the body."""
        while True:
            header, body = self._frame()
            number, message = header
            if message[0] != WAITING:
                return number, message, body

    def ask(self, message: object) -> list[Any]:
        """Tag and fields of the answer."""
        number = self.send(message)
        while True:
            answered, message, _ = self.receive()
            if answered == number:
                return message

    def ask_all(self, messages: Iterable[object], at_once: int = 32) -> list[list[Any]]:
        """The answers in the order in which they come. At most `at_once` requests are open."""
        answers, opened = [], 0
        for message in messages:
            self.send(message)
            opened += 1
            if opened >= at_once:
                answers.append(self.receive()[1])
                opened -= 1
        return answers + [self.receive()[1] for _ in range(opened)]

    def is_closed(self, within_s: float = PATIENCE_S) -> bool:
        """Whether the daemon closes the connection. Answers that come before are dropped."""
        self._sock.settimeout(within_s)
        try:
            while self._sock.recv(1 << 16):
                pass
        except TimeoutError:
            return False
        except OSError:
            return True
        return True

    def _frame(self) -> tuple[Any, bytes]:
        header_length, body_length = FRAME.unpack(self._read(FRAME.size))
        header = msgpack.unpackb(self._read(header_length), use_list=True)
        return header, self._read(body_length)

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                part = self._sock.recv(size - len(data))
            except OSError as error:
                raise ClosedError(str(error)) from error
            if not part:
                raise ClosedError("closed by the daemon")
            data += part
        return bytes(data)


@dataclass(frozen=True, slots=True)
class Attacker:
    """A member with a certificate of the cluster."""

    credentials: Credentials
    authority: Authority

    @classmethod
    def new(cls, key: Path, site: str = "loopback") -> Attacker:
        """A member that no other member knows yet."""
        return cls.of(Identity.of(Ed25519PrivateKey.generate()), key, site)

    @classmethod
    def as_node(cls, node: Node, key: Path, site: str = "loopback") -> Attacker:
        """The member that runs as `node`, in a second mouth."""
        return cls.of(load(node.data), key, site)

    @classmethod
    def of(cls, identity: Identity, key: Path, site: str) -> Attacker:
        authority = load_authority(key)
        return cls(Credentials.issued(authority, identity, "liar", site), authority)

    @property
    def identity(self) -> Identity:
        return self.credentials.identity

    @property
    def peer(self) -> PeerId:
        return self.identity.peer_id

    def line(self, node: Node, lane: str = "control", *, hello: object = None) -> Line:
        return Line(node, self.credentials, lane, hello=hello)

    def ask(self, node: Node, message: object) -> list[Any]:
        with self.line(node) as line:
            return line.ask(message)

    def introduce(self, node: Node, *messages: bytes) -> list[bytes]:
        """Send these framed messages as the dialling side of an introduction; see `introduce`."""
        return introduce(self.identity, node, *messages)


def introduce(identity: Identity, node: Node, *messages: bytes) -> list[bytes]:
    """The bodies of the daemon's messages, at most as many as were sent. A refusal ends the list early."""

    target = parse_target(node.address())
    replies: list[bytes] = []

    async def converse() -> None:
        with trio.move_on_after(PATIENCE_S):
            async with (
                await trio.open_tcp_stream(target.host, target.port) as stream,
                secured_line(upgrader_of(identity), stream, target.peer) as (line, _),
            ):
                for message in messages:
                    await line.send(message)
                    replies.append(await line.receive(wire.MAX_HEADER))

    with contextlib.suppress(ShoalError, OSError):
        trio.run(converse)
    return replies


def prefixed(body: object) -> bytes:
    """A message of an introduction."""
    data = body if isinstance(body, bytes) else msgspec.msgpack.encode(body)
    return PREFIX.pack(len(data)) + data


def stranger() -> Credentials:
    """A certificate of another cluster."""
    key = Ed25519PrivateKey.generate()
    return Credentials.issued(open_authority(), Identity.of(key), "stranger", "loopback")


class Hole:
    """Addresses that accept connections and never send a byte."""

    def __init__(self, host: str = "127.0.0.1", ports: int = 1) -> None:
        self._listeners = [socket.create_server((host, 0), backlog=4096) for _ in range(ports)]
        self.addresses = [f"{host}:{listener.getsockname()[1]}" for listener in self._listeners]

    def __enter__(self) -> Hole:
        return self

    def __exit__(self, *_: object) -> None:
        for listener in self._listeners:
            listener.close()

    def visits(self) -> int:
        """Connections that came and were not counted before."""
        count = 0
        for listener in self._listeners:
            listener.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    listener.accept()[0].close()
                    count += 1
        return count


@contextlib.contextmanager
def lines(attacker: Attacker, nodes: Sequence[Node], each: int = 1, lane: str = "control") -> Iterator[list[Line]]:
    """`each` connections to every node."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(attacker.line(node, lane)) for node in nodes for _ in range(each)]


def until(seconds: float, every: float = 0.05) -> Iterator[float]:
    """Yields the time that has passed, about each `every` seconds, until `seconds` have."""
    began = time.monotonic()
    while (passed := time.monotonic() - began) < seconds:
        yield passed
        time.sleep(every)
