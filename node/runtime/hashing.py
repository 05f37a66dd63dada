"""The digest of bytes that pass by, computed beside the loop.

hashlib releases the interpreter's lock while it hashes, so on two processors the loop goes on meanwhile. One thread
serves all digests of the process, in the order of their updates. In virtual time there are no threads: `inline` hashes
at once.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Protocol

import trio

from protocol.ids import Buffer

MOST_PENDING = 16
"""Updates of a digest that may wait for the thread: blocks that stay in memory for it."""
TOGETHER = 4
"""Updates that are handed over together: each hand-over makes the threads contend for the interpreter's lock."""


class RunningDigest(Protocol):
    """`update` takes further bytes, which must not change afterwards; `hexdigest` returns the digest of all."""

    async def update(self, data: Buffer) -> None: ...

    async def hexdigest(self) -> str: ...


Hashing = Callable[[str], RunningDigest]
"""Begins a digest with this algorithm."""


class _Inline:
    def __init__(self, algorithm: str) -> None:
        self._hasher = hashlib.new(algorithm)

    async def update(self, data: Buffer) -> None:
        self._hasher.update(data)

    async def hexdigest(self) -> str:
        return self._hasher.hexdigest()


class HashingThread:
    """Must be made within the run of the loop. The thread ends with the process."""

    def __init__(self) -> None:
        self._work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._token = trio.lowlevel.current_trio_token()
        threading.Thread(target=self._run, name="hashing", daemon=True).start()

    def _run(self) -> None:
        while True:
            self._work.get()()

    def __call__(self, algorithm: str) -> RunningDigest:
        return _Threaded(algorithm, self._work.put, self._token)


class _Threaded:
    def __init__(
        self, algorithm: str, put: Callable[[Callable[[], None]], None], token: trio.lowlevel.TrioToken
    ) -> None:
        self._hasher, self._put, self._token = hashlib.new(algorithm), put, token
        self._gathered: list[Buffer] = []
        self._given = self._hashed = 0

    async def update(self, data: Buffer) -> None:
        self._gathered.append(data)
        if len(self._gathered) < TOGETHER:
            return
        if self._given - self._hashed >= MOST_PENDING:
            await self._catch_up()
        self._give()

    async def hexdigest(self) -> str:
        await self._catch_up()
        return self._hasher.hexdigest()

    def _give(self) -> None:
        self._given += len(self._gathered)
        self._put(partial(self._hash, self._gathered))
        self._gathered = []

    def _hash(self, parts: list[Buffer]) -> None:
        for part in parts:
            self._hasher.update(part)
        self._hashed += len(parts)

    async def _catch_up(self) -> None:
        """Wait until the thread has hashed all that was given."""
        self._give()
        done = trio.Event()
        self._put(partial(self._tell, done))
        await done.wait()

    def _tell(self, done: trio.Event) -> None:
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(done.set)


inline: Hashing = _Inline
