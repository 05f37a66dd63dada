"""Bytes of an object, as connections give them, cut into blocks."""

from __future__ import annotations

from protocol.ids import BLOCK_SIZE, ObjectRef


class BlockCutter:
    """Cuts bytes that arrive in any portions into blocks, across connections: `position` is what is asked for next."""

    def __init__(self, ref: ObjectRef, first: int, count: int) -> None:
        self._ref = ref
        self._stop_index = first + count
        self._index = first
        self._filled = 0
        self._block = bytearray()
        self.stop = min(self._stop_index * BLOCK_SIZE, ref.size)

    @property
    def position(self) -> int:
        return self._index * BLOCK_SIZE + self._filled

    @property
    def done(self) -> bool:
        return self._index >= self._stop_index

    def room(self) -> memoryview:
        """Where the next bytes belong; made only when it is asked for."""
        if not self._block:
            self._block = bytearray(self._ref.block_length(self._index))
        return memoryview(self._block)[self._filled :]

    def filled(self, count: int) -> bytearray | None:
        """`count` more bytes are there; the block that they complete."""
        self._filled += count
        if self._filled < len(self._block):
            return None
        block, self._block, self._filled = self._block, bytearray(), 0
        self._index += 1
        return block
