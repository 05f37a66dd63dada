"""The operations of a real process on the files of a folder, from its system calls as strace shows them.

This includes the calls that SQLite makes.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_CALLS = (
    "open,openat,creat,write,pwrite64,writev,pwritev,pwritev2,ftruncate,truncate,fallocate,fsync,fdatasync,"
    "rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,mkdir,mkdirat,rmdir,copy_file_range"
)
_LINE = re.compile(r"(\d+) +(.*)", re.DOTALL)
_CALL = re.compile(r"(\w+)\((.*)\) += (-?\d+)(.*)", re.DOTALL)
_FD = re.compile(r"(-?\w+)<((?:\\x[0-9a-f]{2}|[^>])*)>(?:\(deleted\))?")
_TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?')


@dataclass(frozen=True, slots=True)
class Write:
    inode: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Resize:
    inode: int
    length: int


@dataclass(frozen=True, slots=True)
class Punch:
    inode: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Name:
    """`path` becomes a name of `inode`; None stands for a folder."""

    path: str
    inode: int | None


@dataclass(frozen=True, slots=True)
class Rename:
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Unname:
    path: str


@dataclass(frozen=True, slots=True)
class Sync:
    """A sync of a file, or of a folder. It covers the first `before` operations: those before it began."""

    inode: int | None
    folder: str
    before: int


@dataclass(frozen=True, slots=True)
class Mark:
    """A message from the traced program, written by `say`."""

    word: str
    value: object


Bytes = Write | Resize | Punch
Names = Name | Rename | Unname
Operation = Bytes | Names | Sync | Mark


_SAID = "## "


def say(word: str, value: object) -> None:
    """Called in the traced program: puts a Mark into the trace."""
    os.write(1, f"{_SAID}{word} {value!r}\n".encode())


def traced(command: Sequence[str], folder: Path, log: Path, cwd: Path) -> list[Operation]:
    """Run the program to its end, and return its operations below `folder`, in order."""
    strace = ["strace", "-f", "-y", "-xx", "-s", str(1 << 21), "-e", f"trace={_CALLS}", "-o", str(log)]
    done = subprocess.run([*strace, *command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return _Trace(str(folder)).read(log)


@dataclass(frozen=True, slots=True)
class _Call:
    """A successful system call. `end` is the text after its result; `before` counts the operations before its start."""

    before: int
    name: str
    arguments: str
    result: str
    end: str

    @property
    def texts(self) -> list[bytes]:
        return [_unhex(text[1]) for text in _TEXT.finditer(self.arguments)]

    @property
    def handles(self) -> list[tuple[str, str]]:
        """Number and path of each file handle."""
        return [(fd[1], os.fsdecode(_unhex(fd[2]))) for fd in _FD.finditer(self.arguments)]


class _Trace:
    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._operations: list[Operation] = []
        self._inodes: dict[str, int] = {}
        self._count = 0
        self._positions: dict[str, int] = {}

    def read(self, log: Path) -> list[Operation]:
        begun: dict[str, tuple[str, int]] = {}
        with log.open(encoding="ascii") as lines:
            for line in lines:
                match = _LINE.match(line.rstrip("\n"))
                assert match, line[:200]
                pid, text, before = match[1], match[2], len(self._operations)
                if text.endswith(" <unfinished ...>"):
                    begun[pid] = text.removesuffix(" <unfinished ...>"), before
                    continue
                if text.startswith("<... "):
                    first, before = begun.pop(pid)
                    text = first + text.partition(" resumed>")[2]
                call = _CALL.match(text)
                if call and int(call[3]) >= 0:
                    self._called(_Call(before, *call.groups()))
        return self._operations

    def _called(self, call: _Call) -> None:
        if call.name in ("open", "openat", "creat"):
            self._opened(call)
        elif call.name in ("write", "pwrite64", "fsync", "fdatasync", "ftruncate", "fallocate"):
            handle, path = call.handles[0]
            if call.name == "write" and handle == "1":
                self._said(call.texts[0].decode(errors="replace"))
            elif self._ours(path):
                self._changed(call, handle, path)
        elif call.texts or call.handles:
            paths = self._paths(call)
            if any(map(self._ours, paths)):
                self._named(call, paths)

    def _said(self, line: str) -> None:
        if line.startswith(_SAID):
            word, _, value = line.removeprefix(_SAID).partition(" ")
            self._operations.append(Mark(word, ast.literal_eval(value)))

    def _ours(self, path: str) -> bool:
        return path == self._folder or path.startswith(self._folder + "/")

    def _paths(self, call: _Call) -> list[str]:
        """The absolute paths that a call names. In calls such as openat, each name follows the handle of its folder."""
        bases = [path for _, path in call.handles] or [""] * len(call.texts)
        pairs = zip(bases, map(os.fsdecode, call.texts), strict=False)
        return [os.path.normpath(os.path.join(base, name)) for base, name in pairs]

    def _opened(self, call: _Call) -> None:
        opened = _FD.search(call.result + call.end)
        path = os.fsdecode(_unhex(opened[2])) if opened else ""
        if not self._ours(path) or "O_DIRECTORY" in call.arguments:
            return
        self._positions[call.result] = 0
        if path not in self._inodes and "O_CREAT" in call.arguments:
            self._count += 1
            self._inodes[path] = self._count
            self._operations.append(Name(path, self._count))
        elif "O_TRUNC" in call.arguments:
            self._operations.append(Resize(self._inodes[path], 0))

    def _changed(self, call: _Call, handle: str, path: str) -> None:
        inode, size = self._inodes.get(path), int(call.result)
        if call.name in ("fsync", "fdatasync"):
            self._operations.append(Sync(inode, path, call.before))
        elif inode is None:
            return  # the file was removed while it was open
        elif call.name == "write":
            offset = self._positions[handle]
            self._positions[handle] += size
            self._operations.append(Write(inode, offset, call.texts[0][:size]))
        else:
            numbers = [int(part) for part in re.findall(r"(?<=, )\d+(?=$|, )", _TEXT.sub("", call.arguments))]
            if call.name == "pwrite64":
                self._operations.append(Write(inode, numbers[-1], call.texts[0][:size]))
            elif call.name == "ftruncate":
                self._operations.append(Resize(inode, numbers[-1]))
            elif "FALLOC_FL_PUNCH_HOLE" in call.arguments:
                self._operations.append(Punch(inode, *numbers[-2:]))

    def _named(self, call: _Call, paths: list[str]) -> None:
        name = call.name
        if name.startswith("mkdir"):
            self._operations.append(Name(paths[0], None))
        elif name.startswith(("unlink", "rmdir")):
            self._operations.append(Unname(paths[0]))
            self._inodes.pop(paths[0], None)
        elif name.startswith("rename"):
            self._operations.append(Rename(paths[0], paths[1]))
            self._inodes[paths[1]] = self._inodes.pop(paths[0])
        elif name.startswith("link"):
            self._inodes[paths[1]] = self._inodes[paths[0]]
            self._operations.append(Name(paths[1], self._inodes[paths[1]]))
        else:
            raise AssertionError(f"this file does not handle {name}({call.arguments[:200]})")


def _unhex(text: str) -> bytes:
    """The bytes of a text such as `\\x61\\x62`. A text without escapes is encoded unchanged."""
    if text.startswith("\\x"):
        return bytes.fromhex(text.replace("\\x", ""))
    return text.encode()
