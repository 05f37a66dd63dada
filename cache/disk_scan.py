"""Comparing the files of a disk store with what it holds, folder by folder.

The first files are compared before the store serves, those of a large store by and by afterwards: a piece whose bytes
are missing is a miss when it is read, and bytes that no row names only take space for a while.
"""

from __future__ import annotations

import logging

from cache.disk_table import PieceTable
from cache.recovery import FileKey, HeldFile, listed, prefix_of, prefixes, reconcile
from cache.runs import RUN_BLOCKS, piece_length
from protocol.ids import BLOCK_SIZE, Digest

logger = logging.getLogger(__name__)

AT_ONCE = 1024
"""Files compared before the store serves: 0.1 s."""
IN_A_STEP = 64


def held_file(table: PieceTable, key: FileKey) -> HeldFile:
    """The pieces of a file that have been written."""
    digest, shard = key
    short = dict[int, int]()
    for run in table.runs.of(digest):
        last = (run.size - 1) // BLOCK_SIZE
        if last // RUN_BLOCKS == run.number and run.bits(shard) >> last % RUN_BLOCKS & 1:
            short[last] = piece_length(run.size, last, shard)
    bits = table.runs.bitmap(digest, shard)
    for piece, entry in table.unsynced.items():
        if entry.key == key and entry.data is not None:
            bits &= ~(1 << piece.block.index)
    return HeldFile(key, bits, short)


class Scan:
    """A step is: `list_next` in a thread, `files` on the loop, `reconcile` in a thread, and `apply` on the loop. No
    file is written to between `files` and `apply`."""

    def __init__(self, table: PieceTable) -> None:
        self._table = table
        self._expected: dict[str, list[Digest]] = {}
        for digest in table.runs.objects():
            self._expected.setdefault(prefix_of(digest), []).append(digest)
        there = {*self._expected, *prefixes(table.folder.path)} if table.folder.usable else ()
        self._prefixes = sorted(there, reverse=True)
        self._keys: list[FileKey] = []
        self._digests: list[Digest] = []
        self._there: set[FileKey] = set()
        self._missing = self._removed = 0

    @property
    def is_over(self) -> bool:
        return not self._prefixes and not self._keys and not self._digests

    def list_next(self) -> None:
        """Raises OSError."""
        while self._prefixes and not self._keys and not self._digests:
            prefix = self._prefixes.pop()
            there = set(listed(self._table.folder.path, prefix))
            self._there = there
            self._keys += there
            self._digests += self._expected.pop(prefix, ())

    def files(self) -> list[HeldFile]:
        table = self._table
        if not self._keys:  # the files that are there were compared: others may be missing
            digests, self._digests = self._digests[:IN_A_STEP], self._digests[IN_A_STEP:]
            runs = [run for digest in digests for run in table.runs.of(digest)]
            self._keys += {(run.digest, shard) for run in runs for shard in run.content()} - self._there
            if not self._digests:
                self._there.clear()
        step, self._keys = self._keys[:IN_A_STEP], self._keys[IN_A_STEP:]
        # The flush gives back what was removed meanwhile.
        busy = {(piece.block.digest, piece.shard) for piece in table.removed}
        return [held_file(table, key) for key in step if key not in busy]

    def reconcile(self, files: list[HeldFile]) -> dict[FileKey, list[int]]:
        return reconcile(self._table.folder.path, files, punching=self._table.folder.punching)

    def apply(self, files: list[HeldFile], missing: dict[FileKey, list[int]]) -> None:
        table = self._table
        self._removed += sum(not file.bits for file in files)
        for key, indices in missing.items():
            for index in indices:
                self._missing += table.lose(key, index)

    def run(self, most: int) -> None:
        """Steps until `most` files were compared. Not on the loop. Raises OSError."""
        while most > 0 and not self.is_over:
            self.list_next()
            files = self.files()
            self.apply(files, self.reconcile(files))
            most -= len(files)
        self.report()

    def report(self) -> None:
        """Log what was found since the last report."""
        if self._missing or self._removed:
            text = "%s: %d pieces are forgotten, because their bytes are missing; %d files without pieces are removed"
            logger.warning(text, self._table.folder.path, self._missing, self._removed)
        self._missing = self._removed = 0
