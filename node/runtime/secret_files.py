"""Keys and certificates in files, written atomically and durably. Only the owner can read a key file, and no key file
is ever overwritten."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from protocol.errors import BadInputError

MAX_BYTES = 1 << 16
"""A key and its certificates are below 4 KiB; a larger file was not written by this program."""


def create(path: Path, data: bytes) -> bool:
    """Write a new file of mode 0600, durably. Returns False, and changes nothing, if `path` exists already.

    A link, unlike a rename, cannot replace a file that another process created meanwhile. Raises BadInputError.
    """
    try:
        with _written_beside(path, data) as temporary:
            os.link(temporary, path)
    except FileExistsError:
        return False
    return True


def replace(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a file durably, and replace an earlier one. Raises BadInputError."""
    with _written_beside(path, data) as temporary:
        temporary.chmod(mode)
        os.replace(temporary, path)


def read(path: Path, most: int = MAX_BYTES) -> bytes:
    """The whole file. Raises FileNotFoundError, or BadInputError if it cannot be read or has more than `most` bytes."""
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BadInputError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > most:
        raise BadInputError(f"{path} is larger than such a file can be")
    return data


@contextmanager
def _written_beside(path: Path, data: bytes) -> Iterator[Path]:
    """A temporary file with `data`, to be moved or linked to `path`. Raises BadInputError; FileExistsError passes."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise BadInputError(f"cannot write {path}: {error.strerror}") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
