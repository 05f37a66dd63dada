"""Tar as image archives use it: plain files with short names. POSIX.1-2001 (ustar and pax), and GNU's long names.

Archives may be hostile. Python's tarfile is not used to read them: it reads headers of any length into memory, follows
links, and accepts truncated archives. An entry of a kind that an image layout does not use is refused with its name.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass

from protocol.errors import BadInputError

BLOCK = 512
MAX_ENTRIES = 16_384
"""Files, folders and extended headers. An image of all platforms has some hundreds."""
MAX_EXTENSION = 64 << 10
"""Bytes of pax records or of a long name."""
MAX_NAME = 255

Read = Callable[[int, int], bytes]
"""Called with (offset, length), returns exactly `length` bytes of the archive. Raises BadInputError."""

_RECORD = re.compile(rb"(\d{1,6}) ([^=]{1,255})=", re.DOTALL)
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a named pipe"}
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz", b"BZh": "bzip2"}


@dataclass(frozen=True, slots=True)
class Entry:
    """A file in the archive: `size` bytes from `offset` on."""

    name: str
    offset: int
    size: int


def read_entries(read: Read, length: int) -> dict[str, Entry]:
    """The files of an archive of `length` bytes, by name and in order. Raises BadInputError that names the entry."""
    entries: dict[str, Entry] = {}
    extension: dict[bytes, bytes] = {}
    offset = 0
    for _ in range(MAX_ENTRIES):
        if offset + BLOCK > length:
            raise BadInputError(f"the archive is cut short at byte {length}, before its end mark")
        header = read(offset, BLOCK)
        if not any(header):
            return entries
        _check_sum(header, offset)
        kind = header[156:157]
        name = _name(header, extension, offset)
        size = _size(header, extension, name)
        start, offset = offset + BLOCK, offset + BLOCK + -(-size // BLOCK) * BLOCK
        if offset > length:
            raise BadInputError(f"{name}: the archive is cut short: this entry should end at byte {offset}")
        if kind in (b"x", b"g", b"L"):
            if size > MAX_EXTENSION:
                raise BadInputError(f"{name}: an extended header of {size} bytes; at most {MAX_EXTENSION} are allowed")
            if kind != b"g":
                extension |= _extension(kind, read(start, size), name)
            continue
        extension = {}
        if kind == b"5" or (kind == b"\0" and name.endswith("/")):
            continue
        if kind not in (b"0", b"\0", b"7"):
            called = _KINDS.get(kind, f"of the kind {kind!r}")
            raise BadInputError(f"{name}: it is {called}: an image archive has only files and folders")
        name = _checked(name)
        if name in entries:
            raise BadInputError(f"{name}: it is in the archive twice")
        entries[name] = Entry(name, start, size)
    raise BadInputError(f"the archive has more than {MAX_ENTRIES} entries")


def _check_sum(header: bytes, offset: int) -> None:
    try:
        written = int(header[148:156].strip(b" \0"), 8)
    except ValueError:
        written = -1
    if written == sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
        return
    for magic, name in _MAGIC.items():
        if offset == 0 and header.startswith(magic):
            raise BadInputError(f"this is compressed with {name}: decompress it first")
    raise BadInputError(f"no tar header at byte {offset}: this is not a tar archive, or it is damaged")


def _name(header: bytes, extension: dict[bytes, bytes], offset: int) -> str:
    raw = extension.get(b"path")
    if raw is None:
        raw = header[:100].split(b"\0", 1)[0]
        prefix = header[345:500].split(b"\0", 1)[0]
        if header[257:263] == b"ustar\0" and prefix:
            raw = prefix + b"/" + raw
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInputError(f"{raw[:MAX_NAME]!r} at byte {offset}: the name is not UTF-8") from error
    if len(name) > MAX_NAME or not name.isprintable():
        raise BadInputError(f"{name[:MAX_NAME]!r} at byte {offset}: the name is too long or has control characters")
    return name


def _checked(name: str) -> str:
    """The name without a leading `./`."""
    parts = name.split("/")
    while len(parts) > 1 and parts[0] == ".":
        del parts[0]
    if not all(parts) or {".", ".."} & set(parts):
        raise BadInputError(f"{name}: the name is not a path inside the archive")
    return "/".join(parts)


def _size(header: bytes, extension: dict[bytes, bytes], name: str) -> int:
    field = header[124:136]
    try:
        if b"size" in extension:
            size = int(extension[b"size"]) if extension[b"size"].isdigit() else -1
        elif field[0] & 0x80:
            size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
        else:
            size = int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        size = -1
    if size < 0:
        raise BadInputError(f"{name}: its size is not a number")
    return size


def _extension(kind: bytes, data: bytes, name: str) -> dict[bytes, bytes]:
    """The fields of the next entry that an extended header sets."""
    if kind == b"L":
        return {b"path": data.rstrip(b"\0")}
    records: dict[bytes, bytes] = {}
    position = 0
    while position < len(data):
        match = _RECORD.match(data, position)
        end = position + int(match[1]) if match else 0
        if not match or not match.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise BadInputError(f"{name}: the extended header is malformed")
        if match[2].startswith(b"GNU.sparse"):
            raise BadInputError(f"{name}: sparse files are not supported")
        records[match[2]] = data[match.end() : end - 1]
        position = end
    return records


def header(name: str, size: int) -> bytes:
    """A file's header: readable for all, with fixed time and owner, so archives of the same image are equal."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.PAX_FORMAT)


def padding(size: int) -> bytes:
    """The padding after a file of `size` bytes."""
    return bytes(-size % BLOCK)


END = bytes(2 * BLOCK)
