"""States of a folder after a power cut at any moment: all synced data, and any part of the rest.

`Crashes.at` gives the possible states after any number of a trace's operations. The promises of a disk:

- bytes of a file are safe once an fsync or fdatasync of the file that began after the write has returned. Any other
  write is whole, missing, or present in some of its sectors of 512 bytes, or the file has its new length with zeros or
  garbage in it;
- changes of names (created, renamed, removed): with `ordered` any sync makes all earlier changes safe, and they become
  safe in their order, as in the journals of ext4 and xfs. Otherwise only an fsync of its folder makes a change safe,
  and each other change is kept or lost independently.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.support.file_trace import Bytes, Mark, Name, Names, Operation, Rename, Resize, Sync, Unname, Write

SECTOR = 512
PAGE = 4096


@dataclass(slots=True)
class _Content:
    """A file's bytes, and which of its pages are data and not a hole."""

    data: bytearray = field(default_factory=bytearray)
    pages: set[int] = field(default_factory=set)

    def resize(self, length: int) -> None:
        del self.data[length:]
        self.data.extend(bytes(length - len(self.data)))
        self.pages = {page for page in self.pages if page * PAGE < length}

    def write(self, offset: int, data: bytes) -> None:
        if offset + len(data) > len(self.data):
            self.resize(offset + len(data))
        self.data[offset : offset + len(data)] = data
        self.pages.update(range(offset // PAGE, -(-(offset + len(data)) // PAGE)))

    def punch(self, offset: int, length: int) -> None:
        end = min(offset + length, len(self.data))
        self.data[offset:end] = bytes(max(0, end - offset))
        self.pages.difference_update(range(-(-offset // PAGE), (offset + length) // PAGE))

    def store(self, path: str) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            for page in self.pages:
                os.pwrite(fd, self.data[page * PAGE : (page + 1) * PAGE], page * PAGE)
            os.ftruncate(fd, len(self.data))
        finally:
            os.close(fd)


@dataclass(frozen=True, slots=True)
class Crash:
    """The folder after the first `count` operations. `marks` has the marks of the program before the crash."""

    count: int
    how: str
    ordered: bool
    marks: list[Mark]
    names: dict[str, int | None] = field(default_factory=dict)
    contents: dict[int, _Content] = field(default_factory=dict)

    def store(self, folder: str, target: Path) -> None:
        """Write this state to the folder `target`."""
        for path in sorted(self.names):
            inode, place = self.names[path], str(target) + path.removeprefix(folder)
            if not os.path.isdir(os.path.dirname(place)):
                continue
            if inode is None:
                os.makedirs(place, exist_ok=True)
            else:
                self.contents.get(inode, _Content()).store(place)

    def fingerprint(self) -> int:
        files = ((path, bytes(self.contents[i].data) if i in self.contents else b"") for path, i in self.names.items())
        holes = ((i, tuple(sorted(content.pages))) for i, content in self.contents.items())
        return hash((tuple(map(repr, self.marks)), frozenset(files), frozenset(holes)))

    def said(self, word: str) -> list[object]:
        return [mark.value for mark in self.marks if mark.word == word]


class Crashes:
    """The states that `operations` may leave of a folder that was empty before them."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        self._operations = operations

    def __len__(self) -> int:
        """Number of moments: before the first operation, and after each."""
        return len(self._operations) + 1

    def at(self, count: int, seeds: Sequence[int]) -> Iterator[Crash]:
        """States without unsynced changes, with all, and two random states per seed: with and without ordered names."""
        yield self._crash(count, "nothing kept", None, keep=0.0, ordered=True)
        yield self._crash(count, "all kept", None, keep=1.0, ordered=True)
        for seed in seeds:
            for ordered in (True, False):
                rng = Random(f"{seed} {count} {ordered}")
                yield self._crash(count, f"seed {seed}, {ordered=}", rng, keep=rng.random(), ordered=ordered)

    def _crash(self, count: int, how: str, rng: Random | None, *, keep: float, ordered: bool) -> Crash:
        done = self._operations[:count]
        crash = Crash(count, how, ordered, [operation for operation in done if isinstance(operation, Mark)])
        safe = self._safe(done, ordered=ordered)
        in_order = True
        for number, operation in enumerate(done):
            kept = number in safe or (rng.random() < keep if rng else keep == 1.0)
            if isinstance(operation, Names):
                in_order = in_order and kept
                if in_order or (kept and not ordered):
                    _rename(crash.names, operation)
            elif isinstance(operation, Bytes):
                content = crash.contents.setdefault(operation.inode, _Content())
                if kept:
                    _apply(content, operation)
                elif rng and isinstance(operation, Write):
                    _tear(content, operation, rng)
        return crash

    def _safe(self, done: Sequence[Operation], *, ordered: bool) -> set[int]:
        """The numbers of the operations that a sync covers."""
        files: dict[int, int] = {}
        folders: dict[str, int] = {}
        journal = 0
        for operation in done:
            if isinstance(operation, Sync):
                journal = max(journal, operation.before)
                if operation.inode is None:
                    folders[operation.folder] = operation.before
                else:
                    files[operation.inode] = operation.before
        safe = set()
        for number, operation in enumerate(done):
            if isinstance(operation, Bytes):
                before = files.get(operation.inode, 0)
            elif isinstance(operation, Names):
                path = operation.new if isinstance(operation, Rename) else operation.path
                before = journal if ordered else folders.get(os.path.dirname(path), 0)
            else:
                continue
            if number < before:
                safe.add(number)
        return safe


def _rename(names: dict[str, int | None], operation: Names) -> None:
    if isinstance(operation, Name):
        names[operation.path] = operation.inode
    elif isinstance(operation, Unname):
        names.pop(operation.path, None)
    elif operation.old in names:
        names[operation.new] = names.pop(operation.old)


def _apply(content: _Content, operation: Bytes) -> None:
    if isinstance(operation, Write):
        content.write(operation.offset, operation.data)
    elif isinstance(operation, Resize):
        content.resize(operation.length)
    else:
        content.punch(operation.offset, operation.length)


def _tear(content: _Content, write: Write, rng: Random) -> None:
    """Apply a part of a write that was not synced."""
    end = write.offset + len(write.data)
    kind = rng.choice(["missing", "sectors", "grown", "zeros", "rubbish"])
    if kind == "sectors":
        for start in range(write.offset // SECTOR * SECTOR, end, SECTOR):
            first, last = max(start, write.offset), min(start + SECTOR, end)
            if rng.random() < 0.5:
                content.write(first, write.data[first - write.offset : last - write.offset])
    elif kind == "grown":
        content.resize(max(end, len(content.data)))
    elif kind == "zeros":
        content.write(write.offset, bytes(len(write.data)))
    elif kind == "rubbish":
        content.write(write.offset, rng.randbytes(len(write.data)))
