"""Structured logs: one line for each event, as logfmt (`level=info logger=node.mirror msg="..." key=value`).

The items of `extra={...}` become further keys. Under journald the line starts with its priority instead of the time
(sd-daemon(3)). Text that looks like a credential is blanked, in the log lines of libraries too.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import TextIO

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.NOTSET, 7))
_PLAIN = re.compile(r"[\w.,:;/@+*#%&?!~()\[\]{}<>|^$-]+", re.ASCII)
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_MAX_VALUE = 4096
"""Characters of one value: text from a peer or a registry may be logged, and must not flood the journal."""

_SECRETS = (
    re.compile(r"(?i)(\b(?:bearer|basic)\s+)[\w.~+/=-]{6,}"),
    re.compile(r"(://[^/\s:@]*:)[^/\s@]+(?=@)"),
    re.compile(
        r"(?i)(\b(?:password|passwd|secret|token|access_token|refresh_token|identitytoken|signature|sig|auth|"
        r"x-amz-signature|x-amz-credential|x-amz-security-token|x-goog-signature)\b[\"']?\s*[=:]\s*[\"']?)[^\s\"'&,;]+"
    ),
)
"""Authorization values, passwords in URLs, and the signed query of a redirect, which is a credential too."""

_CHATTY = ("httpx", "httpcore", "h11", "libp2p", "multiaddr", "zeroconf", "asyncio")
"""Libraries that log every request, with its URL, at info."""


def redact(text: str) -> str:
    for secret in _SECRETS:
        text = secret.sub(r"\1***", text)
    return text


def logfmt(value: object) -> str:
    """One value, quoted if necessary; line breaks and control characters are escaped."""
    text = redact(str(value))
    if len(text) > _MAX_VALUE:
        text = text[:_MAX_VALUE] + "..."
    if _PLAIN.fullmatch(text):
        return text
    return '"' + "".join(_ESCAPES.get(c) or (c if c.isprintable() else f"\\u{ord(c):04x}") for c in text) + '"'


class LogfmtFormatter(logging.Formatter):
    def __init__(self, *, journal: bool) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        line = " ".join(f"{key}={logfmt(value)}" for key, value in self._fields(record))
        priority = next(priority for least, priority in _PRIORITIES if record.levelno >= least)
        return f"<{priority}>{line}" if self._journal else line

    def _fields(self, record: logging.LogRecord) -> Iterator[tuple[str, object]]:
        if not self._journal:
            yield "ts", datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        yield "level", record.levelname.lower()
        yield "logger", record.name
        yield "msg", record.getMessage()
        yield from ((key, value) for key, value in vars(record).items() if key not in _STANDARD)
        if record.exc_info:
            yield "exception", self.formatException(record.exc_info)


def under_journald(environment: Mapping[str, str], stream: TextIO) -> bool:
    """Whether systemd connected `stream` to the journal: JOURNAL_STREAM names its device and inode."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def configure(level: str, stream: TextIO = sys.stderr) -> None:
    """Send all logs to `stream`. `level` is one of debug, info, warning, error."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LogfmtFormatter(journal=under_journald(os.environ, stream)))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    set_level(level)


def set_level(level: str) -> None:
    root = logging.getLogger()
    root.setLevel(level.upper())
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(root.level, logging.WARNING))
