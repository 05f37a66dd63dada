"""Small files of what a node would rather remember: read whole, replaced whole, and gone on without.

No fsync: a power cut may cost what was written last, or all of it, and whoever keeps such a file can do without.
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


def load(path: Path, kind: type[T], most: int, what: str) -> T | None:
    """What was saved, in msgpack of at most so many bytes; None where there is nothing, or nothing readable."""
    try:
        with path.open("rb") as file:
            return msgspec.msgpack.decode(file.read(most), type=kind)
    except FileNotFoundError:
        return None
    except (OSError, *UNDECODABLE) as error:
        log.warning("%s not readable", what, extra={"path": path, "reason": error})
        return None


def save(path: Path, data: bytes, what: str) -> bool:
    """Whether it is there now; what was there before stays where not."""
    temporary = path.with_name(path.name + ".new")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        log.warning("cannot write %s", what, extra={"path": path, "reason": error})
        return False
    return True
