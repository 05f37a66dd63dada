"""Small files of state that is useful after a restart, but not necessary: read whole, and replaced whole.

There is no fsync: after a power cut the last write or the whole file may be lost, and the node works without it.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TypeVar

import msgspec

from protocol.errors import UNDECODABLE

log = logging.getLogger(__name__)

T = TypeVar("T")


def load(path: Path, kind: type[T], most: int, content: str) -> T | None:
    """The value in a file of at most `most` bytes of msgpack; None if there is no file, or it cannot be read.

    `content` names the file's contents in log lines.
    """
    try:
        with path.open("rb") as file:
            return msgspec.msgpack.decode(file.read(most), type=kind)
    except FileNotFoundError:
        return None
    except (OSError, *UNDECODABLE) as error:
        log.warning("%s not readable", content, extra={"path": path, "reason": error})
        return None


def save(path: Path, data: bytes, content: str) -> bool:
    """Replace the file. Returns False if that failed; then the earlier file stays."""
    temporary = path.with_name(path.name + ".new")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        log.warning("cannot write %s", content, extra={"path": path, "reason": error})
        return False
    return True
