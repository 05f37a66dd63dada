"""The version that is running."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version


def version() -> str:
    """That of the installed distribution; `0+source` when run from a source tree that was not installed."""
    try:
        return installed_version("shoal")
    except PackageNotFoundError:
        return "0+source"
