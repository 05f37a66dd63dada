"""The version of the running program."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version


def version() -> str:
    """The version of the installed distribution; `0+source` when run from a source tree that is not installed."""
    try:
        return installed_version("shoal")
    except PackageNotFoundError:
        return "0+source"
