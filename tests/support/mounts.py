"""Small and read-only file systems for tests, mounted in this mount namespace and unmounted after each test."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.leftovers import taken_away_by

ZEROS = bytes(4096)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """Mount a tmpfs of `size` bytes at the new folder. Skips the test if this process cannot mount."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("cannot mount a file system here")
    forget = taken_away_by("umount", "--lazy", str(folder))
    try:
        yield folder
    finally:
        while os.path.ismount(folder):
            subprocess.run(["umount", str(folder)], check=True)
        forget()


def make_read_only(folder: Path) -> None:
    """Make every later open read-only, as after the kernel's `errors=remount-ro`. Open files stay writable.

    A remount fails while a file is open for writing. Therefore the folder is mounted over itself, as a read-only bind
    mount. `umount FOLDER` undoes this.
    """
    elsewhere = folder.with_name(f"{folder.name}-read-only")
    elsewhere.mkdir()
    for arguments in (
        ["mount", "--bind", str(folder), str(elsewhere)],
        ["mount", "-o", "remount,ro,bind", str(elsewhere)],
        ["mount", "--bind", str(elsewhere), str(folder)],
        ["umount", str(elsewhere)],
    ):
        subprocess.run(arguments, check=True)
    elsewhere.rmdir()


def fill(folder: Path, but: int) -> Path:
    """Fill the file system with one file, except for `but` pages of 4096 bytes."""
    assert os.path.ismount(folder), "fills only file systems that a test mounted"
    ballast = folder / "ballast"
    with ballast.open("ab", buffering=0) as file:
        try:
            while True:
                file.write(ZEROS)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        file.truncate(max(0, file.tell() // 4096 - but) * 4096)
    return ballast
