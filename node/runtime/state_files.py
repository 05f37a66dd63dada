"""Small files of state that is useful after a restart, but not necessary: read whole, and replaced whole.

There is no fsync: a power cut may cost the last write, or the whole file, and the node works without it.
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
    """The value in a file of at most `most` bytes of msgpack; None where there is no file, or it is not readable.

    `content` says in log lines what the file holds.
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
    """Whether the file was replaced; if not, the earlier file stays."""
    temporary = path.with_name(path.name + ".new")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        log.warning("cannot write %s", content, extra={"path": path, "reason": error})
        return False
    return True
