"""Keys and certificates in files: written whole or not at all, and durably. A key is for the owner alone, and never
overwritten."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from protocol.errors import BadInputError

MAX_BYTES = 1 << 16
"""A key and its certificates are below 4 KiB; a larger file is not one of ours."""


def create(path: Path, data: bytes) -> bool:
    """Write a new file of mode 0600, durably; False, and nothing is changed, where `path` exists already.

    The link, unlike a rename, cannot replace a file that somebody else made meanwhile. Raises BadInputError.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        try:
            _write(temporary, data)
            os.link(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except FileExistsError:
        return False
    except OSError as error:
        raise BadInputError(f"cannot write {path}: {error.strerror}") from error
    return True


def replace(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a file, or put it in the place of the one that is there. Raises BadInputError."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        try:
            _write(temporary, data)
            temporary.chmod(mode)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        raise BadInputError(f"cannot write {path}: {error.strerror}") from error


def read(path: Path, most: int = MAX_BYTES) -> bytes:
    """The whole file. Raises BadInputError where it cannot be read or is too large; FileNotFoundError passes."""
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


def _write(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
