"""The floor of a pull: the processor time of the calls that the design cannot avoid, measured on this machine now.

N members pull an object at once. Each hashes it for its digest and each of its blocks for a record, has a new buffer
for each block, and writes it to the disk and to its client. One in N reads a block from the registry and signs its
record. For each of the others the block's bytes cross once from member to member, encrypted, and its record is checked.

The calls are those of Python's standard library and of `cryptography`, on blocks in memory that were just used.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import socket
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node.identity.certificates import Credentials, open_authority
from node.identity.identity import Identity
from protocol.ids import BLOCK_SIZE
from tests.support.leftovers import ended_with_the_run
from tests.support.processes import scratch

REPEATS, CALLS = 5, 64
BLOCKS_PER_GB = 1e9 / BLOCK_SIZE
TLS_PART = 1 << 15
"""Bytes that one side sends before the other side of the same thread receives them: they fit into a socket's buffer."""
RECORD_BYTES = 150
_TOUCHED = bytes(BLOCK_SIZE // mmap.PAGESIZE)

_DISCARD = """
import socket, sys
sock = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
buffer = bytearray(1 << 18)
while sock.recv_into(buffer):
    pass
"""
_SEND = """
import socket, sys
sock = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
block = bytes(1 << 20)
try:
    while True:
        sock.sendall(block)
except OSError:
    pass
"""


@dataclass(frozen=True, slots=True)
class Cost:
    """`seconds` for each GB of blocks that pass through the call, of which there are `passes` for each GB delivered."""

    name: str
    seconds: float
    passes: float

    @property
    def total(self) -> float:
        return self.seconds * self.passes


def floor(members: int) -> list[Cost]:
    """The costs for each GB that the clients of `members` nodes get, when all pull the same at once."""
    blocks = [bytearray(random.Random(seed).randbytes(BLOCK_SIZE)) for seed in range(CALLS)]
    key, message = Ed25519PrivateKey.generate(), bytes(RECORD_BYTES)
    public, signature = key.public_key(), key.sign(message)
    crossing = (members - 1) / members
    with scratch() as folder, _peer(_DISCARD) as client, _peer(_SEND) as registry, _tls() as (sender, receiver):
        return [
            Cost("SHA-256 of the object", _cost(lambda at: hashlib.sha256(blocks[at])), 1),
            Cost("SHA-256 of the block, for its record", _cost(lambda at: hashlib.sha256(blocks[at])), 1),
            Cost("TLS between members, both sides", _cost(lambda at: _cross(blocks[at], sender, receiver)), crossing),
            Cost("a new buffer", _buffers(), 1),
            Cost("write to the disk's cache", _writes(folder / "blocks", blocks), 1),
            Cost("write to the client", _cost(lambda at: client.sendall(blocks[at])), 1),
            Cost("read from the registry", _cost(lambda at: _receive(registry, blocks[at])), 1 - crossing),
            Cost("check the record's signature", _cost(lambda _: public.verify(signature, message)), crossing),
            Cost("sign the record", _cost(lambda _: key.sign(message)), 1 - crossing),
        ]


def _cost(call: Callable[[int], object], prepare: Callable[[], object] = lambda: None) -> float:
    """Processor seconds for a GB of blocks: the median of REPEATS, each after `prepare`."""

    def once() -> float:
        prepare()
        began = time.process_time()
        for at in range(CALLS):
            call(at)
        return (time.process_time() - began) / CALLS * BLOCKS_PER_GB

    return statistics.median(once() for _ in range(REPEATS))


def _buffers() -> float:
    """The cost of the first use of memory from the kernel: its page faults. (malloc may keep what was freed.)"""
    held = [mmap.mmap(-1, CALLS * BLOCK_SIZE)]

    def use(at: int) -> None:
        held[0][at * BLOCK_SIZE : (at + 1) * BLOCK_SIZE : mmap.PAGESIZE] = _TOUCHED

    def renew() -> None:
        held[0] = mmap.mmap(-1, CALLS * BLOCK_SIZE)

    return _cost(use, renew)


def _writes(path: Path, blocks: list[bytearray]) -> float:
    """The cost of writes to the pages of a file that are not in memory yet."""
    with path.open("wb", buffering=0) as file:
        return _cost(
            lambda at: os.pwrite(file.fileno(), blocks[at], at * BLOCK_SIZE), lambda: os.ftruncate(file.fileno(), 0)
        )


def _receive(sock: socket.socket, block: bytearray) -> None:
    left = memoryview(block)
    while left:
        left = left[sock.recv_into(left) :]


def _cross(block: bytearray, sender: ssl.SSLSocket, receiver: ssl.SSLSocket) -> None:
    whole = memoryview(block)
    for start in range(0, BLOCK_SIZE, TLS_PART):
        part = whole[start : start + TLS_PART]
        sender.sendall(part)
        while part:
            part = part[receiver.recv_into(part) :]


@contextmanager
def _peer(program: str) -> Iterator[socket.socket]:
    """A connection to a process that runs `program`."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        process = subprocess.Popen([sys.executable, "-c", program, str(server.getsockname()[1])])
        ended_with_the_run(process)
        sock, _ = server.accept()
    with sock:
        yield sock
    process.wait()


@contextmanager
def _tls() -> Iterator[tuple[ssl.SSLSocket, ssl.SSLSocket]]:
    """Two ends of a connection as members have it."""
    credentials = Credentials.issued(open_authority(), Identity.of(Ed25519PrivateKey.generate()), "floor")
    with socket.create_server(("127.0.0.1", 0)) as server:
        there = socket.create_connection(server.getsockname())
        here, _ = server.accept()
    client = credentials.client_context().wrap_socket(there, do_handshake_on_connect=False)
    answering = credentials.server_context().wrap_socket(here, server_side=True, do_handshake_on_connect=False)
    with client, answering:
        _shake_hands(client, answering)
        yield client, answering


def _shake_hands(*ends: ssl.SSLSocket) -> None:
    """The handshake of both ends in one thread."""
    waiting = list(ends)
    for end in ends:
        end.setblocking(False)
    while waiting:
        for end in list(waiting):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(end)
    for end in ends:
        end.setblocking(True)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
