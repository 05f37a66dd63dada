"""File operations of a real process in a folder, traced as system calls by strace, SQLite's included."""

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
    """`path` becomes `inode`'s name, or a folder's for None."""

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
    """A sync of a file or a folder. It covers the operations whose number is below `before`, that of its begin."""

    inode: int | None
    folder: str
    before: int


@dataclass(frozen=True, slots=True)
class Mark:
    """A message of the program, written by `say`."""

    word: str
    value: object


Bytes = Write | Resize | Punch
Names = Name | Rename | Unname
Operation = Bytes | Names | Sync | Mark


_SAID = "## "


def say(word: str, value: object) -> None:
    """For the traced program: puts a Mark into the trace."""
    os.write(1, f"{_SAID}{word} {value!r}\n".encode())


def traced(command: Sequence[str], folder: Path, log: Path, cwd: Path) -> list[Operation]:
    """Runs the program to its end; returns its operations below `folder`."""
    strace = ["strace", "-f", "-y", "-xx", "-s", str(1 << 21), "-e", f"trace={_CALLS}", "-o", str(log)]
    done = subprocess.run([*strace, *command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return _Trace(str(folder)).read(log)


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
                    self._called(call[1], call[2], int(call[3]), call[4], before)
        return self._operations

    def _called(self, name: str, arguments: str, result: int, behind: str, before: int) -> None:
        texts = [_unhex(text[1]) for text in _TEXT.finditer(arguments)]
        handles = [(fd[1], os.fsdecode(_unhex(fd[2]))) for fd in _FD.finditer(arguments)]
        if name in ("open", "openat", "creat"):
            self._opened(_FD.search(f"{result}{behind}"), arguments, str(result))
        elif name in ("write", "pwrite64", "fsync", "fdatasync", "ftruncate", "fallocate"):
            handle, path = handles[0]
            if name == "write" and handle == "1":
                self._said(texts[0].decode(errors="replace"))
            elif self._ours(path):
                self._changed(name, handle, path, texts, arguments, result, before)
        elif texts or handles:
            paths = self._paths(handles, texts)
            if any(map(self._ours, paths)):
                self._named(name, paths, arguments)

    def _said(self, line: str) -> None:
        if line.startswith(_SAID):
            word, _, value = line.removeprefix(_SAID).partition(" ")
            self._operations.append(Mark(word, ast.literal_eval(value)))

    def _ours(self, path: str) -> bool:
        return path == self._folder or path.startswith(self._folder + "/")

    def _paths(self, handles: list[tuple[str, str]], texts: list[bytes]) -> list[str]:
        """Absolute ones, of calls with and without a folder's handle before each name."""
        bases = [path for _, path in handles] or [""] * len(texts)
        return [
            os.path.normpath(os.path.join(base, os.fsdecode(text))) for base, text in zip(bases, texts, strict=False)
        ]

    def _opened(self, opened: re.Match[str] | None, arguments: str, handle: str) -> None:
        path = os.fsdecode(_unhex(opened[2])) if opened else ""
        if not self._ours(path) or "O_DIRECTORY" in arguments:
            return
        self._positions[handle] = 0
        if path not in self._inodes and "O_CREAT" in arguments:
            self._count += 1
            self._inodes[path] = self._count
            self._operations.append(Name(path, self._count))
        elif "O_TRUNC" in arguments:
            self._operations.append(Resize(self._inodes[path], 0))

    def _changed(
        self, name: str, handle: str, path: str, texts: list[bytes], arguments: str, result: int, before: int
    ) -> None:
        inode = self._inodes.get(path)
        if name in ("fsync", "fdatasync"):
            self._operations.append(Sync(inode, path, before))
        elif inode is None:
            return  # it has no name any more
        elif name == "write":
            offset = self._positions[handle]
            self._positions[handle] += result
            self._operations.append(Write(inode, offset, texts[0][:result]))
        else:
            numbers = [int(part) for part in re.findall(r"(?<=, )\d+(?=$|, )", _TEXT.sub("", arguments))]
            if name == "pwrite64":
                self._operations.append(Write(inode, numbers[-1], texts[0][:result]))
            elif name == "ftruncate":
                self._operations.append(Resize(inode, numbers[-1]))
            elif "FALLOC_FL_PUNCH_HOLE" in arguments:
                self._operations.append(Punch(inode, *numbers[-2:]))

    def _named(self, name: str, paths: list[str], arguments: str) -> None:
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
            raise AssertionError(f"{name}({arguments[:200]}) is not known here")


def _unhex(text: str) -> bytes:
    """Decodes `\\x61\\x62`, and text without escapes."""
    if text.startswith("\\x"):
        return bytes.fromhex(text.replace("\\x", ""))
    return text.encode()
